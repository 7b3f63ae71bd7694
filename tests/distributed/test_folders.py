"""Model folders that need more than one name for each parameter, trained and written on real processes."""

from __future__ import annotations

from pathlib import Path

from helpers.processes import launch, succeeds


def test_fused_experts_and_an_untied_head_survive(job):
    succeeds(launch(2, Path(__file__).parent / "ranks_folders.py", cwd=job))
