"""Run by test_resume.py on several ranks, in a small file system: damaged checkpoints, and a full disk."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import file_sha256
from ksl_ds.report.tracking import Tracker
from ksl_ds.sharding.checkpoint import MANIFEST, Checkpoints
from ksl_ds.sharding.engine import set_library_verbosity

distributed.initialize()
set_library_verbosity(False)
log = Tracker.log
WORDS = ["text.max_test_pairs=2", "evaluation.max_new_tokens=2", "text.valid=[]", "checkpoint.every=2"]


class Stopped(Exception):
    """The end that a test gives to a run."""


def train(run_dir: str, *words: str, after_log=None) -> str:
    """Embed tuning; returns the sentence that ended it, or ""."""

    def logged(tracker, stage, step, **numbers):
        log(tracker, stage, step, **numbers)
        if after_log is not None and stage == "embed_tuning":
            after_log(step)

    Tracker.log = logged
    try:
        tune.main(load_recipe(Recipe, "recipe.yaml", [*WORDS, f"run_dir={run_dir}", *words]))
    except UserError as error:
        message = str(error)
        assert len(set(distributed.gather_objects(message))) == 1, message
        return message
    except Stopped:
        return "stopped"
    return ""


def stop_after(last: int):
    def stop(step: int) -> None:
        if step == last:
            raise Stopped

    return stop


def losses(run_dir: str) -> list[float]:
    entries = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["stage"] == "embed_tuning" and "loss" in entry]


def steps(run_dir: str) -> list[str]:
    return sorted(path.name for path in Path(run_dir, "checkpoints/embed_tuning_steps").glob("step-*"))


assert train("whole") == ""

# Six steps, stopped in the fifth: checkpoints of steps 2 and 4. The newest is damaged in four ways; the previous one loads.
assert train("parts", after_log=stop_after(5)) == "stopped"
assert steps("parts") == ["step-00000002", "step-00000004"]
PIECES = "state-00001-00000.safetensors"


def truncate(folder: Path) -> None:
    os.truncate(folder / PIECES, (folder / PIECES).stat().st_size // 2)


def flip(folder: Path) -> None:
    content = bytearray((folder / "rank-00001.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "rank-00001.safetensors").write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


for damage in (truncate, flip, lose, break_manifest):
    copy = damage.__name__
    if distributed.is_rank0():
        shutil.copytree("parts", copy)
        damage(Path(copy, "checkpoints/embed_tuning_steps/step-00000004"))
    distributed.barrier()
    assert train(copy, "resume=auto") == ""
    assert losses(copy) == losses("whole"), copy
    assert json.loads(Path(copy, "results.json").read_text())["resumed"][0]["step"] == 2

# A pickle that would run a command, other keys, another model's names: each with a manifest that vouches for it.


class Command:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Command()))


def other_names(path: Path) -> None:
    save_file({key.replace("embed_tokens", "wte"): value for key, value in load_file(path).items()}, path)


def no_kind(path: Path) -> None:
    save_file({key.replace("/", "."): value for key, value in load_file(path).items()}, path)


for edit, said in (
    (pickled, "was not written by ksl_ds"),
    (no_kind, "was not written by ksl_ds"),
    (other_names, "is a checkpoint of other parameters"),
):
    copy = edit.__name__
    folder = Path(copy, "checkpoints/embed_tuning_steps/step-00000004")
    if distributed.is_rank0():
        shutil.copytree("parts", copy)
        edit(folder / PIECES)
        digests = json.loads((folder / MANIFEST).read_text())
        digests[PIECES] = [(folder / PIECES).stat().st_size, file_sha256(folder / PIECES)]
        (folder / MANIFEST).write_text(json.dumps(digests))
    distributed.barrier()
    message = train(copy, "resume=auto")
    assert said in message and str(folder) in message, message
    assert not Path("executed").exists()

# A checkpoint of a version of ksl_ds that kept DeepSpeed's files.
if distributed.is_rank0():
    shutil.copytree("parts", "old")
    folder = Path("old/checkpoints/embed_tuning_steps/step-00000004")
    (folder / "schedule.json").unlink()
    digests = json.loads((folder / MANIFEST).read_text())
    del digests["schedule.json"]
    (folder / MANIFEST).write_text(json.dumps(digests))
distributed.barrier()
assert "written by an earlier version of ksl_ds" in train("old", "resume=auto")

# The disk fills up. Once it is noticed beforehand, once only by the write itself.
for notices in (True, False):
    run_dir, filler = ("full", Path("filler"))

    def fill(step: int, filler: Path = filler) -> None:
        if step == 3 and distributed.is_rank0():
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        distributed.barrier()

    check_space = Checkpoints._check_space
    if not notices:
        Checkpoints._check_space = lambda *arguments: None
    message = train(run_dir, after_log=fill)
    Checkpoints._check_space = check_space
    assert "checkpoint of step 4 cannot be written" in message and "step-00000002" in message, message
    distributed.barrier()
    if distributed.is_rank0():
        filler.unlink()
    distributed.barrier()
    assert steps(run_dir) == ["step-00000002"]
    assert train(run_dir, "resume=auto") == ""
    assert losses(run_dir) == losses("whole")
    distributed.barrier()
    if distributed.is_rank0():
        shutil.rmtree(run_dir)
    distributed.barrier()
distributed.shutdown()
