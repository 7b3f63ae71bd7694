"""Parallel text from files or the Hub, as pairs in an order that every rank agrees on.

Choices and what they cost:
- Every rank reads local files itself, once and without a cache: no rank waits for another, and nothing is written beside
  the text or into a home directory. Only Hub datasets go through the cache of `datasets`.
- A whole split is held in memory, about half a gigabyte for a million pairs, since a seeded shuffle needs all of it.
- A line ends at a line feed and nowhere else, as `wc -l` and the aligners see it; the other line breaks of Unicode, which
  occur within crawled sentences, become spaces. No-break spaces, part of French and other spelling, stay.
- TSV has no quoting, as in OPUS and Tatoeba: a lone quotation mark would otherwise swallow the lines after it.
- CSV has quoted fields, which may go over several lines. A quote that does not close is an error; so is a row over several
  lines each of which is a row by itself, unless the file quotes commas or column names, which shows that it uses quoting.
- Text files may be compressed with gzip: a name that ends with .gz is read as the name without it.
- No line and no sentence is longer than a million characters, so a file without line breaks costs an error, not the memory.
- Whatever is left out is counted by reason.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksl_ds.config.schema import Text
from ksl_ds.errors import UserError, reason_of
from ksl_ds.hub import hub_reason

# Where a msgid is a key, translators find the English sentence in the extracted comment.
PO_DEFAULT = re.compile(r'Default: "(.*?)"[ \t]*$', re.DOTALL | re.MULTILINE)
CSV_FIELD = re.compile(r'(?:"[^"]*(?:""[^"]*)*"|[^",\n][^,\n]*)?(?:,|$)')  # a whole one
TRANSLATION = "translation"  # the column of WMT's and ALMA's rows, which holds one sentence for each language code
DEFAULT_COLUMNS = (Text().source_column, Text().target_column)
MOST_CHARACTERS = 1_000_000  # of a line or a sentence; a line's are counted in UTF-8's bytes
SPACES = re.compile(r"[^\S\u00a0\u2007\u202f]+")  # all but the no-break ones


Split = Literal["train", "valid", "test"]


@dataclass(slots=True)
class Pair:
    """A sentence and its translation."""

    source: str
    target: str
    direction: str = ""  # of text.directions


@dataclass
class Corpus:
    """Pairs, where they came from, and how many were left out for which reason."""

    name: str
    pairs: list[Pair]
    dropped: dict[str, int] = field(default_factory=dict)

    def by_direction(self) -> dict[str, list[int]]:
        """The places of each direction's pairs, in the order in which directions first occur."""
        places: dict[str, list[int]] = {}
        for place, pair in enumerate(self.pairs):
            places.setdefault(pair.direction, []).append(place)
        return places

    def summary(self) -> str:
        """One line: what is there and what is not."""
        left_out = _reasons(self.dropped)
        counts = {name: len(places) for name, places in self.by_direction().items() if name}
        each = f" ({', '.join(f'{count:,} {name}' for name, count in counts.items())})" if counts else ""
        return f"{self.name}: {len(self.pairs):,} pairs{each}" + (f"; left out: {left_out}" if left_out else "")


def load_corpus(text: Text, split: Split, seed: int, codes: tuple[str, ...] = ()) -> Corpus:
    """The pairs of a split, shuffled by `seed`, at most `text.max_SPLIT_pairs` of them.

    `codes` are those of source and target language, for rows of the form {"translation": {"en": ..., "ca": ...}}.

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
        for source, target in _read(paths, text, split, dropped, codes):
            source, target = one_line(source), one_line(target)
            if not (_is_unicode(source) and _is_unicode(target)):
                dropped["with half of a surrogate pair"] += 1
            elif not source or not target:
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


def _is_unicode(text: str) -> bool:
    """False with a lone surrogate, which JSON's escapes can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _read(
    paths: list[str], text: Text, split: str, dropped: Counter[str], codes: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    if len(paths) == 2 and not any(_is_po(path) or _suffix(path) in READERS for path in paths):
        yield from _aligned(paths)
        return
    for path in paths:
        if _is_po(path):
            yield from read_po(Path(path), dropped)
        else:
            yield from _columns(_rows(path, text, split), path, text, codes)


def _is_po(path: str) -> bool:
    return Path(path).is_dir() or _suffix(path) == ".po"


def _suffix(path: str) -> str:
    """The ending that says what a file is, without that of its compression."""
    return Path(path.lower().removesuffix(".gz")).suffix


