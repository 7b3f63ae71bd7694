"""The figures of a comparison of directions; report/plots.py says what all figures share."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ksl_ds.multilingual.records import MultilingualResults
from ksl_ds.multilingual.tables import SHOWN, matrix_rows
from ksl_ds.report.plots import draw_heat_map, style


def transfer_map(results: MultilingualResults, score: str) -> Figure:
    """A transfer matrix as a heat map; the better a score within its direction, the darker its cell."""
    title, digits = SHOWN[score]
    rows = [
        (label, [results.mean(kind, sources[direction], direction, score) for direction in results.directions])
        for label, kind, sources in matrix_rows(results)
    ]
    rows = [(label, values) for label, values in rows if any(value is not None for value in values)]
    values = np.array([[np.nan if value is None else value for value in of] for _, of in rows], dtype=float)
    goodness = -values if score == "test_loss" else values
    least = np.nanmin(goodness, axis=0)
    spread = np.nanmax(goodness, axis=0) - least
    shade = (goodness - least) / np.where(spread > 0, spread, 1)
    texts = [["" if value is None else f"{value:.{digits}f}" for value in of] for _, of in rows]
    with style():
        drawn = Figure(figsize=(3.0 + 0.8 * len(results.directions), 1.4 + 0.24 * len(rows)), layout="constrained")
        axes = drawn.subplots()
        draw_heat_map(axes, shade, texts, [label for label, _ in rows], results.directions)
        axes.set_title(title)
    return drawn
