"""Parts that start commands as users do: resume, generation, adapters, throughput."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from gpu_check.parts import REPOSITORY, Context, Figures, part

STEPS = 60  # of embed tuning: time to be stopped in
RECIPE = {
    "seed": 3,
    "deepspeed": "zero3.json",
    "model": {"path": "model"},
    "text": {"train": "pairs.jsonl", "test": "pairs.jsonl", "max_test_pairs": 6},
    "training": {"batch_size": 8, "micro_batch_size": 2, "log_every": 1},
    "embed_tuning": {"learning_rate": 1e-2, "max_steps": STEPS},
    "lora": {"max_steps": 4},
    "prefix": {"max_steps": 4},
    "evaluation": {"batch_size": 4, "max_new_tokens": 8},
    "tracking": {"wandb": "off"},
}


def prepare(context: Context) -> Path:
    """The folder that the commands run in, with a tiny model, text and a recipe."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from helpers.tiny import make_model_folder, write_pairs

    folder = context.scratch / "commands"
    if not (folder / "recipe.yaml").exists():
        folder.mkdir(exist_ok=True)
        make_model_folder(folder / "model")
        write_pairs(folder / "pairs.jsonl", repeat=4)
        recipe = RECIPE | {"training": {**RECIPE["training"], "precision": "fp32" if context.rehearse else "bf16"}}  # type: ignore[dict-item]
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
    return folder


def launcher(context: Context) -> list[str]:
    """`deepspeed` on all GPUs of this machine; one process in a rehearsal, as the tests have several."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = ["--num_accelerators", "1"] if context.rehearse else []
    return [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, "--master_port", str(port)]


def start(context: Context, *words: str) -> subprocess.Popen[str]:
    """`ksl-ds WORDS...` in one process: signals reach it, and two starts of Python are saved. `ranks.py` uses the launcher."""
    return subprocess.Popen(
        [sys.executable, "-m", "ksl_ds", *words],
        cwd=prepare(context),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(context: Context, *words: str) -> None:
    """Runs a command; raises where it fails, with the end of its output."""
    finish(start(context, *words))


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, f"{' '.join(map(str, process.args))} failed: {output[-1500:]}"  # type: ignore[arg-type]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("loss") is not None and line["step"] > 0]


WHOLE = ("tune", "recipe.yaml", "run_dir=whole", "method=embed")


def whole_run(context: Context) -> Path:
    """Embed tuning without an interruption, translated with whole weights; run once for all parts that need it."""
    folder = prepare(context)
    if not (folder / "whole" / "results.json").exists():
        command(context, *WHOLE)
    return folder / "whole"


@part("commands", seconds=200)
def resume(context: Context) -> Figures:
    """A training run stopped by SIGTERM resumes with the losses of an uninterrupted one to the bit."""
    folder = prepare(context)
    whole = start(context, *WHOLE)
    # Generation with partitioned weights on the resumed run: the next part compares it.
    words = ("tune", "recipe.yaml", "run_dir=stopped", "method=embed", "resume=auto", "evaluation.gather_weights=false")
    process = start(context, *words)
    metrics = folder / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(losses(folder / "stopped")) >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    steps_before = len(losses(folder / "stopped"))
    command(context, *words)
    finish(whole)
    expected = losses(folder / "whole")
    found = losses(folder / "stopped")
    assert found == expected, f"losses differ: {found} instead of {expected}"
    return {"stopped after step": steps_before, "of": STEPS}


@part("commands", seconds=60)
def generation(context: Context) -> Figures:
    """Translations with gathered and with partitioned weights are the same."""
    name = Path("translations") / "embed_tuning" / "hypotheses.txt"
    gathered = (whole_run(context) / name).read_text()
    partitioned = (prepare(context) / "stopped" / name).read_text()
    assert gathered == partitioned, "translations differ"
    return {"sentences": len(gathered.splitlines())}


@part("commands", seconds=60)
def peft_loads_the_ticket(context: Context) -> Figures:
    """PEFT loads a drawn ticket on the GPU; its logits are those of the model that `transfer` writes."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ksl_ds import cli

    folder = whole_run(context).parent
    base = folder / "model"
    tuned = folder / "whole" / "checkpoints" / "embed_tuning"
    drawn = cli.main(
        ["draw", f"before={base}", f"after={tuned}", f"out={folder / 'ticket'}", "selection=top_k", "top_k=9"]
    )
    written = cli.main(["transfer", f"base={base}", f"ticket={folder / 'ticket'}", f"out={folder / 'transferred'}"])
    assert drawn == written == 0, "draw or transfer failed"
    models = [AutoModelForCausalLM.from_pretrained(path).to(context.device) for path in (base, folder / "transferred")]
    adapted = PeftModel.from_pretrained(models[0], str(folder / "ticket")).to(context.device)
    ids_BL = torch.arange(3, 43, device=context.device).view(2, 20)
    with torch.no_grad():
        ours_BLV, theirs_BLV = (model(input_ids=ids_BL).logits for model in (models[1], adapted))
    assert torch.equal(ours_BLV, theirs_BLV), f"logits differ by {(ours_BLV - theirs_BLV).abs().max():.1e}"
    return {"rows": 9}


