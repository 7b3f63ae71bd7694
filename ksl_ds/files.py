"""Atomic writes, and readers that raise UserError with one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from ksl_ds.errors import UserError

Content = TypeVar("Content")


def _as_written(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Keeps an integer that stands for a number an integer, so that a file is written as it was read."""
    validate(value)
    return value


Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_as_written)]
Count = Annotated[int, Field(ge=0, le=2**63)]


class Record(BaseModel):
    """An object in one of our JSON files. Unknown keys are allowed; types are strict ("3" is not 3)."""

    model_config = ConfigDict(strict=True, extra="allow")

    def content(self) -> dict[str, Any]:
        """The object as JSON has it: what was given, without defaults."""
        return self.model_dump(exclude_unset=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def checked(content: Content, model: type[Record], where: str) -> Content:
    """Returns `content` if it fits `model`, else raises UserError; `where` is the file, perhaps with a line."""
    record_of(content, model, where)
    return content


def record_of(content: Any, model: type[AnyRecord], where: str) -> AnyRecord:
    """Content of a JSON file as a record. Raises UserError if it does not fit; `where` is the file, perhaps with a line."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        why = first["msg"].removeprefix("Value error, ")
        why = {"missing": "is missing", "model_type": "should be an object, {...}"}.get(first["type"], why)
        why = why.replace("valid dictionary", "valid object, {...}")
        raise UserError(
            f"{where}: {key}{why[0].lower() + why[1:]}; the file was changed or is another kind of file"
        ) from None


def read_text(path: Path) -> str:
    """The content of a text file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: str) -> Any:
    """Parses strict JSON (no NaN, no Infinity). Raises UserError naming `where`."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        content = json.loads(text, parse_constant=refuse)
        json.dumps(content, ensure_ascii=False).encode()  # fails for a lone surrogate, which cannot be written
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    return content


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises UserError."""
    return parse_json(read_text(path), str(path))


def reason(error: Exception) -> str:
    """Why a file cannot be written or read, briefly and without the names of temporary files."""
    if isinstance(error, shutil.Error):  # a list of (source, target, why)
        return str(error.args[0][0][2]).partition(": ")[0]
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors'
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8", errors="replace"))  # a lone surrogate becomes "?"


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises UserError if that fails; an existing file is then unchanged."""
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
    """Calls fsync on a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean(value: Any) -> Any:
    """`value` for JSON: records and dataclasses as dicts, arrays as lists, paths as text, NaN and infinity as None."""
    if isinstance(value, Record):
        value = value.content()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): clean(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return clean(value.tolist()) if hasattr(value, "tolist") else str(value)


def json_text(content: Any) -> str:
    """Sorted, indented JSON, after `clean`."""
    return json.dumps(clean(content), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Writes `json_text` atomically. Raises UserError."""
    write_text(path, json_text(content))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `target` at the end of the block, or deleted on an exception.

    An existing `target` is replaced only when the new folder is complete on disk.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(aside)
        try:
            draft.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


READ_AT_ONCE = 1 << 24


def blocks_sha256(blocks: Iterable[bytes]) -> str:
    """SHA-256, in hexadecimal digits, of all blocks in a row."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def bytes_sha256(content: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal digits."""
    return blocks_sha256([content])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which is read in blocks."""
    with path.open("rb") as file:
        return blocks_sha256(iter(lambda: file.read(READ_AT_ONCE), b""))
