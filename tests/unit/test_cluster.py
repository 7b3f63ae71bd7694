"""How a rank joins its job."""

from __future__ import annotations

import sys

from conftest import run, succeeds

START = """
import os
from pathlib import Path

from ksl_ds.sharding import cluster

cluster.start()
assert list(Path("/dev/shm").glob(f"deepspeed*_{os.environ['MASTER_PORT']}_*")) == []
cluster.stop()
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
