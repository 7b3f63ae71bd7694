"""Parallel text from files or the Hub, as pairs in an order that every rank agrees on.

JSONL, CSV, TSV and Parquet are read by `datasets`, .po files by `polib`. Whatever is left out is counted by reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksl_ds.errors import UserError
from ksl_ds.recipe import Text

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Where a msgid is a key, translators find the English sentence in the extracted comment.
PO_DEFAULT = re.compile(r'Default: "(.*)"', re.DOTALL)


@dataclass
class Pair:
    """A sentence and its translation."""

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
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
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
    read = _read_lines if len(paths) == 2 and not any(_is_known(path) for path in paths) else _read_all
    rows = list(read(paths, text, split, name))
    if not rows:
        raise UserError(f"{name} holds no pairs")
    corpus = Corpus(name, [])
    limit = text.max_words
    for source, target in rows:
        source, target = " ".join(source.split()), " ".join(target.split())
        if not source or not target:
            _count(corpus, "with an empty side")
        elif limit is not None and max(len(source.split()), len(target.split())) > limit:
            _count(corpus, f"longer than {limit} words")
        else:
            corpus.pairs.append(Pair(source, target))
    if not corpus.pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items())
        raise UserError(f"{name}: none of its {len(rows)} pairs can be used: {reasons}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(corpus.pairs))
    most = getattr(text, f"max_{split}_pairs") or len(order)
    if len(order) > most:
        corpus.dropped[f"beyond text.max_{split}_pairs={most}"] = len(order) - most
    corpus.pairs = [corpus.pairs[index] for index in order[:most].tolist()]
    return corpus


def _count(corpus: Corpus, reason: str) -> None:
    corpus.dropped[reason] = corpus.dropped.get(reason, 0) + 1


def _is_known(path: str) -> bool:
    return Path(path).is_dir() or Path(path).suffix.lower() in (*BUILDERS, ".po")


def _read_lines(paths: list[str], text: Text, split: str, name: str) -> Iterator[tuple[str, str]]:
    """Two plain text files whose lines belong together."""
    sides = []
    for path in paths:
        try:
            sides.append(Path(path).read_text(encoding="utf-8").split("\n"))
        except OSError as error:
            raise UserError(f"text.{split}: {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"text.{split}: {path} is not UTF-8 text") from None
        if sides[-1][-1] == "":
            sides[-1].pop()
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"text.{split}: {paths[0]} has {len(sides[0])} lines and {paths[1]} has {len(sides[1])}; line-aligned files "
            "have equally many"
        )
    return zip(*sides, strict=True)


def _read_all(paths: list[str], text: Text, split: str, name: str) -> Iterator[tuple[str, str]]:
    for path in paths:
        if Path(path).is_dir() or Path(path).suffix.lower() == ".po":
            yield from read_po(Path(path))
        else:
            yield from _columns(_dataset(path, text, split), path, text)


def _dataset(path: str, text: Text, split: str) -> Any:
    import datasets

    suffix = Path(path).suffix.lower()
    if suffix in BUILDERS:
        if not Path(path).is_file():
            raise UserError(f"text.{split}: no file {path}")
        if Path(path).stat().st_size == 0:
            return []
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        if BUILDERS[suffix] == "csv":
            options["keep_default_na"] = False  # "null" and "NA" are words too
        arguments: dict[str, Any] = {"path": BUILDERS[suffix], "data_files": path, "split": "train", **options}
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not suffix == ".txt":
        arguments = {"path": path, "name": text.hub_config, "split": getattr(text, f"{split}_split")}
    else:
        raise UserError(f"text.{split}: {path} is neither a file of a known kind nor a Hub dataset id")
    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # datasets raises its own and its readers' errors of many kinds
        cause = error.__cause__ or error
        raise UserError(f"text.{split}: {path} cannot be read: {' '.join(str(cause).split())[:300]}") from None


def _columns(rows: Any, path: str, text: Text) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows):
        sides = []
        for key, column in (("text.source_column", text.source_column), ("text.target_column", text.target_column)):
            value: Any = row
            for part in [column] if column in row else column.split("."):
                if not isinstance(value, dict) or part not in value:
                    there = ", ".join(value) if isinstance(value, dict) else "no columns"
                    raise UserError(f"{path} has no column {column!r} ({key}); there are: {there}")
                value = value[part]
            if value is not None and not isinstance(value, str):
                raise UserError(f"{path}, row {number + 1}: {column} is {value!r}, not text")
            sides.append(value or "")
        yield sides[0], sides[1]


def read_po(path: Path) -> Iterator[tuple[str, str]]:
    """Source and translation of the finished entries of a .po file, or of all below a folder; plural forms are left out."""
    import polib

    files = sorted(path.rglob("*.po")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .po file")
    for file in files:
        if not file.is_file():
            raise UserError(f"no file {file}")
        try:
            entries = polib.pofile(str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no readable .po file: {error}") from None
        for entry in entries.translated_entries():
            if not entry.msgid_plural:
                default = PO_DEFAULT.search(entry.comment)
                yield (default[1] if default else entry.msgid), entry.msgstr
