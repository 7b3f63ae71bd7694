"""Model folders that need more than one name for each parameter, trained and written on real processes."""

from __future__ import annotations

import pytest
import ranks_folders
from helpers.cases import job_of_cases
from helpers.runs import prepare_job

folders = job_of_cases(ranks_folders, ranks=[2], prepare=prepare_job)


@pytest.mark.parametrize("case", ranks_folders.CASES)
def test_model_folders_survive(case, folders):
    folders(case)
