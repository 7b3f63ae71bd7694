"""Runs that were cut off go on: by a signal, a killed rank, a damaged checkpoint, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ranks_elastic
import ranks_resume
from helpers.cases import job_of_cases
from helpers.processes import ENVIRONMENT, HANG_SECONDS, free_port, launch, small_disk, succeeds
from helpers.runs import ZERO3, losses

HERE = Path(__file__).parent


resuming = job_of_cases(ranks_resume, ranks=[2], prepare=ranks_resume.prepare)


elastic = job_of_cases(ranks_elastic, ranks=[1, 3], after="resuming")


@pytest.mark.parametrize("case", ranks_resume.CASES)
def test_every_method_resumes_to_the_bit(case, resuming):
    resuming(case)


@pytest.mark.parametrize("case", ranks_elastic.CASES)
def test_every_method_is_elastic(case, resuming, elastic):
    resuming(case)
    elastic(case)


def test_what_has_changed_since_the_start_is_named(job):
    done = succeeds(launch(2, HERE / "ranks_inputs.py", cwd=job, timeout=500))
    assert done.stderr.count("warning: the run in run recorded no inputs.json") == 1


def test_damaged_checkpoints_and_a_full_disk(job, tmp_path):
    with small_disk(tmp_path / "disk", "24m") as disk:
        for name in ("model", "pairs.jsonl", "recipe.yaml", "ds.json"):
            (shutil.copytree if (job / name).is_dir() else shutil.copy)(job / name, disk / name)
        succeeds(launch(2, HERE / "ranks_damage.py", cwd=disk))


def test_fault_a_rank_is_killed_while_saving(job):
    """Under hpZ, once in each half of it: the checkpoint of step 2 stays, the third start ends as if nothing had happened."""
    zero = {**ZERO3["zero_optimization"], "zero_hpz_partition_size": 2}
    (job / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    steps = job / "dying/checkpoints/embed_tuning_steps"
    for time_to_die in ("writing", "publishing"):
        assert launch(4, HERE / "ranks_dying_saving.py", time_to_die, cwd=job).returncode != 0
        assert sorted(path.name for path in steps.iterdir()) == [".draft-00000004", "step-00000002"]
    succeeds(launch(4, HERE / "ranks_dying_saving.py", "never", cwd=job))


class Job:
    """A lottery that a test watches and harms."""

    def __init__(self, folder: Path, ranks: int, *words: str):
        self.folder = folder
        command = ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), "--module", "ksl_ds"]
        command += ["lottery", "recipe.yaml", "run_dir=run", *LONGER, *words]
        self.process = psutil.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, stage: str, steps: int) -> None:
        """Until so many steps of the stage are logged."""
        ends = time.monotonic() + HANG_SECONDS
        while time.monotonic() < ends and self.process.poll() is None:
            log = self.folder / "run/metrics.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            if sum(f'"{stage}"' in line and '"loss"' in line for line in lines) >= steps:
                return
            time.sleep(0.05)
        self.kill()
        pytest.fail(f"step {steps} of {stage} was not reached\n{self.process.stdout.read()[-4000:]}")

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if any("--local_rank" in w for w in p.cmdline())]

    def end(self) -> str:
        """Waits for the end of all processes and returns what they printed."""
        everybody = self.process.children(recursive=True)
        try:
            out, _ = self.process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail("the job did not end")
        _, alive = psutil.wait_procs(everybody, timeout=HANG_SECONDS)
        assert alive == []
        return out

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


LONGER = ("checkpoint.every=2", "embed_tuning.max_steps=16", "partial_tuning.max_steps=16", "draw.every=4")


def test_a_lottery_survives_kill_and_sigterm(job):
    """SIGKILL of one rank at a random step of embed tuning, SIGTERM to the launcher in partial tuning, the end on one rank."""
    whole = Job(job, 2)
    whole.end()
    assert whole.process.returncode == 0
    (job / "run").rename(job / "whole")

    killed = Job(job, 2)
    killed.wait_for("embed_tuning", random.randint(3, 12))
    killed.ranks()[1].send_signal(signal.SIGKILL)
    killed.end()
    assert killed.process.returncode != 0
    checkpoints = sorted(path.name for path in (job / "run/checkpoints/embed_tuning_steps").glob("step-*"))
    assert 1 <= len(checkpoints) <= 2

    ended = Job(job, 2, "resume=auto")
    ended.wait_for("partial_tuning", 3)
    launcher = next(p for p in ended.process.children() if "deepspeed.launcher.launch" in p.cmdline())
    launcher.send_signal(signal.SIGTERM)
    out = ended.end()
    assert out.count("partial tuning was stopped by a signal after step") == 1, out[-3000:]
    assert "Traceback" not in out
    assert len(list((job / "run/checkpoints/partial_tuning_steps").glob("step-*"))) >= 1

    # The rows' checkpoint is of kilobytes, and another number of ranks reads it.
    resumed = Job(job, 1, "resume=auto")
    out = resumed.end()
    assert resumed.process.returncode == 0, out[-3000:]
    assert losses(job / "run", "embed_tuning") == losses(job / "whole", "embed_tuning")
    tickets = [json.loads((job / run / "ticket/ticket.json").read_text()) for run in ("run", "whole")]
    assert tickets[0]["token_ids"] == tickets[1]["token_ids"] and tickets[0]["count"] == tickets[1]["count"]
    results = json.loads((job / "run/results.json").read_text())
    done_on_two_ranks = results["resumed"][-1]["step"]
    ours, theirs = (losses(job / run, "partial_tuning") for run in ("run", "whole"))
    assert ours[:done_on_two_ranks] == theirs[:done_on_two_ranks]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert results["resumed"][-1]["ranks_before"] == 2
    assert (job / "run/report.html").exists()
