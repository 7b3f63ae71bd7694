"""Whole rows from ZeRO's flat partitions, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_shard
from helpers.cases import job_of_cases
from helpers.processes import launch

shards = job_of_cases(ranks_shard, ranks=[1, 2, 3])
shards_of_four = job_of_cases(ranks_shard, ranks=[4])


@pytest.mark.parametrize("case", ranks_shard.CASES)
def test_rows_of_every_geometry(case, shards):
    shards(case)


@pytest.mark.parametrize("case", [*ranks_shard.GEOMETRIES, "traffic"])
def test_rows_of_every_geometry_on_four_ranks(case, shards_of_four):
    shards_of_four(case)


def test_a_rank_that_dies_in_a_draw_ends_the_job(tmp_path):
    """The launcher names the rank and ends the others; nobody waits for it."""
    done = launch(4, Path(__file__).parent / "ranks_dying.py", cwd=tmp_path)
    assert done.returncode != 0
    assert "--local_rank=1" in done.stdout + done.stderr
