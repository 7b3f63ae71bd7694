"""What tickets share, as people read it: tables, a heat map, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from ksl_ds.lottery.overlap import Overlaps
from ksl_ds.report.html import Section, figure, table, write_report
from ksl_ds.report.plots import draw_heat_map, style
from ksl_ds.report.tables import Column, Table, count, decimals, visible

ROWS_SHOWN = 20


def overlap_table(overlaps: Overlaps) -> Table:
    """Sizes on the diagonal; below it shared rows, above it Jaccard overlaps."""
    numbers = range(len(overlaps.names))
    cells = [
        [
            overlaps.names[row],
            *(
                count(len(overlaps.rows[row]))
                if row == column
                else decimals(3)(overlaps.jaccard(row, column))
                if row < column
                else f"{overlaps.shared(row, column):,} ({overlaps.by_chance(row, column):.1f})"
                for column in numbers
            ),
        ]
        for row in numbers
    ]
    notes = [
        "Diagonal: rows of a ticket. Above: Jaccard overlap, shared rows divided by the rows of either. Below: shared rows, "
        "and in brackets how many two random tickets of these sizes share.",
        f"Mean Jaccard overlap of all pairs: {decimals(3)(overlaps.mean_jaccard())}.",
    ]
    return Table("What the tickets share", [Column("", numeric=False), *map(Column, overlaps.names)], cells, notes)


def shared_rows_table(overlaps: Overlaps, tokens: Mapping[int, str]) -> Table:
    """Rows of all tickets, and of one alone, with their tokens."""
    groups = {"all": overlaps.common()}
    groups |= {f"{name} only": overlaps.only(number) for number, name in enumerate(overlaps.names)}
    rows = [[name, count(len(ids)), _listed(ids, tokens)] for name, ids in groups.items()]
    columns = [Column("in", numeric=False), Column("rows"), Column("tokens", numeric=False)]
    return Table("Rows of all tickets, and of one alone", columns, rows)


def _listed(ids: Sequence[int], tokens: Mapping[int, str]) -> str:
    shown = " ".join(visible(tokens.get(number)) if tokens.get(number) else str(number) for number in ids[:ROWS_SHOWN])
    return shown + (f" ... ({len(ids) - ROWS_SHOWN:,} more)" if len(ids) > ROWS_SHOWN else "")


def alpha_table(by_alpha: Mapping[float, Overlaps]) -> Table:
    """How sizes and overlaps grow with alpha."""
    names = next(iter(by_alpha.values())).names
    columns = [Column("alpha"), *(Column(f"rows, {name}") for name in names)]
    columns += [Column("in all"), Column("mean Jaccard")]
    rows = [
        [
            f"{alpha:g}",
            *(count(len(rows)) for rows in overlaps.rows),
            count(len(overlaps.common())),
            decimals(3)(overlaps.mean_jaccard()),
        ]
        for alpha, overlaps in by_alpha.items()
    ]
    return Table("Rows with p < alpha of the same KS tests", columns, rows)


def overlap_map(overlaps: Overlaps) -> Figure:
    """Jaccard overlaps of all pairs as a heat map; sizes on the diagonal."""
    size = len(overlaps.names)
    values = np.array([[overlaps.jaccard(row, column) for column in range(size)] for row in range(size)], dtype=float)
    np.fill_diagonal(values, np.nan)
    texts = [
        [
            f"{len(overlaps.rows[row]):,} rows" if row == column else f"{values[row, column]:.2f}"
            for column in range(size)
        ]
        for row in range(size)
    ]
    with style():
        drawn = Figure(figsize=(2.2 + 0.7 * size, 1.6 + 0.5 * size), layout="constrained")
        axes = drawn.subplots()
        draw_heat_map(axes, values, texts, overlaps.names, overlaps.names, turned=30)
        axes.set_title("Jaccard overlap")
    return drawn


def write_overlap_report(
    path: Path, overlaps: Overlaps, by_alpha: Mapping[float, Overlaps], tokens: Mapping[int, str]
) -> None:
    """Writes a page with the tables and the heat map. Raises UserError if it cannot be written."""
    body = Markup(table(overlap_table(overlaps))) + figure(
        "Jaccard overlap of all pairs", overlap_map(overlaps), "overlap"
    )
    sections = [Section("Overlaps", body), Section("Rows", table(shared_rows_table(overlaps, tokens)))]
    if by_alpha:
        sections.append(Section("Levels", table(alpha_table(by_alpha))))
    write_report(
        path,
        title="What the tickets share",
        summary=", ".join(overlaps.names),
        sections=sections,
    )
