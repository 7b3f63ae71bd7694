"""Training throughput: our loop beside Hugging Face's Trainer, same DeepSpeed config, model, text, batches and seed.

    python tests/benchmarks/bench_train.py                       # a random Llama, made-up sentences
    python tests/benchmarks/bench_train.py --model models/smollm2-135m-instruct --train data/plone-en-fr/train.jsonl

Full or embed tuning, which both train in the same way. Sides take turns, each a job of the deepspeed launcher:

    ours            the loop of `ksl-ds tune`: packed micro-batches that compute the shared beginning of prompts once
    ours, padded    the same with training.packing=off: micro-batches of like lengths, logits from the first response on
    Trainer         the same examples in every batch, micro-batches as accelerate deals them out
    Trainer, groups train_sampling_strategy=group_by_length, batches of its own

A token is one of prompt or response, never padding. Time is the process time of rank 0 on CPUs, so that other work on the
machine counts little, and wall-clock time on a GPU; memory is the peak of rank 0's GPU. A job's throughput is that of the
steps after the warm-up; figures are medians of the jobs, ratios are of the same round. The losses of all sides but the last
must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIDES = ("ours", "ours, padded", "Trainer", "Trainer, groups")
SEED = 0
Steps = tuple[list[float], list[int], list[float]]  # the clock at each step's end, its tokens, its loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; default: a random Llama")
    parser.add_argument("--width", type=int, default=384, help="of the random Llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--train", help="JSON lines with source and target; default: made-up sentences")
    parser.add_argument("--max-words", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--method", choices=["full", "embed"], default="full")
    parser.add_argument("--deepspeed", default="zero3.json")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="Trainer is one of them")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # on a rank
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.side:
        on_a_rank(options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            take_turns(options, Path(folder))


def take_turns(options: argparse.Namespace, folder: Path) -> None:
    if options.model is None:
        import torch
        from helpers.tiny import make_model_folder

        heads = options.width // 64
        sizes = {
            "vocab_size": options.vocab,
            "hidden_size": options.width,
            "intermediate_size": -(-options.width * 8 // (3 * 256)) * 256,
            "num_hidden_layers": options.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
        }
        dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
        options.model = str(make_model_folder(folder / "model", dtype=dtype, **sizes))
    options.train = options.train or str(made_up_text(folder / "train.jsonl"))
    write_recipe(options, folder)
    padding(load(folder), options)
    rates: dict[str, list[float]] = {side: [] for side in options.sides}
    losses: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for number in range(options.rounds):
        for side in options.sides:
            result = start_job(options, side, folder / f"{side}-{number}")
            rates[side].append(result["tokens_per_second"])
            losses[side] = result["losses"]
            memory[side] = result["peak_bytes"] / 2**30
            print(f"round {number + 1}, {side}: {result['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    print("\n| side | tokens/s | of Trainer's | GPU memory, GiB | loss of the last step |")
    print("|---|---|---|---|---|")
    for side in options.sides:
        ratio = median(rate / other for rate, other in zip(rates[side], rates["Trainer"], strict=True))
        gigabytes = f"{memory[side]:.2f}" if memory[side] else "–"
        print(f"| {side} | {median(rates[side]):.0f} | {ratio:.2f} | {gigabytes} | {losses[side][-1]:.6f} |")
    compared = np.array([losses[side] for side in options.sides if side != "Trainer, groups"])
    spread = (np.ptp(compared, axis=0) / compared[0]).max()
    print(f"\nlargest relative difference of a step's loss, sides with the same batches: {spread:.1e}")


def made_up_text(path: Path) -> Path:
    """2,000 pairs whose lengths spread as those of user interfaces and documentation do."""
    generator = np.random.default_rng(SEED)
    letters = list("abcdefghijklmnopqrstuvwxyz")

    def sentence() -> str:
        return " ".join(generator.choice(letters, size=1 + int(generator.lognormal(2.2, 0.8))))

    lines = [json.dumps({"source": sentence(), "target": sentence()}) for _ in range(2000)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_recipe(options: argparse.Namespace, folder: Path) -> None:
    text = json.dumps(  # YAML too
        {
            "run_dir": str(folder / "run"),
            "seed": SEED,
            "deepspeed": options.deepspeed,
            "method": options.method,
            "model": {
                "path": options.model,
                "embedding_scope": "shared",
            },  # a tied head stays tied, as the Trainer leaves it
            "text": {
                "train": options.train,
                "test": options.train,
                "source_language": "English",
                "target_language": "French",
                "prompt": "plain",
                "max_words": options.max_words,
                "max_test_pairs": 2,
            },
            "training": {
                "batch_size": options.batch_size,
                "micro_batch_size": options.micro_batch_size,
                "precision": options.precision,
                "max_grad_norm": 1.0,
                "log_every": 1,
            },
            f"{options.method}_tuning": {
                "learning_rate": 1e-4,
                "max_steps": options.steps,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
            },
            "evaluation": {"max_new_tokens": 1},
            "tracking": {"wandb": "off"},
        }
    )
    (folder / "recipe.yaml").write_text(text)


def encoded(recipe: Any) -> list[Any]:
    """The recipe's training examples."""
    from transformers import AutoTokenizer

    from ksl_ds.text.batches import encode_corpus
    from ksl_ds.text.corpus import load_corpus
    from ksl_ds.text.prompt import Prompt

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    prompt = Prompt(recipe.text.prompt, recipe.text.source_language, recipe.text.target_language, tokenizer)
    return encode_corpus(load_corpus(recipe.text, "train", recipe.text_seed), prompt, recipe.text.max_length)[0]


