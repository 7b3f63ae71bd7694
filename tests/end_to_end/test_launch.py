"""The launch scripts with programs that only write down how they were called: words arrive whole, signals are handed on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import HANG_SECONDS, REPOSITORY, run

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ["single_node.sh", "multi_node.sh", "slurm.sbatch"]
# What a shell would read as more than text.
NASTY = [
    "text.prompt=Say: {source} $(touch pwned) `touch pwned`",
    "run_dir=a b;touch pwned",
    'tracking.name="x" > pwned',
    "*",
]

RECORDER = f"""#!{sys.executable}
import json, os, signal, sys, time
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[0].endswith("scontrol") and sys.argv[1:2] == ["show"]:
    preempted = os.environ.get("PREEMPTED", "None")
    print("node7\\nnode8" if sys.argv[2] == "hostnames" else "PreemptTime=" + preempted)
if sys.argv[0].endswith("srun") and "SRUN_WAITS" in os.environ and "pkill" not in sys.argv:
    def told(number, frame):
        with open(os.environ["CALLS"], "a") as file:
            file.write(json.dumps(["srun got", number]) + "\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, told)
    print("waiting", flush=True)
    time.sleep(600)
sys.exit(1 if sys.argv[0].endswith("python") else 0)
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with a virtual environment of recorders, and the variables that SLURM sets."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("deepspeed", "srun", "scontrol", "python"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    (tmp_path / "hosts").write_text("# two machines\nalpha slots=2\nbeta slots=2\n")
    return {
        "VENV": str(tmp_path / "venv"), "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip


def calls(tmp_path: Path, program: str) -> list[list[str]]:
    lines = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return [words for name, *words in map(json.loads, lines) if name == program]


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_arrive_as_they_were_given(script, tmp_path, cluster):
    words = ["lottery", "my recipe.yaml", *NASTY]
    first = [tmp_path / "hosts"] if script == "multi_node.sh" else []
    done = run("bash", LAUNCH / script, *first, *words, cwd=tmp_path, **cluster)
    assert done.returncode == 0, done.stderr
    (call,) = calls(tmp_path, "srun" if script == "slurm.sbatch" else "deepspeed")
    at = call.index("ksl_ds")
    assert call[at + 1 :] == words + (["resume=auto"] if script == "slurm.sbatch" else [])
    assert not (tmp_path / "pwned").exists()
    assert call[at - 1] == ("-m" if script == "slurm.sbatch" else "--module")


def test_single_node_starts_a_rank_for_each_gpu_or_as_many_as_asked(tmp_path, cluster):
    run("bash", LAUNCH / "single_node.sh", "check", "r.yaml", cwd=tmp_path, RANKS="4", PORT="1234", **cluster)
    (call,) = calls(tmp_path, "deepspeed")
    assert call == ["--num_accelerators", "4", "--master_port", "1234", "--module", "ksl_ds", "check", "r.yaml"]


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_without_words_a_script_explains_itself(script, tmp_path, cluster):
    done = run("bash", LAUNCH / script, cwd=tmp_path, **cluster)
    assert done.returncode == 2 and f"bash launch/{script}" in done.stderr and "set -euo" not in done.stderr


def test_multi_node_with_and_without_ssh(tmp_path, cluster):
    script = ("bash", LAUNCH / "multi_node.sh")
    run(*script, "hosts", "check", "r.yaml", cwd=tmp_path, **cluster)
    run(*script, "hosts", "check", "r.yaml", cwd=tmp_path, NODE_RANK="1", **cluster)
    by_ssh, without = calls(tmp_path, "deepspeed")
    assert ["--hostfile", "hosts", "--master_addr", "alpha"] == by_ssh[:4] == without[:4]
    assert by_ssh[by_ssh.index("--launcher") + 1] == "pdsh" and "--no_ssh" not in by_ssh
    assert without[without.index("--no_ssh") :][:3] == ["--no_ssh", "--node_rank", "1"]


def test_multi_node_refuses_what_would_go_wrong_later(tmp_path, cluster):
    script = ("bash", LAUNCH / "multi_node.sh")
    missing = run(*script, "nowhere", "check", "r.yaml", cwd=tmp_path, **cluster)
    assert missing.returncode == 2 and "no hostfile nowhere" in missing.stderr
    quoted = run(*script, "hosts", "check", "r.yaml", "text.prompt='; touch pwned; '", cwd=tmp_path, **cluster)
    assert quoted.returncode == 2 and "single quote" in quoted.stderr
    assert calls(tmp_path, "deepspeed") == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("\ufeffalpha slots=2\n", "byte order mark"),
        ("# only a comment\n\n", "names no machine"),
        ("alpha slots=2\n  # beta\n\nbeta\n", "line 4: beta has no slots=GPUS"),
        ("alpha slots=many\n", "line 1: alpha has no slots=GPUS"),
        ("alpha slots=2\nalpha slots=2\n", "line 2: alpha is there twice"),
    ],
)
def test_a_hostfile_that_deepspeed_cannot_use_is_one_sentence(content, sentence, tmp_path, cluster):
    (tmp_path / "hosts").write_text(content, encoding="utf-8")
    done = run("bash", LAUNCH / "multi_node.sh", "hosts", "check", "r.yaml", cwd=tmp_path, **cluster)
    assert done.returncode == 2 and calls(tmp_path, "deepspeed") == []
    assert done.stderr.count("\n") == 1 and sentence in done.stderr


