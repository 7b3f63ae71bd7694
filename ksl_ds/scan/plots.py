"""The figures of a scan; report/plots.py says what all figures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ksl_ds.report.plots import draw_heat_map, style

OUTSIDE = "–"  # the row of tensors outside the layers


def heat_map(
    results: Mapping[str, Any],
    value: Callable[[Mapping[str, Any]], float | None],
    show: Callable[[float], str],
    title: str,
) -> Figure:
    """A cell for each layer and module kind, with its value printed in it; the first row is outside the layers."""
    kinds = list(results["kinds"])
    layers = sorted({cell["layer"] for cell in results["cells"]}, key=lambda layer: -1 if layer is None else layer)
    values = np.full((len(layers), len(kinds)), np.nan)
    for cell in results["cells"]:
        found = value(cell)
        values[layers.index(cell["layer"]), kinds.index(cell["kind"])] = np.nan if found is None else found
    texts = [["" if np.isnan(number) else show(number) for number in line] for line in values]
    names = [OUTSIDE if layer is None else str(layer) for layer in layers]
    with style():
        figure = Figure(figsize=(1.2 + 0.55 * max(len(kinds), 6), 1.9 + 0.2 * len(layers)), layout="constrained")
        axes = figure.subplots()
        draw_heat_map(axes, values, texts, names, kinds, turned=60, font_size=6.5)
        axes.set(ylabel="layer", title=title)
    return figure


def layer_profile(results: Mapping[str, Any]) -> Figure:
    """By layer, all its rows together: share of rows by rule, and the shift ratio of the rows that moved."""
    layers = sorted((entry for entry in results["layers"] if entry["layer"] is not None), key=lambda one: one["layer"])
    at = [entry["layer"] for entry in layers]
    with style():
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        shares, ratios = figure.subplots(1, 2)
        rules = {"nominal": "p < alpha", "benjamini_hochberg": "BH", "bonferroni": "Bonferroni"}
        for (rule, label), mark in zip(rules.items(), "os^", strict=True):
            shares.plot(at, [100 * entry["share"][rule] for entry in layers], f"{mark}-", markersize=3, label=label)
        for key, mark in (("median", "o"), ("largest", "s")):
            found = [entry[f"{key}_shift_ratio"] or np.nan for entry in layers]
            ratios.plot(at, found, f"{mark}-", markersize=3, label=key)
        if any(entry["moved"] for entry in layers):
            ratios.set_yscale("log")  # without the layers that have not moved
        top = max(entry["share"]["nominal"] for entry in layers)
        shares.set(title="rows, %", xlabel="layer", ylim=(0, None if top else 1))
        ratios.set(title="shift ratio", xlabel="layer")
        for axes in (shares, ratios):
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.legend()
    return figure
