"""What a rank says while it waits."""

from __future__ import annotations

import time

from ksl_ds.sharding import cluster


def test_a_lock_that_a_killed_process_left_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cluster, "SECONDS_TO_COMPILE", 0.01)
    (tmp_path / "operation").mkdir()
    with cluster._told_of_locks():
        time.sleep(0.5)
    assert capsys.readouterr().err == ""
    lock = tmp_path / "operation" / "lock"
    lock.touch()
    with cluster._told_of_locks():
        said = ""
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
            said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"delete {lock} and start again" in said
