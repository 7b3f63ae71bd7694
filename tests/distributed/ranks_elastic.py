"""Run by test_resume.py after ranks_resume.py, on other numbers of ranks: its stopped runs resume there.

The state that is loaded is the saved one to the bit, the losses those of the uninterrupted run on two ranks up to rounding.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.cases import run_cases
from helpers.states import whole_state
from ranks_resume import COMMON, ENDS_AFTER, METHODS, STEPS, lines
from safetensors.torch import load_file

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.sharding.states import OptimizerState

load = OptimizerState.load
loaded = []


def load_and_keep(state: OptimizerState, folder: Path) -> None:
    load(state, folder)
    loaded.append(whole_state(state._engine))


def resume(name: str) -> None:
    """A run that two ranks began."""
    stage, words = METHODS[name]
    ranks = distributed.world_size()
    run_dir = f"{name} on {ranks}"
    if distributed.is_rank0():
        shutil.copytree(f"{name} stopped", run_dir)
    distributed.barrier()
    loaded.clear()
    OptimizerState.load = load_and_keep  # type: ignore[method-assign]
    tune.main(load_recipe(Recipe, "recipe.yaml", [*COMMON, *words, f"run_dir={run_dir}", "resume=auto"]))
    OptimizerState.load = load  # type: ignore[method-assign]
    (state,) = loaded
    saved = load_file(f"{name} parts, step {ENDS_AFTER}.safetensors")
    assert state.keys() == saved.keys() and len(saved) >= 3
    different = [key for key in saved if not torch.equal(saved[key], state[key])]
    assert different == []
    (resumed,) = json.loads(Path(run_dir, "results.json").read_text())["resumed"]
    assert resumed == {"stage": stage, "step": ENDS_AFTER, "ranks": ranks, "ranks_before": 2}
    ours = [line[1] for line in lines(run_dir, stage)]
    theirs = [line[1] for line in lines(f"{name} whole", stage)]
    assert len(ours) == STEPS and ours[:ENDS_AFTER] == theirs[:ENDS_AFTER]
    if name != "lora":  # whose dropout differs
        assert ours == pytest.approx(theirs, rel=2e-2 if "bf16" in name else 1e-5)


LEFT_OUT = ("hooks", "rows, stage 2, bf16", "full, packed")  # for time: no code of their own here
CASES = {name: partial(resume, name) for name in METHODS if name not in LEFT_OUT}
if __name__ == "__main__":
    run_cases(CASES)
