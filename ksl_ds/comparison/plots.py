"""The figures of a comparison; plots.py says what all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ksl_ds.config.methods import label_of
from ksl_ds.report.plots import INK, PALETTE, style
from ksl_ds.report.records import Scores

MARKERS = "os^Dv<>Ph*X"


def score_bars(stages: Mapping[str, Scores], intervals: Mapping[str, tuple[float, float] | None]) -> Figure:
    """BLEU of whole answers with its interval, of first lines beside it; chrF++ and test loss with their spread over seeds."""
    names = list(stages)[::-1]
    at = np.arange(len(names))
    with style():
        figure = Figure(figsize=(7.2, 1.1 + 0.36 * len(names)), layout="constrained")
        bleu, chrf, loss = figure.subplots(1, 3, sharey=True, width_ratios=[1.5, 1, 1])
        whole = [stages[name].bleu or 0.0 for name in names]
        bounds = [intervals.get(name) or (value, value) for name, value in zip(names, whole, strict=True)]
        errors = np.array(
            [[max(0.0, value - low), max(0.0, high - value)] for value, (low, high) in zip(whole, bounds, strict=True)]
        ).T
        ink = {"ecolor": INK, "elinewidth": 0.9, "capsize": 2}
        bleu.barh(at + 0.2, whole, 0.36, xerr=errors, color=PALETTE[0], label="whole answer", error_kw=ink)
        first = [stages[name].first_line_bleu or 0.0 for name in names]
        bleu.barh(at - 0.2, first, 0.36, color=PALETTE[1], label="first line")
        for axes, key, color in ((chrf, "chrf", PALETTE[2]), (loss, "test_loss", PALETTE[3])):
            values = [getattr(stages[name], key) or 0.0 for name in names]
            spread = [stages[name].spread.get(key) or 0.0 for name in names]
            axes.barh(at, values, 0.6, xerr=spread, color=color, error_kw=ink)
        bleu.set_yticks(at, [label_of(name) for name in names], parse_math=False)
        for axes, title in ((bleu, "BLEU"), (chrf, "chrF++"), (loss, "test loss")):
            axes.set_title(title)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(4))
        figure.legend(*bleu.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def loss_against_size(stages: Mapping[str, Scores]) -> Figure:
    """Test loss by the number of trained parameters, on a logarithmic axis that also holds the untuned model's zero."""
    with style():
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.subplots()
        for number, (name, stage) in enumerate(stages.items()):
            if stage.test_loss is None:
                continue
            axes.errorbar(
                max(stage.trained_parameters, 0),
                stage.test_loss,
                yerr=stage.spread.get("test_loss"),
                fmt=MARKERS[number % len(MARKERS)],
                color=PALETTE[number % len(PALETTE)],
                label=label_of(name),
                capsize=2,
            )
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=-1)
        axes.set(xlabel="trained parameters", ylabel="test loss")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def loss_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Training loss by step of every method that trains: (steps, losses)."""
    with style():
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.subplots()
        for number, (name, (steps, losses)) in enumerate(curves.items()):
            axes.plot(
                steps,
                losses,
                color=PALETTE[number % len(PALETTE)],
                linestyle=("-", "--", ":")[number // len(PALETTE) % 3],
                label=label_of(name),
            )
        axes.set(xlabel="step", ylabel="training loss of a batch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if curves:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure
