"""An error that nobody foresaw, on all ranks of a job or on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.processes import launch
from helpers.runs import prepare_inputs

RECIPE = """
run_dir: run
method: embed
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 2}
training: {batch_size: 4, micro_batch_size: 2, precision: fp32}
embed_tuning: {learning_rate: 0.1, max_steps: 4}
evaluation: {max_new_tokens: 2}
tracking: {wandb: "off"}
"""


@pytest.mark.parametrize(("failing", "speaker"), [("0 1", 0), ("1", 1)])
def test_fault_something_that_nobody_foresaw(failing, speaker, tmp_path):
    """One line of the job, not forty of each rank; each failing rank leaves its traceback in the run folder."""
    prepare_inputs(tmp_path, RECIPE)
    script = Path(__file__).parent / "ranks_failing.py"
    done = launch(2, script, "tune", "recipe.yaml", cwd=tmp_path, FAILING=failing)
    assert done.returncode in (1, 3), done.stderr  # 3: the other rank has noticed before the launcher ended it
    said = [line for line in done.stderr.splitlines() if "nobody foresaw" in line]
    assert len(said) == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    # rank 0's progress bar may stand in front
    assert f"ksl-ds: tune failed in stage embed_tuning, rank {speaker} on " in said[0]
    assert said[0].endswith(f"ZeroDivisionError: nobody foresaw this (traceback in run/error-rank-{speaker}.txt)")
    assert "in train" in (tmp_path / f"run/error-rank-{speaker}.txt").read_text()
    # The launcher may end the other rank before it has written its own.
    files = {file.name for file in (tmp_path / "run").glob("error*")}
    assert files <= {f"error-rank-{rank}.txt" for rank in failing.split()}