def padding(recipe: Any, options: argparse.Namespace) -> None:
    """Prints how many positions are computed padded and packed, and how much of the text all prompts share."""
    from transformers import AutoConfig

    from ksl_ds.text.batches import BatchOrder
    from ksl_ds.text.packing import Packing

    examples = encoded(recipe)
    width = AutoConfig.from_pretrained(recipe.model.path).hidden_size
    order = BatchOrder(len(examples), options.batch_size, SEED)
    batches = [order.batch(step) for step in range(order.steps_per_epoch)]
    tokens = sum(map(len, examples))
    for name, packing in (("padded", Packing()), ("packed", Packing("prefix", width))):
        computed = 0
        for batch in batches:
            for rank in range(options.ranks):
                cut = packing.micro_batches(examples, batch, rank, options.ranks, options.micro_batch_size)
                for micro in cut[0]:
                    collated = packing.collate([examples[index] for index in micro], 0, packed=cut[1])
                    computed += collated["input_ids"].numel()
        print(f"positions computed for each token of an epoch, micro-batches {name}: {computed / tokens:.2f}")
    columns = zip(*(example.prompt_ids for example in examples), strict=False)
    shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), 0)
    print(
        f"tokens at the beginning that all prompts share: {shared}, {shared * len(examples) / tokens:.0%} of the text"
    )


def load(folder: Path) -> Any:
    from ksl_ds.config.load import load_recipe
    from ksl_ds.config.schema import Recipe

    return load_recipe(Recipe, str(folder / "recipe.yaml"), [])


def start_job(options: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    from helpers.processes import free_port

    folder.mkdir()
    write_recipe(options, folder)
    passed = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(options).items()
        if value is not None and name != "sides"
    ]
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(options.ranks),
        "--master_port",
        str(free_port()),
        __file__,
        *passed,
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*command, f"--side={side}", f"--out={folder}"],
        env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        sys.exit(f"{side} failed:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def on_a_rank(options: argparse.Namespace) -> None:
    run: Callable[[], Steps]
    if options.side.startswith("ours"):
        run = partial(ours, options, "off" if options.side.endswith("padded") else "auto")
    else:
        run = partial(trainer, options, options.side.endswith("groups"))
    ends, tokens, losses = run()
    if os.environ["RANK"] == "0":
        import torch

        first = options.warm_up
        result = {
            "tokens_per_second": sum(tokens[first:]) / (ends[-1] - ends[first - 1]),
            "losses": losses,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
        (options.out / "result.json").write_text(json.dumps(result))


def clock() -> float:
    """Seconds of process time; on a GPU those of the wall clock, when its work is done."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ours(options: argparse.Namespace, packing: str) -> Steps:
    from ksl_ds import cli
    from ksl_ds.text.batches import BatchOrder
    from ksl_ds.training import loop

    ends: list[float] = []
    step_of_loop = loop.train_step

    def timed(*arguments: Any) -> tuple[float, bool]:
        outcome = step_of_loop(*arguments)
        ends.append(clock())
        return outcome

    loop.train_step = timed
    if cli.main(["tune", str(options.out / "recipe.yaml"), f"training.packing={packing}"]):
        sys.exit(1)
    lines = [json.loads(line) for line in (options.out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    examples = encoded(load(options.out))
    order = BatchOrder(len(examples), options.batch_size, SEED)
    tokens = [sum(len(examples[index]) for index in order.batch(step)) for step in range(options.steps)]
    return ends, tokens, [line["loss"] for line in steps]


def trainer(options: argparse.Namespace, grouped: bool) -> Steps:
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from ksl_ds import distributed
    from ksl_ds.sharding.engine import read_config
    from ksl_ds.text.batches import BatchOrder, collate_training

    distributed.initialize()  # without DeepSpeed's compiled shared-memory operator, as ours runs
    recipe = load(options.out)
    tuning = getattr(recipe, f"{options.method}_tuning")
    examples = encoded(recipe)
    order = BatchOrder(len(examples), options.batch_size, SEED)
    indices = [index for step in range(options.steps) for index in order.batch(step)]
    ends: list[float] = []
    seen: list[int] = [0]  # tokens of this rank up to the end of each step

    class CountingTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **others: Any) -> Any:
            seen[-1] += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *arguments, **others)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            ends.append(clock())
            seen.append(seen[-1])

    config = read_config(options.deepspeed)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config[name] = "auto"
    config |= {"bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // (options.micro_batch_size * options.ranks),
        max_steps=options.steps,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=tuning.betas[0],
        adam_beta2=tuning.betas[1],
        adam_epsilon=tuning.epsilon,
        max_grad_norm=1.0,
        seed=SEED,
        bf16=options.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        remove_unused_columns=False,
        deepspeed=config,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.method == "embed":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    # group_by_length reads the lengths of input_ids.
    text = [{"example": examples[index], "input_ids": [0] * len(examples[index])} for index in indices]
    pad_id = 0 if model.config.pad_token_id is None else model.config.pad_token_id
    job = CountingTrainer(
        model,
        arguments,
        train_dataset=text,  # type: ignore[arg-type]
        data_collator=lambda rows: collate_training([row["example"] for row in rows], pad_id),
        callbacks=[Clock()],
    )
    job.train()
    tokens = torch.tensor([0, *seen[:-1]], device=arguments.device).diff()
    dist.all_reduce(tokens)
    return ends, tokens.tolist(), [line["loss"] for line in job.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
