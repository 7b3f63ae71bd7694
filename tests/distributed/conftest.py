"""The job that most distributed tests start."""

from __future__ import annotations

import pytest
from helpers.runs import prepare_job


@pytest.fixture
def job(tmp_path):
    """A folder with a tied model, text, a DeepSpeed JSON and a recipe."""
    prepare_job(tmp_path)
    return tmp_path
