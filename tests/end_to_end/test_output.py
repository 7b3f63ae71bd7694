"""A job whose output nobody reads any more: a closed ssh connection, a pipe whose reader is gone."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
from helpers.processes import ENVIRONMENT, HANG_SECONDS, run
from helpers.tiny import make_model_folder, write_pairs

RECIPE = """
run_dir: run
method: embed
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 2}
training: {batch_size: 4, micro_batch_size: 4, precision: fp32}
embed_tuning: {learning_rate: 0.1, max_steps: 30}
evaluation: {max_new_tokens: 4}
tracking: {wandb: "off"}
"""


def test_fault_nobody_reads_the_output_any_more(tmp_path):
    make_model_folder(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    metrics = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(
        ["ksl-ds", "tune", "recipe.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as job:
        deadline = time.monotonic() + HANG_SECONDS
        while not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.01)
        assert job.stdout is not None and job.stderr is not None
        job.stdout.close()
        job.stderr.close()
        assert job.wait(timeout=HANG_SECONDS) == 0
    steps = [line for line in metrics.read_text().splitlines() if '"learning_rate"' in line]
    assert len(steps) == 30
    assert json.loads((tmp_path / "run/results.json").read_text())["stages"]["embed_tuning"]["steps"] == 30


@pytest.mark.parametrize("output", ["> /dev/full 2>&1", ">&- 2>&-", "<&- >&- 2> /dev/full"])
def test_fault_there_is_no_output(output, tmp_path):
    make_model_folder(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = run("bash", "-c", f"ksl-ds tune recipe.yaml embed_tuning.max_steps=2 {output}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout + done.stderr == ""
    assert json.loads((tmp_path / "run/results.json").read_text())["stages"]["embed_tuning"]["steps"] == 2
