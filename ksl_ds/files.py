"""Writing files whole or not at all, for every room."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ksl_ds.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file in UTF-8 or nothing; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8", errors="replace"))  # half a surrogate pair becomes "?"


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing.

    Raises
    ------
    UserError
        When it cannot be written; an older file of that name is then as it was.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
