"""How a rank joins its job."""

from __future__ import annotations

import os
import sys

import pytest
from helpers.processes import run, succeeds

from ksl_ds import distributed
from ksl_ds.cli import main
from ksl_ds.errors import MistakeOfThisRank

START = """
import os
from pathlib import Path

from ksl_ds import distributed

distributed.initialize()
assert list(Path("/dev/shm").glob(f"deepspeed*_{os.environ['MASTER_PORT']}_*")) == []
distributed.shutdown()
"""


def test_fault_a_compile_was_killed_and_there_is_no_compiler(tmp_path):
    """A lock in the folder of compiled operations, as a killed compile leaves it, makes nobody wait: nothing is compiled."""
    lock = tmp_path / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "empty").mkdir()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "PATH": str(tmp_path / "empty")}
    succeeds(run(sys.executable, "-c", START, cwd=tmp_path, **environment))
    assert list((tmp_path / "extensions").rglob("*")) == [lock.parent, lock]


@pytest.fixture
def environment(monkeypatch):
    def make(words: str) -> None:
        for name in distributed.LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for word in words.split():
            monkeypatch.setenv(*word.split("="))

    return make


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "no LOCAL_RANK;"),  # what job controllers set
        ("RANK=0", "no WORLD_SIZE and no LOCAL_RANK and no MASTER_ADDR"),
        ("RANK=0 WORLD_SIZE= LOCAL_RANK=0", "no WORLD_SIZE"),
        ("WORLD_SIZE=4", "no RANK"),
        ("LOCAL_RANK=1", "no RANK"),
        ("RANK=two WORLD_SIZE=4", "RANK is 'two'"),
        ("RANK=-1 WORLD_SIZE=4 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "RANK is '-1'"),
        ("RANK=0 WORLD_SIZE=1.5 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE is '1.5'"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "RANK=2, WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE=0"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=7 MASTER_ADDR=a MASTER_PORT=1", "LOCAL_RANK=7"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT=70000"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=tcp", "MASTER_PORT is 'tcp'"),
    ],
)
def test_an_environment_that_makes_no_job_is_one_sentence(words, named, environment):
    environment(words)
    with pytest.raises(MistakeOfThisRank, match="torchrun") as raised:
        distributed._check_launch()
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "words", ["", "WORLD_SIZE=1", "RANK=0 WORLD_SIZE=1", "MASTER_ADDR=a MASTER_PORT=1 LOCAL_RANK=0"]
)
def test_what_surrounds_one_process_does_not_matter(words, environment):
    environment(words)
    distributed._check_launch()
    assert not any(name in os.environ for name in distributed.LAUNCH_VARIABLES)


def test_what_a_launcher_sets_is_taken(environment):
    environment("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=29500")
    distributed._check_launch()
    assert os.environ["RANK"] == "3"


def test_every_rank_says_what_is_wrong_with_its_own_environment(environment, capsys):
    environment("RANK=1 WORLD_SIZE=2")
    assert main(["draw", "before=a", "after=b", "out=c"]) == 2
    assert capsys.readouterr().err.startswith("ksl-ds: the environment has RANK=1, WORLD_SIZE=2 but no LOCAL_RANK")
