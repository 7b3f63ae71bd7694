"""Packed micro-batches in real training runs."""

from __future__ import annotations

from pathlib import Path

from helpers.processes import launch, succeeds

HERE = Path(__file__).parent


def test_packing_trains_as_padding_does(job):
    """Seven architectures pack with the same losses; ALiBi and state-space models fall back, and the reason is one line."""
    done = succeeds(launch(2, HERE / "ranks_packing.py", cwd=job))
    for architecture in ("bloom", "mamba"):
        line = f"micro-batches are padded, not packed: the code of {architecture} takes no position_ids"
        assert done.stderr.count(line) == 1