@part("commands", seconds=60)
def lora(context: Context) -> Figures:
    """LoRA trains, is scored and saved."""
    command(context, "tune", "recipe.yaml", "run_dir=lora", "method=lora")
    return {"last loss": losses(prepare(context) / "lora")[-1]}


@part("commands", seconds=60)
def prefix(context: Context) -> Figures:
    """Prefix tuning trains, is scored and saved."""
    command(context, "tune", "recipe.yaml", "run_dir=prefix", "method=prefix")
    return {"last loss": losses(prepare(context) / "prefix")[-1]}


@part("commands", seconds=60, speed=True)
def scan_throughput(context: Context) -> Figures:
    """The KS test of every matrix of two checkpoints, 1.1 billion bf16 weights that all changed: weights/s."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))
    import bench_scan

    from ksl_ds import distributed
    from ksl_ds.model.folder import open_model
    from ksl_ds.scan.checkpoints import open_checkpoints
    from ksl_ds.scan.runner import make_plan, run_scan

    distributed.initialize()
    if context.rehearse:
        before = whole_run(context).parent / "model"
        after = whole_run(context) / "checkpoints" / "embed_tuning"
    else:
        bench_scan.make_model(context.scratch, layers=22)
        before = context.scratch / "before"
        after = context.scratch / "after"
    checkpoints = open_checkpoints(open_model(str(before)), str(after))
    plan = make_plan(*checkpoints, "output")
    weights = sum(tensor.num_rows * tensor.num_samples for tensor in plan.tested)
    seconds = []
    for _ in range(2):  # the first one reads the files into memory
        started = time.perf_counter()
        run_scan(*checkpoints, plan)
        seconds.append(time.perf_counter() - started)
    return {"weights": weights, "million weights/s": weights / seconds[-1] / 1e6}


@part("commands", seconds=60, speed=True)
def translation_throughput(context: Context) -> Figures:
    """Translated tokens/s of greedy search with a random Llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ksl_ds import distributed
    from ksl_ds.config.schema import Evaluation
    from ksl_ds.text.translate import translate

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from helpers.tiny import make_tokenizer

    distributed.initialize()
    tokenizer = make_tokenizer()
    width = context.size(2048, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=context.size(128_256, len(tokenizer)),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=context.size(16, 2),
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        pad_token_id=0,
        eos_token_id=2,
    )
    with torch.device(context.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if context.rehearse else torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, len(tokenizer), (length,), generator=generator).tolist()
        for length in torch.randint(10, 40, (context.size(128, 4),), generator=generator).tolist()
    ]
    settings = Evaluation(batch_size=context.size(64, 2), max_new_tokens=context.size(64, 4))
    seconds = 0.0
    tokens = 0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        found = translate(model, tokenizer, prompts, settings, partitioned=False, label="translating")
        seconds = time.perf_counter() - started
        tokens = sum(translation.num_tokens for translation in found)
    return {"tokens/s": tokens / seconds, "batch size": settings.batch_size}


@part("commands", seconds=200, speed=True)
def embed_tuning_throughput(context: Context) -> Figures:
    """Embed tuning of a Llama of 0.9 billion parameters beside Hugging Face's Trainer, same config, text and seed."""
    return training_throughput(context, "embed")


@part("commands", seconds=200, speed=True)
def full_tuning_throughput(context: Context) -> Figures:
    """Full tuning of the same model beside Hugging Face's Trainer."""
    return training_throughput(context, "full")


def training_throughput(context: Context, method: str) -> Figures:
    """Tokens/s and GPU memory of every side of `bench_train.py`."""
    sizes = ["--precision=bf16", "--steps=20", "--warm-up=5", "--batch-size=64", "--micro-batch-size=16"]
    sizes += ["--vocab=128256", "--width=2048", "--layers=8"]
    if context.rehearse:
        sizes = ["--model=model", "--train=pairs.jsonl", "--steps=3", "--batch-size=4", "--micro-batch-size=2"]
        sizes += ["--sides", "ours", "Trainer"]
    script = REPOSITORY / "tests" / "benchmarks" / "bench_train.py"
    done = subprocess.run(
        [sys.executable, script, "--rounds=1", "--ranks=1", f"--method={method}", *sizes],
        cwd=prepare(context),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    rows = re.findall(r"^\| (\S.*?) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", done.stdout, re.MULTILINE)
    assert rows, done.stdout[-1500:]
    figures: Figures = {}
    for side, rate, share, memory, _ in rows:
        figures[f"{side}: tokens/s"] = float(rate)
        figures[f"{side}: of the Trainer's"] = float(share)
        if not context.rehearse:
            figures[f"{side}: GiB"] = float(memory)
    return figures
