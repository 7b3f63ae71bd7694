"""Parallel text from files or the Hub, as pairs in an order that every rank agrees on.

Choices and what they cost:
- Every rank reads local files itself, straight through and without a cache: no rank waits for another, and nothing is
  written beside the text or into a home directory. Only Hub datasets go through the cache of `datasets`.
- A whole split is held in memory, about half a gigabyte for a million pairs, since a seeded shuffle needs all of it.
- A line ends at a line feed and nowhere else, as `wc -l` and the aligners see it; the other line breaks of Unicode, which
  occur within crawled sentences, become spaces. No-break spaces, part of French and other spelling, stay.
- TSV knows no quoting, as OPUS and Tatoeba write it: a lone quotation mark would otherwise swallow the lines after it.
- Whatever is left out is counted by reason.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksl_ds.errors import UserError
from ksl_ds.recipe import Text

# Where a msgid is a key, translators find the English sentence in the extracted comment.
PO_DEFAULT = re.compile(r'Default: "(.*?)"[ \t]*$', re.DOTALL | re.MULTILINE)
SPACES = re.compile(r"[^\S\u00a0\u2007\u202f]+")  # all but the no-break ones


@dataclass
class Pair:
    """A sentence and its translation."""

    __slots__ = ("source", "target")
    source: str
    target: str


@dataclass
class Corpus:
    """Pairs, where they came from, and how many were left out for which reason."""

    name: str
    pairs: list[Pair]
    dropped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: what is there and what is not."""
        left_out = _reasons(self.dropped)
        return f"{self.name}: {len(self.pairs):,} pairs" + (f"; left out: {left_out}" if left_out else "")


def load_corpus(text: Text, split: Literal["train", "valid", "test"], seed: int) -> Corpus:
    """The pairs of a split, shuffled by `seed`, at most `text.max_SPLIT_pairs` of them.

    Raises
    ------
    UserError
        For a missing file or column, text without pairs, files of unequal length, and text without translations.
    """
    paths: list[str] = getattr(text, split)
    if not paths:
        raise UserError(f"text.{split} is empty; name a file or a Hub dataset")
    name = f"text.{split} ({', '.join(paths)})"
    limit = text.max_words
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    try:
        for source, target in _read(paths, text, split, dropped):
            source, target = one_line(source), one_line(target)
            if not source or not target:
                dropped[f"with an empty {'target' if source else 'source'}"] += 1
            elif limit is not None and max(len(source.split()), len(target.split())) > limit:
                dropped[f"longer than {limit} words"] += 1
            else:
                pairs.append(Pair(source, target))
    except UserError as error:
        raise UserError(f"text.{split}: {error}") from None
    if not pairs and not dropped:
        raise UserError(f"{name} holds no pairs")
    if not pairs:
        raise UserError(f"{name}: none of its {dropped.total():,} pairs can be used: {_reasons(dropped)}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(pairs))
    most = getattr(text, f"max_{split}_pairs") or len(order)
    if len(order) > most:
        dropped[f"beyond text.max_{split}_pairs={most}"] = len(order) - most
    return Corpus(name, [pairs[index] for index in order[:most].tolist()], dict(dropped))


def one_line(text: str) -> str:
    """The text without line breaks, tabs and repeated spaces."""
    return SPACES.sub(" ", text).strip()


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _read(paths: list[str], text: Text, split: str, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    if len(paths) == 2 and not any(_is_po(path) or _suffix(path) in READERS for path in paths):
        yield from _aligned(paths)
        return
    for path in paths:
        if _is_po(path):
            yield from read_po(Path(path), dropped)
        else:
            yield from _columns(_rows(path, text, split), path, text)


def _is_po(path: str) -> bool:
    return Path(path).is_dir() or _suffix(path) == ".po"


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _aligned(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Two plain text files whose lines belong together."""
    sides = []
    for path in paths:
        try:
            lines = _open(path).read().split("\n")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        sides.append(lines[:-1] if lines[-1] == "" else lines)
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{paths[0]} has {len(sides[0])} lines and {paths[1]} has {len(sides[1])}; line-aligned files have equally many"
        )
    return zip(*sides, strict=True)


def _open(path: str) -> Any:
    # A byte order mark is no text, and "\r" alone ends no line.
    return Path(path).open(encoding="utf-8-sig", newline="\n")


def _rows(path: str, text: Text, split: str) -> Iterator[Any]:
    """The rows of a file or Hub dataset, each a dict of its columns."""
    suffix = _suffix(path)
    hub = suffix not in READERS
    if hub and (Path(path).is_file() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) or suffix == ".txt"):
        raise UserError(
            f"{path} is neither a file of a known kind ({' '.join(READERS)} .po), nor one of two line-aligned text files, "
            "nor a Hub dataset id"
        )
    if not hub and not Path(path).is_file():
        raise UserError(f"no file {path}")
    try:
        yield from _hub(path, text, split) if hub else READERS[suffix](path)
    except UserError:
        raise
    except Exception as error:  # each reader has kinds of its own
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(f"{path} cannot be read{' from the Hub' if hub else ''}: {reason}") from None


def _hub(path: str, text: Text, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    dataset = datasets.load_dataset(path, name=text.hub_config, split=getattr(text, f"{split}_split"))
    return _batched(dataset.iter(batch_size=1000))


def _json(path: str) -> Iterator[Any]:
    """JSON lines, or one JSON list of objects."""
    with _open(path) as file:
        if file.read(1) == "[":
            file.seek(0)
            yield from json.load(file)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None


def _csv(path: str, **options: Any) -> Iterator[dict[str, str]]:
    with _open(path) as file:
        reader = csv.DictReader(file, **options)
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num} has more columns than the {len(reader.fieldnames or ())} of line 1"
                )
            yield row


def _tsv(path: str) -> Iterator[dict[str, str]]:
    return _csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    return _batched(batch.to_pydict() for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000))


def _batched(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


READERS: dict[str, Callable[[str], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def _columns(rows: Iterator[Any], path: str, text: Text) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is {str(row)[:50]!r}, not columns and their values")
        sides = []
        for key, column in (("text.source_column", text.source_column), ("text.target_column", text.target_column)):
            value: Any = row
            for part in [column] if column in row else column.split("."):
                if not isinstance(value, dict) or part not in value:
                    there = ", ".join(map(str, value)) if isinstance(value, dict) else "no columns"
                    raise UserError(f"{path}, row {number} has no column {column!r} ({key}); there are: {there}")
                value = value[part]
            if value is not None and not isinstance(value, str):
                raise UserError(f"{path}, row {number}: {column} is {value!r}, not text")
            sides.append(value or "")
        yield sides[0], sides[1]


def read_po(path: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Source and translation of the entries of a .po file, or of all below a folder.

    Entries that translators marked as unfinished or no longer used, and those with plural forms, are left out and counted.
    """
    import polib

    files = sorted(path.rglob("*.po")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is a folder without .po files")
    for file in files:
        if not file.is_file():
            raise UserError(f"no file {file}")
        try:
            entries = polib.pofile(str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no readable .po file: {error}") from None
        for entry in entries:
            if entry.obsolete:
                dropped["obsolete in the .po file"] += 1
            elif entry.fuzzy:
                dropped["fuzzy in the .po file"] += 1
            elif entry.msgid_plural:
                dropped["with plural forms"] += 1
            elif not entry.msgstr:
                dropped["untranslated in the .po file"] += 1
            else:
                default = PO_DEFAULT.search(entry.comment)
                yield (polib.unescape(default[1]) if default else entry.msgid), entry.msgstr
