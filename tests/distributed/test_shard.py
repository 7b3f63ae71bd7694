"""Whole rows from ZeRO's flat partitions, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import launch, succeeds


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_of_every_geometry(ranks, tmp_path):
    succeeds(launch(ranks, Path(__file__).parent / "ranks_shard.py", cwd=tmp_path))
