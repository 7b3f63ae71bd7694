"""A scan as people read it: the table of module kinds, the rows of largest D, the tokens, what was left out, in words.

Every function reads results.json's content, as `results.results_of` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ksl_ds.report.tables import (
    DASH,
    Column,
    Table,
    count,
    decimals,
    probability,
    ticket_rows,
    ticket_table,
    visible,
)

NOTES = (
    "p < alpha: the nominal level, row by row. BH: Benjamini-Hochberg's step-up rule over all rows of the scan. Bonferroni: "
    "p < alpha divided by the number of all rows.",
    "D: the largest distance of a row's two distribution functions. shift ratio: |after - before| / |before| of a row; the "
    "median is over the rows that moved.",
)
TICKET_SHOWN = 40


def percent(value: float) -> str:
    """Such as 12.3 %, 0.0004 %, 0 %."""
    return f"{100 * value:.1f} %" if value >= 0.001 else f"{100 * value:.1g} %"


def ratio(value: float | None) -> str:
    """A shift ratio to three digits, whether it is 0.3 or 0.00003; a dash where it is no finite number."""
    return DASH if value is None or value != value else f"{value:.3g}"


SUMMARY_COLUMNS: list[tuple[Column, Callable[[Mapping[str, Any]], str]]] = [
    (Column("rows tested"), lambda found: count(found["rows"])),
    (Column("rows moved"), lambda found: percent(found["moved"] / found["rows"])),
    (Column("p<alpha"), lambda found: percent(found["share"]["nominal"])),
    (Column("BH"), lambda found: percent(found["share"]["benjamini_hochberg"])),
    (Column("Bonferroni"), lambda found: percent(found["share"]["bonferroni"])),
    (Column("largest D"), lambda found: decimals(4)(found["largest_statistic"])),
    (Column("median shift ratio"), lambda found: ratio(found["median_shift_ratio"])),
    (Column("largest shift ratio", optional=True), lambda found: ratio(found["largest_shift_ratio"])),
]


def kind_table(results: Mapping[str, Any], title: str = "") -> Table:
    """One row a module kind, in the model's order, and one for all."""
    columns = [Column("", numeric=False), *(column for column, _ in SUMMARY_COLUMNS)]
    groups = {**results["kinds"], "all": results["all"]}
    cells = [[name, *(show(found) for _, show in SUMMARY_COLUMNS)] for name, found in groups.items()]
    head = f"{count(results['all']['rows'])} rows of {count(results['all']['tensors'])} tensors, alpha {results['alpha']:g}"
    return Table(f"{title}: {head}" if title else head, columns, cells, list(NOTES))


def row_table(results: Mapping[str, Any]) -> Table:
    """The rows of largest D in the model."""
    columns = [Column("tensor", numeric=False), Column("row"), Column("k"), Column("values"), Column("D"), Column("p")]
    columns.append(Column("shift ratio"))
    tokens = {
        (name, row["row"]): row["token"] for name, ticket in results["tickets"].items() for row in ticket["largest"]
    }
    cells = []
    for row in results["largest_rows"]:
        token = tokens.get((row["tensor"], row["row"][0]))
        cells.append(
            [
                f"{row['tensor']}  {visible(token)}" if token else row["tensor"],
                ", ".join(map(str, row["row"])),
                count(row["count"]),
                count(row["num_samples"]),
                decimals(4)(row["statistic"]),
                probability(row["pvalue"]),
                ratio(row["shift_ratio"]),
            ]
        )
    notes = [
        "Rows too short for any D to have p < alpha are left out. Short rows reach a large D by chance: look at p."
    ]
    return Table(f"The {len(cells)} rows of largest D", columns, cells, notes)


def token_table(ticket: Mapping[str, Any], alpha: float) -> Table:
    """The rows of an embedding or head as a ticket: those of largest D, with their tokens."""
    shown = ticket["largest"][:TICKET_SHOWN]
    keys = ("row", "token", "count", "statistic", "pvalue", "shift_ratio")
    title = (
        f"{ticket['tensor']}: {count(ticket['rows'])} of {count(ticket['vocab_size'])} rows with p < {alpha:g}; "
        f"the {len(shown)} of largest D"
    )
    return ticket_table(ticket_rows(*([row[key] for row in shown] for key in keys)), title=title)


def left_out_table(results: Mapping[str, Any]) -> Table:
    """Tensors that were not compared, and why."""
    cells = [[name, why] for name, why in results["not_tested"].items()]
    for side in ("before", "after"):
        cells += [[name, f"only in {side}"] for name in results[f"only_{side}"]]
    return Table(
        f"{len(cells)} tensors that were not compared",
        [Column("tensor", numeric=False), Column("", numeric=False)],
        cells,
    )


def left_out_sentence(results: Mapping[str, Any]) -> str:
    """How many tensors were not compared; empty where all were."""
    parts = {"not tested": results["not_tested"]}
    parts |= {f"only in {side}": results[f"only_{side}"] for side in ("before", "after")}
    named = [f"{len(names)} {what} ({_some(list(names))})" for what, names in parts.items() if names]
    return f"Not compared: {'; '.join(named)}." if named else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def reading(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what they do not, a sentence each."""
    kinds = results["kinds"]
    alpha = results["alpha"]
    most = max(kinds, key=lambda kind: kinds[kind]["share"]["nominal"])
    moved = max(kinds, key=lambda kind: kinds[kind]["median_shift_ratio"] or 0)
    sentences = []
    if kinds[most]["share"]["nominal"]:
        sentences.append(
            f"The largest share of rows with p < {alpha:g} is in {most}: {percent(kinds[most]['share']['nominal'])} of "
            f"{count(kinds[most]['rows'])}."
        )
    else:
        sentences.append(f"No row of any matrix has p < {alpha:g}.")
    if kinds[moved]["median_shift_ratio"]:
        sentences.append(
            f"Where rows moved, they moved most in {moved}: its median shift ratio is "
            f"{ratio(kinds[moved]['median_shift_ratio'])}."
        )
    return [
        *sentences,
        "The test is less sensitive on short rows: kinds whose rows differ in width are compared by their shift ratios "
        "rather than by shares.",
        "Rows of one matrix are not independent, and before and after are paired: alpha and all corrections are nominal.",
        "D compares distributions of values. It says nothing about direction: a permuted row, or one whose values moved both "
        "ways alike, has a small D although it moved.",
    ]
