"""Model folders that need more than one name for each parameter, trained and written on real processes."""

from __future__ import annotations

from pathlib import Path

from conftest import launch, succeeds
from test_lottery import job  # noqa: F401


def test_fused_experts_and_an_untied_head_survive(job):  # noqa: F811
    succeeds(launch(2, Path(__file__).parent / "ranks_folders.py", cwd=job))
