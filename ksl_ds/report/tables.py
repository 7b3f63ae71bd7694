"""Tables of stages and of tickets: one set of rows and number formats, shown in the terminal and in report.html.

A `Table` holds finished text. In a terminal that is too narrow, columns marked optional are left out from the right;
in a file nothing is left out or cut, and there are no colour codes. A missing value is a dash, never a zero.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ksl_ds import distributed
from ksl_ds.config.methods import Stage, label_of
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.report.records import DirectionScores, Scores

DASH = "–"
FILE_WIDTH = 100  # at least, when the output is not a terminal


@dataclass
class Column:
    """A heading and how its cells are set. `optional` columns give way in a narrow terminal."""

    name: str
    numeric: bool = True
    optional: bool = False


@dataclass
class Table:
    """Rows of finished text; the first column names the row. `notes` say below the table how to read it."""

    title: str
    columns: list[Column]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def rich(self, left_out: int = 0, ascii_only: bool = False) -> RichTable:
        """For rich's console, without the `left_out` last optional columns."""
        optional = [index for index, column in enumerate(self.columns) if column.optional]
        hidden = set(optional[len(optional) - left_out :])
        shown = [index for index in range(len(self.columns)) if index not in hidden]
        table = RichTable(
            title=Text(self.title, "bold"), title_justify="left", box=box.ASCII if ascii_only else box.SIMPLE_HEAD
        )
        for index in shown:
            column = self.columns[index]
            # Text, not str: a token such as "[/INST]" is no markup.
            table.add_column(Text(column.name.replace(" ", "\n")), justify="right" if column.numeric else "left")
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in shown))
        return table


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Prints the table and its notes on rank 0, to standard output unless told otherwise."""
    if not distributed.is_rank0():
        return
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    ascii_only = not encoding.lower().startswith("utf")
    terminal = file.isatty()
    probe = Console(width=10_000, file=io.StringIO())
    space = Console(file=file).width if terminal else 10_000
    width = probe.measure(table.rich()).maximum
    left_out = 0
    while width > space and left_out < sum(column.optional for column in table.columns):
        left_out += 1
        width = probe.measure(table.rich(left_out)).maximum
    width = min(space, width) if terminal else max(FILE_WIDTH, width)
    # Through a string, so that a token that the output's encoding lacks becomes "?" and not a traceback.
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="auto" if terminal else None
    )
    console.print(table.rich(left_out, ascii_only))
    for note in table.notes:
        console.print(Text(note, "dim"))
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    text = text.replace(DASH, "-") if ascii_only else text
    file.write((text + "\n").encode(encoding, "replace").decode(encoding))
    file.flush()


def print_text(text: str) -> None:
    """Prints a result on rank 0, to standard output. Messages go through `logging` instead."""
    if distributed.is_rank0():
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _or_dash(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: DASH if _missing(value) else show(value)


@_or_dash
def count(value: Any) -> str:
    """Such as 28,311,552."""
    return f"{value:,.0f}"


@_or_dash
def probability(value: Any) -> str:
    """4.7e-08; the smallest that a double can hold stands for what underflowed."""
    return f"{value:.1e}" if value > 0 else "< 1e-300"


@_or_dash
def duration(value: Any) -> str:
    """Such as 45 s, 3 min 20 s, 2 h 05 min; a dash for 0."""
    seconds = round(value)
    if value == 0:
        return DASH
    if seconds < 60:
        return f"{value:.1f} s" if value < 10 else f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"


@_or_dash
def memory(value: Any) -> str:
    """Such as 1.25 GiB; a dash for 0."""
    return f"{value / 2**30:.2f} GiB" if value else DASH


@_or_dash
def size(value: Any) -> str:
    """Bytes of any magnitude: 512 B, 3.1 KiB, 17.5 GiB, 1,200 GiB; a dash for 0."""
    if value == 0:
        return DASH
    for power, unit in enumerate(("B", "KiB", "MiB")):
        if value < 1000 * 1024**power:
            return f"{value / 1024**power:.{0 if power == 0 or value >= 10 * 1024**power else 1}f} {unit}"
    return f"{value / 2**30:,.{0 if value >= 2**30 * 1000 else 1}f} GiB"


def decimals(digits: int) -> Callable[[Any], str]:
    """A number with so many digits after the point."""
    return _or_dash(lambda value: f"{value:.{digits}f}")


StageColumn = tuple[Column, str, Callable[[Any], str]]  # column, field of records.Scores, how it is shown
STAGE_COLUMNS: list[StageColumn] = [
    (Column("trained parameters"), "trained_parameters", count),
    (Column("test loss"), "test_loss", decimals(3)),
    (Column("BLEU"), "bleu", decimals(1)),
    (Column("chrF++"), "chrf", decimals(1)),
    (Column("first-line BLEU"), "first_line_bleu", decimals(1)),
    (Column("COMET"), "comet", decimals(4)),  # as comet-score prints it
    (Column("stop rate"), "stop_rate", decimals(2)),
    (Column("output length", optional=True), "output_length", decimals(1)),
    (Column("training time", optional=True), "seconds", duration),
    (Column("peak memory", optional=True), "peak_memory_bytes", memory),
]
STAGE_NOTES = [
    "first-line BLEU: each translation cut at its first line break. stop rate: share of translations that end by "
    "themselves. output length: tokens.",
    "A gain that is missing on the first line is the model learning to stop, not to translate.",
]


def in_order(stages: Mapping[str, Any]) -> list[str]:
    """The stages' keys in the order of `Stage`, then any others as they come."""
    known = [stage.value for stage in Stage]
    return [name for name in known if name in stages] + [name for name in stages if name not in known]


