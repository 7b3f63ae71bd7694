"""Fixtures and markers of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "distributed":
            item.add_marker(pytest.mark.distributed)


@pytest.fixture
def messages() -> Iterator[None]:
    """Messages and warnings go to stderr, as they do under the command line."""
    from ksl_ds.log import messages_on_stderr

    with messages_on_stderr():
        yield
