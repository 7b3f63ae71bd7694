"""The command line's log handler: records of `logging.getLogger("ksl_ds")` go to stderr on rank 0.

A program that uses ksl_ds as a library has no such handler, so nothing is printed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LOGGER = logging.getLogger("ksl_ds")


class _Rank0Handler(logging.Handler):
    """Writes above progress bars; levels other than INFO are prefixed, such as `warning: `."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(level + self.format(record), file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Installs the handler for the block, at level INFO."""
    handler = _Rank0Handler()
    level = LOGGER.level
    propagate = LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a root handler that some library installs would print everything twice
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