def test_the_ranks_meet_at_the_name_without_the_user_who_logs_in(tmp_path, cluster):
    (tmp_path / "hosts").write_text("\n# two machines\n  me@alpha slots=2 # fast\r\nme@beta slots=2\n")
    done = run("bash", LAUNCH / "multi_node.sh", "hosts", "check", "r.yaml", cwd=tmp_path, **cluster)
    assert done.returncode == 0, done.stderr
    (call,) = calls(tmp_path, "deepspeed")
    assert call[call.index("--master_addr") + 1] == "alpha"


# Told of its last minutes, cancelled, preempted: what SLURM 22.05 was seen to send and to say of the job.
@pytest.mark.parametrize(
    ("number", "preempted", "queues"),
    [(signal.SIGUSR1, "None", True), (signal.SIGTERM, "None", False), (signal.SIGTERM, "2026-11-24T18:12:32", True)],
)
def test_slurm_hands_signals_to_the_ranks_and_queues_again(number, preempted, queues, tmp_path, cluster):
    environment = {**os.environ, **cluster, "SRUN_WAITS": "1", "PATIENCE": "1", "PREEMPTED": preempted}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "lottery", "r.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and "waiting" in job.stdout.readline()
        job.send_signal(number)
        job.communicate(timeout=HANG_SECONDS)
    assert (job.returncode == 0) == queues
    started, told = calls(tmp_path, "srun")  # the ranks are told first, then, as these do not end, srun
    assert "torch.distributed.run" in started and told[-5:] == ["pkill", "-USR1", "-f", "--", "-u -m ksl_ds"]
    assert calls(tmp_path, "srun got") == [[signal.SIGTERM]]
    assert (["requeue", "123"] in calls(tmp_path, "scontrol")) == queues


def test_slurm_fails_as_the_ranks_do_and_does_not_resume_a_check(tmp_path, cluster):
    (Path(cluster["VENV"]) / "bin" / "srun").write_text("#!/bin/sh\nexit 7\n")
    for preempted in ("None", "2026-11-24T18:12:32"):  # with a grace time SLURM tells only what srun started
        done = run("bash", LAUNCH / "slurm.sbatch", "lottery", "r.yaml", cwd=tmp_path, **cluster, PREEMPTED=preempted)
        told = [["show", "hostnames", "node[7-8]"], ["show", "job", "123"]]
        if preempted == "None":
            assert done.returncode == 7 and calls(tmp_path, "scontrol") == told
        else:
            assert done.returncode == 0 and calls(tmp_path, "scontrol") == [*told, *told, ["requeue", "123"]]
    (Path(cluster["VENV"]) / "bin" / "srun").write_text(RECORDER)
    run("bash", LAUNCH / "slurm.sbatch", "check", "r.yaml", cwd=tmp_path, **cluster)
    assert calls(tmp_path, "srun")[0][-2:] == ["check", "r.yaml"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_user_must_change_is_marked(script):
    lines = (LAUNCH / script).read_text().splitlines()
    marked = [line for line in lines if "# EDIT" in line]
    assert any(line.startswith("VENV=") for line in marked)
    site = (
        "--nodes",
        "--gpus-per",
        "--cpus-per",
        "--partition",
        "--account",
        "--time",
        "OMP_NUM",
        "NCCL_",
        "module load",
    )
    assert [
        line for line in lines if any(word in line for word in site) and line not in marked and "names" not in line
    ] == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content(tmp_path):
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    done = run("shellcheck", *scripts, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
