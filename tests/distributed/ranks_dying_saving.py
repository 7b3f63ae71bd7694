"""Run by test_resume.py on four ranks, three times: killed as rank 1 writes its part, as rank 0 publishes, and to the end."""

import json
import os
import signal
import sys
from pathlib import Path

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.sharding.checkpoint import Checkpoints
from ksl_ds.sharding.engine import set_library_verbosity
from ksl_ds.sharding.states import OptimizerState

WORDS = ["text.max_test_pairs=2", "evaluation.max_new_tokens=2", "text.valid=[]", "checkpoint.every=2"]
distributed.initialize()
set_library_verbosity(False)
save, publish, time_to_die = OptimizerState.save, Checkpoints._publish, sys.argv[-1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_save(state, folder):
    written = save(state, folder)
    if time_to_die == "writing" and distributed.rank() == 1 and folder.name == ".draft-00000004":
        os.truncate(written[-1], written[-1].stat().st_size // 2)
        die()
    return written


def dying_publish(checkpoints, draft, step, *others):
    def rename(*paths):
        die()

    if time_to_die == "publishing" and step == 4:
        os.rename = rename
    publish(checkpoints, draft, step, *others)


def train(run_dir: str) -> list[float]:
    tune.main(load_recipe(Recipe, "recipe.yaml", [*WORDS, f"run_dir={run_dir}", "resume=auto"]))
    entries = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "learning_rate" in entry]


OptimizerState.save, Checkpoints._publish = dying_save, dying_publish
losses = train("dying")
assert len(losses) == 6 and losses == train("whole")
assert json.loads(Path("dying/results.json").read_text())["resumed"][-1]["step"] == 2
assert not list(Path("dying/checkpoints").glob("**/.draft-*"))
distributed.shutdown()
