"""The GPU check, rehearsed on the CPU: every part runs, a part that fails or hangs does not stop the others."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from helpers.processes import ENVIRONMENT, REPOSITORY, WARM, run

sys.path.insert(0, str(REPOSITORY / "launch"))


def check(tmp_path, *words, **environment):
    done = run("bash", REPOSITORY / "launch" / "gpu_check.sh", tmp_path / "out", *words, cwd=tmp_path, **environment)
    record = tmp_path / "out" / "gpu_check.json"
    parts = json.loads(record.read_text())["parts"] if record.exists() else []
    return done, {part["part"]: part for part in parts}


def test_rehearsal_of_the_gpu_check(tmp_path):
    from gpu_check.parts import PARTS, load_parts

    load_parts()
    done, parts = check(tmp_path, "--rehearse", PYTHON=WARM.python(ENVIRONMENT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(parts) == list(PARTS)
    assert {part["status"] for part in parts.values()} == {"passed"}
    for name, part in parts.items():
        assert bool(part["figures"]) or not part["speed"], name
    assert parts["rows_fp16"]["figures"]["steps that overflowed"] > 0
    assert 2 <= parts["resume"]["figures"]["stopped after step"] < 60
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "A rehearsal on the CPU" in page
    assert all(f"| {name} | passed |" in page for name in PARTS)


def test_without_a_gpu_the_gpu_check_says_what_to_do(tmp_path):
    done, parts = check(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: torch sees no CUDA GPU here; --rehearse runs the same code on the CPU\n"
    assert not parts


FAULTY = '''
import time
from gpu_check.parts import part

@part("faulty", seconds=5)
def wrong(context):
    """A wrong result."""
    raise AssertionError("3 is not 4")

@part("faulty", seconds=5)
def dies(context):
    """The process dies."""
    import os
    os._exit(7)

@part("faulty", seconds=0)
def hangs(context):
    """Never ends."""
    time.sleep(3600)

@part("faulty", seconds=5)
def works(context):
    """Works."""
    return {"answer": 42}
'''


def test_a_faulty_part_of_the_gpu_check_does_not_stop_the_others(tmp_path):
    # Put in front of the real parts: the check imports commands, kernel and ranks from its package.
    package = tmp_path / "gpu_check"
    package.mkdir()
    for file in (REPOSITORY / "launch" / "gpu_check").glob("*.py"):
        (package / file.name).write_text(file.read_text())
    for name in ("commands", "ranks"):
        (package / f"{name}.py").write_text("launcher = None\n")
    (package / "kernel.py").write_text(FAULTY)
    done = run(
        sys.executable, "-m", "gpu_check", "out", "--rehearse", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}"
    )
    parts = {part["part"]: part for part in json.loads((tmp_path / "out/gpu_check.json").read_text())["parts"]}
    assert done.returncode == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "wrong": "failed",
        "dies": "failed",
        "hangs": "over time",
        "works": "passed",
    }
    assert parts["wrong"]["message"] == "AssertionError: 3 is not 4"
    assert parts["works"]["figures"] == {"answer": 42}
    assert "1 of 4 parts without a failure" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_gpu_check(tmp_path):
    done, parts = check(
        tmp_path, DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in parts.values()} <= {"passed", "not supported"}
