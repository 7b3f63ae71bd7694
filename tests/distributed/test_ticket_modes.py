"""The two ways to train a ticket under ZeRO, `hooks` and `rows`: the same losses and the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.processes import launch, succeeds


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_and_hooks_train_a_ticket_alike(ranks, tmp_path):
    """50 steps with decay and clipping, six architectures, tied and untied, stages 0 to 3, to 1e-6 in fp32."""
    succeeds(launch(ranks, Path(__file__).parent / "ranks_ticket.py", cwd=tmp_path))
