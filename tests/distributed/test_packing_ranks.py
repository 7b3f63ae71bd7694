"""Packed micro-batches in real training runs."""

from __future__ import annotations

import pytest
import ranks_packing
from helpers.cases import job_of_cases
from helpers.runs import prepare_job

packing = job_of_cases(ranks_packing, ranks=[2], prepare=prepare_job)


@pytest.mark.parametrize("case", ranks_packing.CASES)
def test_packing_trains_as_padding_does(case, packing):
    """Losses and gradient norms; ALiBi and state-space models fall back, and the reason is one line."""
    packing(case)
    if case in ranks_packing.PADDED:
        line = f"micro-batches are padded, not packed: the code of {case} takes no position_ids"
        assert packing.job.stderr.count(line) == 1