def _aligned(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Two plain text files whose lines belong together."""
    left, right = (_lines(path) for path in paths)
    for number, (source, target) in enumerate(zip_longest(left, right)):
        if source is None or target is None:
            more = number + 1 + sum(1 for _ in (left if target is None else right))
            counts = (number, more) if source is None else (more, number)
            raise UserError(
                f"{paths[0]} has {counts[0]} lines and {paths[1]} has {counts[1]}; line-aligned files have equally many"
            )
        yield source, target


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or not compressed with gzip: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _lines(path: str) -> Iterator[str]:
    """The lines of a text file without line ends and byte order mark; a carriage return alone does not end a line."""
    number = 0
    with _opened(path) as file:
        while line := file.readline(MOST_CHARACTERS + 2):
            number += 1
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MOST_CHARACTERS:
                raise UserError(
                    f"{path}, line {number} has more than {MOST_CHARACTERS:,} bytes; a line ends at a line feed, so is this "
                    "text with a line for every sentence?"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number} is not UTF-8 text") from None


def _rows(path: str, text: Text, split: str) -> Iterator[Any]:
    """The rows of a file or Hub dataset, each a dict of its columns."""
    suffix = _suffix(path)
    hub = suffix not in READERS
    names_a_file = (
        suffix == ".txt" or path.lower().endswith(".gz") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)
    )
    if hub and (names_a_file or Path(path).is_file()):
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
    except Exception as error:  # each reader has its own exceptions
        if hub:
            raise UserError(f"{path} cannot be read from the Hub: {hub_reason(error, f'datasets/{path}')}") from None
        raise UserError(f"{path} cannot be read: {reason_of(error.__cause__ or error)}") from None


def _hub(path: str, text: Text, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    name_of_split = getattr(text, f"{split}_split")
    dataset = datasets.load_dataset(path, name=text.hub_config, split=name_of_split, revision=text.revision)
    return _batched(dataset.iter(batch_size=1000))


def _json(path: str) -> Iterator[Any]:
    """JSON lines, or one JSON list of objects."""
    with _opened(path) as file:
        if file.read(4).removeprefix(codecs.BOM_UTF8).startswith(b"["):
            file.seek(0)
            yield from json.loads(file.read())
            return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None


def _csv(path: str) -> Iterator[dict[str, Any]]:
    return _table(path, _csv_rows(path))


def _tsv(path: str) -> Iterator[dict[str, Any]]:
    return _table(path, ((number, line.split("\t") if line else []) for number, line in enumerate(_lines(path), 1)))


def _table(path: str, rows: Iterator[tuple[int, list[str]]]) -> Iterator[dict[str, Any]]:
    """Rows by the column names of the first; blank lines are skipped, and missing cells are None."""
    header: list[str] = []
    for number, row in rows:
        if len(row) > len(header) > 0:
            raise UserError(f"{path}, line {number} has more columns than the {len(header)} of the first row")
        if row and header:
            yield dict(zip_longest(header, row))
        if not header:
            header = row
            twice = [name for name, times in Counter(header).items() if times > 1 and name]
            if twice:
                raise UserError(f"{path} has the column {twice[0]} twice; rename or remove one of them")


def _csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line in which each begins."""
    csv.field_size_limit(MOST_CHARACTERS)
    lines: list[str] = []  # of the row in hand

    def kept() -> Iterator[str]:
        for line in _lines(path):
            lines.append(line.replace("\r", " "))  # which csv takes for the end of a row
            yield lines[-1] + "\n"

    reader = csv.reader(kept(), strict=True)
    number = 1
    columns = 0
    knows_quotes = False  # the file quotes a comma, or the column names
    swallowed: UserError | None = None
    while True:
        lines.clear()
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise _open_quote(path, number, lines, str(error)) from None
        columns = columns or len(row)
        if len(lines) == 1:
            knows_quotes |= any("," in cell for cell in row) or (number == 1 and ",".join(row) != lines[0])
        elif swallowed is None and all(line.count(",") == columns - 1 for line in lines):
            swallowed = _open_quote(
                path, number, lines, "the lines that it goes over are rows of their own", any_break=True
            )
        yield number, row
        number += len(lines)
    if swallowed is not None and not knows_quotes:
        raise swallowed


def _open_quote(path: str, number: int, lines: list[str], reason: str, any_break: bool = False) -> UserError:
    """Names the line of the field that is not complete, or of the first one with a line break."""
    text = "\n".join(lines)
    at = 0
    while at < len(text) and (field := CSV_FIELD.match(text, at)) and not (any_break and "\n" in field[0]):
        at = field.end()
    number += text.count("\n", 0, at)
    return UserError(
        f"{path}, line {number}: a field begins with a quotation mark and does not end with one ({reason}); every quotation "
        "mark of a quoted field's text is written twice"
    )


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


def _columns(rows: Iterator[Any], path: str, text: Text, codes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    columns = {"text.source_column": text.source_column, "text.target_column": text.target_column}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is {str(row)[:50]!r}, not columns and their values")
        if number == 1 and codes and TRANSLATION in row and not set(columns.values()) & set(row):
            columns = {
                key: f"{TRANSLATION}.{code}" if column in DEFAULT_COLUMNS else column
                for (key, column), code in zip(columns.items(), codes, strict=True)
            }
        sides = []
        for key, column in columns.items():
            value: Any = row
            for part in [column] if column in row else column.split("."):
                if not isinstance(value, dict) or part not in value:
                    there = ", ".join(map(str, value)) if isinstance(value, dict) else "no columns"
                    raise UserError(f"{path}, row {number} has no column {column!r} ({key}); there are: {there}")
                value = value[part]
            if value is not None and not isinstance(value, str):
                raise UserError(f"{path}, row {number}: {column} is {value!r}, not text")
            sides.append(_not_too_long(value or "", f"{path}, row {number}: {column}"))
        yield sides[0], sides[1]


def _not_too_long(text: str, where: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{where} has {len(text):,} characters; a sentence has at most {MOST_CHARACTERS:,}")
    return text


def read_po(path: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Source and translation of the entries of a .po file, or of all below a folder.

    Entries that translators marked as unfinished or no longer used, and those with plural forms, are left out and counted.
    """
    import polib

    files = sorted([*path.rglob("*.po"), *path.rglob("*.po.gz")]) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is a folder without .po files")
    for file in files:
        if not file.is_file():
            raise UserError(f"no file {file}")
        try:
            compressed = file.suffix.lower() == ".gz"
            # polib would end lines at Unicode's line breaks too.
            content = "\n".join(SPACES.sub(" ", line) for line in _lines(str(file))) if compressed else str(file)
            entries = polib.pofile(content)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not a valid .po file: {error}") from None
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
                source = polib.unescape(default[1]) if default else entry.msgid
                where = f"{file}, {source[:40]!r} or its translation"
                yield _not_too_long(source, where), _not_too_long(entry.msgstr, where)
