"""The job that most distributed tests start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.hosts import Hosts
from helpers.runs import prepare_job


@pytest.fixture
def job(tmp_path):
    """A folder with a tied model, text, a DeepSpeed JSON and a recipe."""
    prepare_job(tmp_path)
    return tmp_path


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts on this machine; skips the test where the system does not permit them."""
    with Hosts() as pair:
        yield pair
