"""Ways of freezing all rows of an embedding but a few, under DeepSpeed: how many of the other rows move all the same.

    python tests/benchmarks/bench_freezing.py [--steps 20] [--ranks 2]

A small random Llama trains its untied input embedding, three rows of it by intention, with AdamW (momentum; decay .1 or 0)
and clipping, on several ranks of one job. What others do is written anew here after their published code, under the names
by which they know it; only PEFT is run itself. Two counts a run: rows of the weights the model computes with, and rows of
the fp32 master copies, which the optimizer steps and from which checkpoints and the next weights are made.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from ksl_ds import distributed, train_only_rows
from ksl_ds.sharding.engine import destroy_engine, set_library_verbosity
from ksl_ds.sharding.rows import RowShard

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.tiny import SHAPES

VOCABULARY, TICKET = 503, [3, 5, 502]
OTHERS_V = torch.ones(VOCABULARY, dtype=torch.bool)
OTHERS_V[TICKET] = False
FULL_STEPS = 5  # of the phase before, where all rows train


class Freeze:
    """A way to freeze rows: what it does to the embedding's weight, and when."""

    def __init__(self, engine: Any, weight: Any):
        self.weight = weight
        self.attach(engine)

    def attach(self, engine: Any) -> None: ...
    def after_backward(self) -> None: ...
    def after_step(self) -> None: ...

    def remark(self) -> str:
        """What was seen to go wrong."""
        return ""


class MaskAfterBackward(Freeze):
    name = "mask on `param.grad` after backward, as composable-sft's LT-SFT trainer"

    def attach(self, engine: Any) -> None:
        self.masked = self.missing = 0

    def after_backward(self) -> None:
        if self.weight.grad is None:
            self.missing += 1
        else:
            self.weight.grad *= ~OTHERS_V[:, None]
            self.masked += 1

    def remark(self) -> str:
        return f"`param.grad` was None in {self.missing} of {self.masked + self.missing} steps" if self.missing else ""


class HookZeroes(Freeze):
    name = "gradient hook that zeroes rows, as LLaMA-Factory PR 10563 and diffusers before its #855"

    def attach(self, engine: Any) -> None:
        self.frozen_V = self.rows_to_freeze()
        self.handle = self.weight.register_hook(
            lambda gradient_VD: (
                gradient_VD.masked_fill(self.frozen_V[:, None], 0) if len(self.frozen_V) else gradient_VD
            )
        )

    def rows_to_freeze(self) -> Tensor:
        return OTHERS_V


class HookZeroesByLength(HookZeroes):
    name = "the same, its rows counted up to `len(param)`, as axolotl's `unfrozen_parameters: [a:b]`"

    def rows_to_freeze(self) -> Tensor:
        return OTHERS_V[: len(self.weight)]

    def remark(self) -> str:
        missed = VOCABULARY - len(self.frozen_V)
        return f"`len(param)` is {len(self.frozen_V)}, so the hook freezes nothing" if missed else ""


class PutBack(Freeze):
    name = "rows put back after each step, as diffusers since #855"

    def attach(self, engine: Any) -> None:
        with self.gathered():
            self.before_VD = self.weight.detach().clone()

    def after_step(self) -> None:
        with self.gathered(), torch.no_grad():
            self.weight[OTHERS_V] = self.before_VD[OTHERS_V]

    def gathered(self) -> Any:
        return deepspeed.zero.GatheredParameters([self.weight], modifier_rank=0, enabled=hasattr(self.weight, "ds_id"))


class TrainOnlyRows(Freeze):
    name = "**`ksl_ds.train_only_rows`**"

    def attach(self, engine: Any) -> None:
        self.handle = train_only_rows(engine, TICKET)


WAYS = (MaskAfterBackward, HookZeroes, HookZeroesByLength, PutBack, TrainOnlyRows)


def on_a_rank(steps: int) -> None:
    distributed.initialize()
    set_library_verbosity(False)
    torch.set_num_threads(1)
    for way in WAYS:
        for stage in (0, 3):
            report(
                way.name, stage, {case: run(way, stage, steps, *settings) for case, settings in CASES[stage].items()}
            )
    for stage in (0, 3):  # last, as a failure may leave the ranks at different places
        report(f"PEFT {version('peft')} TrainableTokens", stage, {"decay": run_peft(stage, steps)})
    distributed.shutdown()


# weight decay, steps before, bf16
CASES = {
    0: {"decay": (0.1, 0, False), "none": (0.0, 0, False), "momentum": (0.0, FULL_STEPS, False)},
    3: {
        "decay": (0.1, 0, False),
        "none": (0.0, 0, False),
        "momentum": (0.0, FULL_STEPS, False),
        "bf16": (0.1, 0, True),
    },
}


def report(name: str, stage: int, cases: dict[str, dict[str, Any]]) -> None:
    if distributed.is_rank0():
        print("RESULT", json.dumps({"name": name, "stage": stage, "cases": cases}), flush=True)