def columns_for(stages: Iterable[Scores]) -> list[StageColumn]:
    """Of `STAGE_COLUMNS` those for these stages: COMET only where one has it."""
    has_comet = any(scores.comet is not None for scores in stages)
    return [entry for entry in STAGE_COLUMNS if entry[1] != "comet" or has_comet]


def stage_table(stages: Mapping[str, Scores], title: str = "Scores on the held-out text") -> Table:
    """One row a stage, from `stages` of results.json (put `baselines` beside them for copying the source)."""
    columns = columns_for(stages.values())
    return Table(
        title,
        [Column("", numeric=False), *(column for column, _, _ in columns)],
        [
            [label_of(stage), *(show(getattr(stages[stage], key)) for _, key, show in columns)]
            for stage in in_order(stages)
        ],
        list(STAGE_NOTES),
    )


def direction_table(stages: Mapping[str, Scores]) -> Table:
    """One row for each stage and direction; none where a run has no `text.directions`."""
    columns = [entry for entry in columns_for(stages.values()) if entry[1] in DirectionScores.model_fields]
    return Table(
        "Scores by direction",
        [
            Column("", numeric=False),
            Column("direction", numeric=False),
            *(column for column, _, _ in columns),
        ],
        [
            [label_of(stage), name, *(show(getattr(scores, key)) for _, key, show in columns)]
            for stage in in_order(stages)
            for name, scores in stages[stage].directions.items()
        ],
        ["The scores of a stage are the means over its directions."],
    )


def ticket_rows(
    token_ids: Sequence[int],
    tokens: Sequence[str],
    counts: Sequence[int],
    statistic: Sequence[float],
    pvalue: Sequence[float],
    shift_ratio: Sequence[float],
    train_frequency: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """The parallel lists of a ticket as rows for `ticket_table`."""
    lists: dict[str, Sequence[Any]] = {"token_id": token_ids, "token": tokens, "count": counts}
    lists |= {"statistic": statistic, "pvalue": pvalue, "shift_ratio": shift_ratio}
    if train_frequency is not None:
        lists["train_frequency"] = train_frequency
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def rows_of_ticket(ticket: Ticket) -> list[dict[str, Any]]:
    """The rows of a ticket for `ticket_table`."""
    return ticket_rows(
        ticket.token_ids,
        ticket.tokens,
        ticket.count,
        ticket.statistic,
        ticket.pvalue,
        ticket.shift_ratio,
        ticket.source.get("train_frequency"),
    )


def ticket_table(rows: Iterable[Mapping[str, Any]], limit: int | None = None, title: str = "") -> Table:
    """The drawn tokens, the largest D first; at most `limit` of them.

    Each row holds token_id, token, count, statistic, pvalue, shift_ratio and, where it is known, train_frequency.
    """
    ordered = sorted(rows, key=lambda row: (-row["statistic"], row["token_id"]))
    shown = ordered[:limit]
    columns = [Column("token id"), Column("token", numeric=False), Column("k"), Column("D"), Column("p")]
    columns.append(Column("shift ratio"))
    cells = [
        [
            str(row["token_id"]),
            visible(row["token"]),
            count(row["count"]),
            decimals(4)(row["statistic"]),
            probability(row["pvalue"]),
            decimals(3)(row["shift_ratio"]),
        ]
        for row in shown
    ]
    if any(not _missing(row.get("train_frequency")) for row in shown):
        columns.append(Column("in training text", optional=True))
        for line, row in zip(cells, shown, strict=True):
            line.append(count(row.get("train_frequency")))
    notes = [
        "D = k/d, the largest distance of the row's distribution functions. shift ratio: |after - before| / |before|."
    ]
    tokens = "".join(row["token"] or "" for row in shown)
    signs = {
        "Ġ": "Ġ and ▁ stand for a space",
        "▁": "Ġ and ▁ stand for a space",
        "Ċ": "Ċ for a newline",
        " ": "␣ is a space",
    }
    explained = list(dict.fromkeys(text for sign, text in signs.items() if sign in tokens))
    if explained:
        notes.append(f"In tokens {', '.join(explained)}.")
    if len(shown) < len(ordered):
        notes.append(f"The {len(shown)} rows of largest D; ticket.json lists all {len(ordered):,}.")
    plural = "" if len(ordered) == 1 else "s"
    return Table(title or f"The ticket: {len(ordered):,} embedding row{plural}", columns, cells, notes)


def visible(token: str | None) -> str:
    """A token's text with spaces, newlines and unprintable characters made visible."""
    if not token:
        return DASH
    shown = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(
        shown.get(sign) or (sign if sign.isprintable() else sign.encode("unicode_escape").decode()) for sign in token
    )
