"""Run by test_resume.py on several ranks: a stopped training run resumes with the losses of an uninterrupted one.

SIGTERM reaches one rank in the midst of a step; every method, with weight decay, accumulation and dropout.
"""

import fcntl
import json
import signal
from pathlib import Path

import torch

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import Interrupted, UserError
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.report.tracking import Tracker
from ksl_ds.sharding.engine import set_library_verbosity

distributed.initialize()
set_library_verbosity(False)
STEPS, ENDS_AFTER = 6, 4
log = Tracker.log


def log_and_signal(tracker: Tracker, stage: str, step: int, **numbers: float) -> None:
    log(tracker, stage, step, **numbers)
    if step == ENDS_AFTER - 1 and distributed.rank() == distributed.world_size() - 1:
        signal.raise_signal(signal.SIGTERM)  # the step after this log is still done


def train(run_dir: str, *words: str, stopped: bool = False) -> None:
    Tracker.log = log_and_signal if stopped else log  # type: ignore[method-assign]
    words = (f"run_dir={run_dir}", *words)
    try:
        tune.main(load_recipe(Recipe, "recipe.yaml", [*COMMON, *words]))
        assert not stopped, words
    except Interrupted as interruption:
        assert stopped and f"step {ENDS_AFTER} of {STEPS}" in str(interruption), words


def lines(run_dir: str, stage: str) -> list[tuple[float, ...]]:
    entries = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "learning_rate", "gradient_norm")
    return [tuple(entry[name] for name in names) for entry in entries if entry["stage"] == stage and "loss" in entry]


COMMON = ["training.batch_size=8", "text.max_test_pairs=2", "evaluation.max_new_tokens=2", "text.valid=[]"]
ROWS = ["method=ticket", "ticket=ticket", "partial_tuning.weight_decay=0.1"]
CASES = {
    "embed": ("embed_tuning", ["embed_tuning.weight_decay=0.1", "draw.every=2", "draw.alpha=0.9"]),
    "rows": ("partial_tuning", ROWS),
    "hooks": ("partial_tuning", [*ROWS, "partial_tuning.mode=hooks"]),
    "rows, stage 2, bf16": ("partial_tuning", [*ROWS, "deepspeed=zero2.json", "training.precision=bf16"]),
    "hooks, bf16": ("partial_tuning", [*ROWS, "partial_tuning.mode=hooks", "training.precision=bf16"]),
    "full": ("full_tuning", ["method=full", "full_tuning.learning_rate=0.01"]),
    "lora": ("lora", ["method=lora", "lora.learning_rate=0.01", "lora.lora_dropout=0.2"]),
    "prefix": ("prefix_tuning", ["method=prefix", "prefix.learning_rate=0.05", "prefix.num_virtual_tokens=4"]),
}
COMMON += [f"{name}.max_steps={STEPS}" for name in ("embed_tuning", "partial_tuning", "full_tuning", "lora", "prefix")]

for name, (stage, words) in CASES.items():
    whole, parts = f"{name} whole", f"{name} parts"
    train(whole, *words)
    train(parts, *words, stopped=True)
    kept = sorted(path.name for path in Path(parts, "checkpoints", f"{stage}_steps").iterdir())
    assert kept == [f"step-{ENDS_AFTER:08d}"], kept
    if distributed.is_rank0():
        with Path(parts, "metrics.jsonl").open("a") as file:  # as if it had been logged after the checkpoint, and torn
            file.write(json.dumps({"stage": stage, "step": 5, "loss": 0.0}) + '\n{"stage": "' + stage)
    distributed.barrier()
    train(parts, *words, "resume=auto")
    assert len(lines(whole, stage)) == STEPS
    assert lines(parts, stage) == lines(whole, stage), (name, lines(parts, stage), lines(whole, stage))
    results = [json.loads(Path(folder, "results.json").read_text()) for folder in (whole, parts)]
    losses = [result["stages"][stage]["test_loss"] for result in results]
    assert losses[0] == losses[1], (name, losses)
    assert results[1]["resumed"][0]["step"] == ENDS_AFTER
    assert not Path(parts, "checkpoints", f"{stage}_steps").exists()
    stage_of_whole = results[0]["stages"][stage]
    assert stage_of_whole["tuned_file_bytes"] > 0 and stage_of_whole["optimizer_bytes"] > 0
    if name == "embed":
        distributed.barrier()
        if distributed.is_rank0():  # the ticket that all later cases train
            Path(whole, "checkpoints", "partial_transfer").rename("ticket")
        distributed.barrier()
    elif stage == "partial_tuning":
        rows = [Ticket.load(Path(folder, "ticket")).rows_KD for folder in (whole, parts)]
        assert torch.equal(*rows), name

# A run that is complete has nothing left to do, and stays as it is.
before = Path("rows parts", "results.json").read_text()
train("rows parts", *ROWS, "resume=auto")
after = json.loads(Path("rows parts", "results.json").read_text())
assert after["stages"] == json.loads(before)["stages"]

# What resume=auto cannot resume, in a sentence on every rank.
MISTAKES = {
    ("run_dir=rows parts",): ["already holds a run", "resume=auto"],
    ("run_dir=rows parts", "resume=auto", "training.max_grad_norm=2"): ["training.max_grad_norm=1.0", "2.0"],
    ("run_dir=model", "resume=auto"): ["model", "recipe.yaml"],
    ("run_dir=rows parts", "resume=auto", "text.train=other.jsonl"): ["text.train"],
}
if distributed.is_rank0():
    Path("other.jsonl").write_text(Path("pairs.jsonl").read_text())
distributed.barrier()
for overrides, expected in MISTAKES.items():
    try:
        tune.main(load_recipe(Recipe, "recipe.yaml", [*COMMON, *ROWS, *overrides]))
    except UserError as error:
        message = str(error)
    else:
        message = "no error"
    assert len(set(distributed.gather_objects(message))) == 1
    assert all(word in message for word in expected), (overrides, message)

# A folder in which another run is at work.
with Path("rows parts", ".lock").open("w") as lock:
    if distributed.is_rank0():
        fcntl.flock(lock, fcntl.LOCK_EX)
    distributed.barrier()
    try:
        train("rows parts", *ROWS, "resume=auto")
        raise AssertionError("the lock was not noticed")
    except UserError as error:
        assert "in use by another run" in str(error), error

# The same file with other sentences in it.
train("text parts", *CASES["rows"][1], stopped=True)
if distributed.is_rank0():
    first, *others = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join([*others, first.replace("cat", "dog")]))
distributed.barrier()
try:
    train("text parts", *CASES["rows"][1], "resume=auto")
    raise AssertionError("the changed text was not noticed")
except UserError as error:
    assert "text.train (pairs.jsonl) has changed" in str(error), error
distributed.shutdown()
