"""Hierarchical partitioning (hpZ): every method, on four ranks of two simulated hosts."""

from __future__ import annotations

import pytest
import ranks_hpz
from helpers.cases import job_of_cases

hpz = job_of_cases(ranks_hpz, ranks=[4], prepare=ranks_hpz.prepare)


@pytest.mark.parametrize("case", ranks_hpz.CASES)
def test_hpz_gives_the_numbers_of_plain_zero3(case, hpz):
    hpz(case)
