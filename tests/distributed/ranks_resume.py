"""Run by test_resume.py on several ranks: a stopped training run resumes with the losses of an uninterrupted one.

SIGTERM reaches one rank in the midst of a step; every method, with weight decay, accumulation and dropout.
"""

import fcntl
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.cases import run_cases
from helpers.runs import prepare_job
from helpers.states import whole_state
from safetensors.torch import load_file, save_file

from ksl_ds import distributed, draw_ticket
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import Interrupted, UserError
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.report.tracking import Tracker
from ksl_ds.sharding.states import OptimizerState

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


def prepare(folder: Path) -> None:
    """The job's folder with a DeepSpeed JSON of stage 0."""
    prepare_job(folder)
    (folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')


COMMON = ["training.batch_size=8", "text.max_test_pairs=2", "evaluation.max_new_tokens=2", "text.valid=[]"]
ROWS = ["method=ticket", "ticket=ticket", "partial_tuning.weight_decay=0.1"]
FULL = ["method=full", "full_tuning.learning_rate=0.01"]
METHODS = {
    "embed": ("embed_tuning", ["embed_tuning.weight_decay=0.1", "draw.every=2", "draw.alpha=0.9"]),
    "rows": ("partial_tuning", ROWS),
    "hooks": ("partial_tuning", [*ROWS, "partial_tuning.mode=hooks"]),
    "rows, stage 2, bf16": ("partial_tuning", [*ROWS, "deepspeed=zero2.json", "training.precision=bf16"]),
    "hooks, bf16": ("partial_tuning", [*ROWS, "partial_tuning.mode=hooks", "training.precision=bf16"]),
    "full": ("full_tuning", FULL),
    "full, stage 2, bf16": ("full_tuning", [*FULL, "deepspeed=zero2.json", "training.precision=bf16"]),
    "full, stage 0, bf16": ("full_tuning", [*FULL, "deepspeed=zero0.json", "training.precision=bf16"]),
    "full, packed": ("full_tuning", [*FULL, "training.packing=prefix"]),
    "lora": ("lora", ["method=lora", "lora.learning_rate=0.01", "lora.lora_dropout=0.2"]),
    "prefix": ("prefix_tuning", ["method=prefix", "prefix.learning_rate=0.05", "prefix.num_virtual_tokens=4"]),
}

save = OptimizerState.save


def save_and_keep(state: OptimizerState, folder: Path) -> list[Path]:
    """Keeps the whole state beside the checkpoint, for ranks_elastic.py."""
    whole = whole_state(state._engine)
    if distributed.is_rank0():
        save_file(whole, f"{folder.parents[2].name}, step {int(folder.name[-8:])}.safetensors")
    return save(state, folder)


OptimizerState.save = save_and_keep  # type: ignore[method-assign]
COMMON += [f"{name}.max_steps={STEPS}" for name in ("embed_tuning", "partial_tuning", "full_tuning", "lora", "prefix")]


def resume(name: str) -> None:
    """A run that is stopped after step 4 and resumed has the losses, the scores and the rows of one that was not."""
    stage, words = METHODS[name]
    if stage == "partial_tuning":
        make_ticket()
    whole, parts = f"{name} whole", f"{name} parts"
    train(whole, *words)
    train(parts, *words, stopped=True)
    if distributed.is_rank0():
        shutil.copytree(parts, f"{name} stopped")  # for ranks_elastic.py
    kept = sorted(path.name for path in Path(parts, "checkpoints", f"{stage}_steps").iterdir())
    assert kept == [f"step-{ENDS_AFTER:08d}"], kept
    if distributed.is_rank0():
        with Path(parts, "metrics.jsonl").open("a") as file:  # as if it had been logged after the checkpoint, and torn
            file.write(json.dumps({"stage": stage, "step": 5, "loss": 0.0}) + '\n{"stage": "' + stage)
    distributed.barrier()
    train(parts, *words, "resume=auto")
    assert len(lines(whole, stage)) == STEPS
    assert lines(parts, stage) == lines(whole, stage), (lines(parts, stage), lines(whole, stage))
    results = [json.loads(Path(folder, "results.json").read_text()) for folder in (whole, parts)]
    losses = [result["stages"][stage]["test_loss"] for result in results]
    assert losses[0] == losses[1], losses
    assert results[1]["resumed"][0]["step"] == ENDS_AFTER
    assert not Path(parts, "checkpoints", f"{stage}_steps").exists()
    stage_of_whole = results[0]["stages"][stage]
    assert stage_of_whole["tuned_file_bytes"] > 0 and stage_of_whole["optimizer_bytes"] > 0
    if stage == "partial_tuning":
        rows = [Ticket.load(Path(folder, "ticket")).rows_KD for folder in (whole, parts)]
        assert torch.equal(*rows)


def make_ticket() -> None:
    """The ticket of some rows, moved, that the cases of a ticket train."""
    if distributed.is_rank0() and not Path("ticket").exists():
        base_VD = load_file("model/model.safetensors")["model.embed_tokens.weight"]
        draw_ticket(base_VD, base_VD + 0.5 * torch.eye(*base_VD.shape), selection="top_k", top_k=9).save(
            Path("ticket"), "model.embed_tokens"
        )
    distributed.barrier()


def finished_run() -> str:
    """The folder of a finished training of a ticket's rows."""
    make_ticket()
    if distributed.run_on_rank0(lambda: not Path("finished").exists()):
        train("finished", *ROWS)
    return "finished"


def complete() -> None:
    """A run that is complete has nothing left to do, and stays as it is."""
    folder = finished_run()
    before = json.loads(Path(folder, "results.json").read_text())
    train(folder, *ROWS, "resume=auto")
    after = json.loads(Path(folder, "results.json").read_text())
    assert after["stages"] == before["stages"]


def mistakes() -> None:
    """What resume=auto cannot resume, in a sentence on every rank."""
    folder = finished_run()
    expected_of = {
        (f"run_dir={folder}",): ["already holds a run", "resume=auto"],
        (f"run_dir={folder}", "resume=auto", "training.max_grad_norm=2"): ["training.max_grad_norm=1.0", "2.0"],
        ("run_dir=model", "resume=auto"): ["model", "recipe.yaml"],
        (f"run_dir={folder}", "resume=auto", "text.train=other.jsonl"): ["text.train"],
    }
    if distributed.is_rank0():
        Path("other.jsonl").write_text(Path("pairs.jsonl").read_text())
    distributed.barrier()
    for overrides, expected in expected_of.items():
        try:
            tune.main(load_recipe(Recipe, "recipe.yaml", [*COMMON, *ROWS, *overrides]))
        except UserError as error:
            message = str(error)
        else:
            message = "no error"
        assert len(set(distributed.gather_objects(message))) == 1
        assert all(word in message for word in expected), (overrides, message)


def in_use() -> None:
    """A folder in which another run is at work."""
    folder = finished_run()
    with Path(folder, ".lock").open("w") as lock:
        if distributed.is_rank0():
            fcntl.flock(lock, fcntl.LOCK_EX)
        distributed.barrier()
        with pytest.raises(UserError, match="in use by another run"):
            train(folder, *ROWS, "resume=auto")


def changed_text() -> None:
    """The same file with other sentences in it."""
    make_ticket()
    if distributed.is_rank0():
        shutil.copy("pairs.jsonl", "changing.jsonl")
    distributed.barrier()
    words = [*ROWS, "text.train=changing.jsonl"]
    train("text parts", *words, stopped=True)
    if distributed.is_rank0():
        first, *others = Path("changing.jsonl").read_text().splitlines(keepends=True)
        Path("changing.jsonl").write_text("".join([*others, first.replace("cat", "dog")]))
    distributed.barrier()
    with pytest.raises(UserError, match=r"text.train \(changing.jsonl\) has changed"):
        train("text parts", *words, "resume=auto")


CASES = {name: partial(resume, name) for name in METHODS} | {
    "complete": complete,
    "mistakes": mistakes,
    "in use": in_use,
    "changed text": changed_text,
}
if __name__ == "__main__":
    run_cases(CASES)