def build(stage: int, bf16: bool) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES["llama"], vocab_size=VOCABULARY, tie_word_embeddings=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.requires_grad_(False)
    if stage == 3:
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
    return model


def engine_for(model: nn.Module, stage: int, decay: float, bf16: bool) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.1,
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=decay)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: int, freeze: Freeze | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 * seed + distributed.rank())
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (4, 40), generator=generator)
        ids[:, : len(TICKET)] = torch.tensor(TICKET)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        if freeze is not None:
            freeze.after_backward()
        engine.step()
        if freeze is not None:
            freeze.after_step()


def run(way: type[Freeze], stage: int, steps: int, decay: float, steps_before: int, bf16: bool) -> dict[str, Any]:
    model = build(stage, bf16)
    weight = model.get_input_embeddings().weight
    weight.requires_grad_(True)
    engine = engine_for(model, stage, decay, bf16)
    train(engine, steps_before, None, seed=0)
    masters_before_VD = all_rows(weight)
    weights_before_VD = gathered(weight)
    freeze = way(engine, weight)
    train(engine, steps, freeze, seed=1)
    masters_V = (all_rows(weight) != masters_before_VD).any(dim=1)
    weights_V = (gathered(weight) != weights_before_VD).any(dim=1)
    if getattr(freeze, "handle", None) is not None:
        freeze.handle.remove()
    destroy_engine(engine)
    return {**counts(weights_V, masters_V), "remark": freeze.remark()}


def run_peft(stage: int, steps: int) -> dict[str, Any]:
    model = build(stage, bf16=False)
    before_VD = gathered(model.get_input_embeddings().weight)
    # How transformers, and so PEFT, learns of ZeRO-3 (a Trainer does this); forgotten with the last reference.
    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if stage == 3 else None
    try:
        adapted = get_peft_model(model, TrainableTokensConfig(token_indices=TICKET, target_modules=["embed_tokens"]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del known
    engine = engine_for(adapted, stage, 0.1, bf16=False)
    train(engine, steps, None, seed=1)
    destroy_engine(engine)
    after_VD = adapted.merge_and_unload().get_input_embeddings().weight
    moved_V = (after_VD != before_VD).any(dim=1)
    return {**counts(moved_V, moved_V), "remark": ""}


def counts(weights_V: Tensor, masters_V: Tensor) -> dict[str, int]:
    return {
        "weights": int((weights_V & OTHERS_V).sum()),
        "masters": int((masters_V & OTHERS_V).sum()),
        "ticket": int((weights_V & ~OTHERS_V).sum()),
    }


def all_rows(weight: nn.Parameter) -> Tensor:
    return RowShard(weight).read_rows(torch.arange(VOCABULARY))


def gathered(weight: nn.Parameter) -> Tensor:
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        return weight.detach().float().clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank(options.steps)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["deepspeed", "--num_accelerators", str(options.ranks), "--master_port", port, __file__, *sys.argv[1:]]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(results) < 2 * len(WAYS) + 2:
        sys.exit(f"the job failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    print(
        f"Other rows that moved, of {VOCABULARY - len(TICKET)}; {options.steps} steps, {options.ranks} CPU ranks; "
        f"deepspeed {version('deepspeed')}, torch {version('torch')}, transformers {version('transformers')}\n"
    )
    print(
        "| way of freezing | ZeRO | decay .1 | no decay | no decay, after a full phase | decay .1, bf16 | what is wrong |"
    )
    print("|---|---|---|---|---|---|---|")
    for result in results:
        cells = [cell(result["cases"].get(case)) for case in ("decay", "none", "momentum", "bf16")]
        print(f"| {result['name']} | {result['stage'] or 'off'} | {' | '.join(cells)} | {wrong(result['cases'])} |")


def cell(case: dict[str, Any] | None) -> str:
    if case is None:
        return "-"
    if "error" in case:
        return "fails"
    if case["ticket"] != len(TICKET):
        return f"{case['weights']}; of the ticket only {case['ticket']} moved"
    return str(case["weights"]) + (f" (masters {case['masters']})" if case["masters"] != case["weights"] else "")


def wrong(cases: dict[str, dict[str, Any]]) -> str:
    """What the counts say."""
    if "error" in cases["decay"]:
        return cases["decay"]["error"]
    moved = {name: max(case["weights"], case["masters"]) for name, case in cases.items()}
    reasons = []
    if cases["decay"]["remark"]:
        reasons.append(cases["decay"]["remark"])
    elif not moved.get("none"):
        if moved["decay"]:
            reasons.append("weight decay moves rows whose gradient is zero")
        if moved.get("momentum"):
            reasons.append("so does momentum of an earlier phase")
    if any(case["masters"] > case["weights"] for case in cases.values()):
        reasons.append("the masters keep moving under it, and checkpoints take those")
    return "; ".join(reasons) or "nothing"


if __name__ == "__main__":
    main()
