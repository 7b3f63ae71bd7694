"""LLaMA-3-70B's width and vocabulary with few layers, a ticket's rows trained for three steps, carried on to 80 layers.

    python tests/benchmarks/bench_70b_train.py                  # 1 and 2 layers on one CPU rank: 14 GB of memory, 8 GB of disk
    python tests/benchmarks/bench_70b_train.py --layers 2 8 --ranks 8    # GPUs

Random bfloat16 weights in a model folder, a ticket of 18 rows, and `ksl-ds tune method=ticket` under the deepspeed launcher
with zero3_70b.json and gradient checkpointing, as launch/recipes/llama3_70b.yaml trains. Two numbers of layers give what a
layer costs in memory, one layer alone what it costs in time; 80 layers cost that many times as much.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LAYERS_70B = 80
ROWS = 18
STEPS = 3  # the first one warms up
LAYER_TOKENS = 16  # few, as a CPU without bfloat16 arithmetic takes half a minute for 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--folder", type=Path, help="for the models; default: a temporary one")
    options = parser.parse_args()
    found = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(Path(folder), layers))
            maker.start()  # in a process of its own, whose memory is free again for the training
            maker.join()
            if maker.exitcode:
                sys.exit(1)
            found.append(train(options, Path(folder), layers))
    few, more = found
    print("\n| layers | weights of a rank | optimizer states | peak of a rank | seconds of a step | loss |")
    print("|---|---|---|---|---|---|")
    for layers, run in zip(options.layers, found, strict=True):
        print(
            f"| {layers} | {run['weights'] / 2**30:.2f} GiB | {run['optimizer'] / 2**20:.2f} MiB "
            f"| {run['peak'] / 2**30:.2f} GiB | {run['seconds']:.2f} | {run['loss']:.4f} |"
        )
    layer = (more["weights"] - few["weights"]) / (options.layers[1] - options.layers[0])
    left = LAYERS_70B - options.layers[0]
    print(
        f"\nweights of a layer: {layer / 2**30:.3f} GiB on each of {options.ranks} ranks; of {LAYERS_70B} layers: ",
        end="",
    )
    print(
        f"{few['weights'] / 2**30:.2f} + {left} x {layer / 2**30:.3f} = {(few['weights'] + left * layer) / 2**30:.1f} GiB"
    )
    seconds = layer_seconds(LAYER_TOKENS)
    print(f"one layer alone, {LAYER_TOKENS} tokens, forward, recomputed and backward: {seconds:.2f} s; ", end="")
    print(f"{LAYERS_70B} layers: {LAYERS_70B * seconds:.0f} s")


def layer_seconds(tokens: int) -> float:
    """A frozen layer's share of a step with gradient checkpointing, here in this process: median of three."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = json.loads((ROOT / "ksl_ds/data/model_shapes.json").read_text())["llama-3-70b"]
    config = AutoConfig.for_model(**shape, attn_implementation="sdpa")
    with torch.device(device):
        layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
        states_BLD = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        position = LlamaRotaryEmbedding(config)(states_BLD, torch.arange(tokens)[None])
    times = []
    for _ in range(4):
        started = time.perf_counter()
        checkpoint(layer, states_BLD, position_embeddings=position, use_reentrant=False).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def make_inputs(folder: Path, layers: int) -> None:
    """A model folder, a ticket drawn on it and text."""
    import torch
    from helpers.tickets import shifted
    from helpers.tiny import make_tokenizer, write_pairs
    from transformers import AutoConfig, AutoModelForCausalLM

    from ksl_ds import draw_ticket

    shape = json.loads((ROOT / "ksl_ds/data/model_shapes.json").read_text())["llama-3-70b"]
    config = AutoConfig.for_model(
        **{**shape, "num_hidden_layers": layers}, pad_token_id=0, bos_token_id=None, eos_token_id=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    before_VD = model.get_input_embeddings().weight.detach()
    ticket = draw_ticket(before_VD, shifted(before_VD, list(range(3, 3 + ROWS))))
    assert len(ticket) == ROWS
    ticket.save(folder / "ticket", "model.embed_tokens")
    write_pairs(folder / "pairs.jsonl", repeat=10)


def train(options: argparse.Namespace, folder: Path, layers: int) -> dict[str, float]:
    from helpers.processes import free_port

    micro_batch_size = -(-options.pairs // options.ranks)
    recipe = {
        "run_dir": "run",
        "deepspeed": "zero3_70b.json",
        "method": "ticket",
        "ticket": "ticket",
        "model": {"path": "model"},
        "text": {"train": "pairs.jsonl", "test": "pairs.jsonl", "max_test_pairs": options.ranks},
        "training": {
            "batch_size": options.pairs,
            "micro_batch_size": micro_batch_size,
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
        "partial_tuning": {"learning_rate": 1e-2, "max_steps": STEPS, "mode": "rows"},
        "evaluation": {"max_new_tokens": 1, "gather_weights": False},
        "tracking": {"wandb": "off"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    ended = subprocess.run(
        [
            "deepspeed",
            "--num_accelerators",
            str(options.ranks),
            "--master_port",
            str(free_port()),
            "--module",
            "ksl_ds",
            "tune",
            "recipe.yaml",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if ended.returncode:
        sys.exit(f"{layers} layers: the training failed")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    stage = json.loads((folder / "run/results.json").read_text())["stages"]["partial_tuning"]
    weights = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    return {
        "weights": weights / options.ranks,
        "optimizer": stage["optimizer_bytes"],
        "peak": stage["peak_memory_bytes"],
        "seconds": (steps[-1]["time"] - steps[0]["time"]) / (STEPS - 1),
        "loss": steps[-1]["loss"],
    }


if __name__ == "__main__":
    main()
