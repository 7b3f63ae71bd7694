"""Training a few rows under ZeRO: all others stay bit-identical, masters included."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import launch, succeeds


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_rows_stay(ranks, tmp_path):
    """50 steps of AdamW with weight decay .1, momentum, clipping and accumulation, stages 0 to 3, tied and untied."""
    succeeds(launch(ranks, Path(__file__).parent / "ranks_rows.py", cwd=tmp_path))
