"""The figures of a run, for report.html and for wandb. Every function returns a Figure and keeps no state.

Choices and what they cost:
- No pyplot, hence no global state and no display; figures are plain objects that the garbage collector takes.
- Light and dark: the background is transparent, curves have mid-tones that stand out on both, and everything in `INK`
  becomes the page's text colour in report.html (`svg` does that) and is dark on white in wandb.
- Large vocabularies stay light: clouds of points are one embedded picture, curves are thinned to `MAX_POINTS` by
  averaging neighbours, ECDFs are drawn on a grid. A 128k vocabulary gives figures of some 100 kB.
- Text stays text in the SVG: searchable, read aloud, in whatever fonts the reader has; the widths that matplotlib
  planned for are then a little off.

Legend: V tokens, D coordinates, K ticket rows.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ksl_ds.config.methods import label_of
from ksl_ds.report.records import Scores
from ksl_ds.report.tables import in_order, visible

INK = "#24292f"  # replaced by currentColor in the SVG
PALETTE = ["#2f80d0", "#d9730d", "#2f9e5f", "#a06cd5", "#d6457f", "#1f99a8", "#8a7a3a", "#7c8794"]
MAX_POINTS = 400
ECDF_POINTS = 300
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ksl_ds",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def style() -> AbstractContextManager[None]:
    """The style of all figures, for a `with` block; matplotlib's own settings come back after it."""
    settings: Any = STYLE  # matplotlib's stubs list every key as a literal
    return matplotlib.rc_context(settings)


@contextmanager
def _quiet_drawing() -> Iterator[None]:
    """Tokens of all scripts occur in titles; matplotlib warns of each sign that its own font lacks."""
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def png(figure: Figure) -> bytes:
    """The figure as a picture on white."""
    with _quiet_drawing(), io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")
        return file.getvalue()


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an `svg` element for an HTML page; `prefix` keeps its ids apart from those of other figures."""
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with _quiet_drawing(), io.StringIO() as file:
        figure.savefig(file, format="svg", dpi=150, metadata=nothing)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns:xlink="[^"]*"|xmlns="[^"]*"|version="[^"]*")', "", text)
    text = text.replace("xlink:href=", "href=").replace(INK, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", text, count=1)
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss (training and validation), learning rate and gradient norm by step, from the lines of metrics.jsonl.

    Lines with `ticket_size` and `ticket_overlap` (draws during the training) add a panel.
    """
    stages = in_order({line["stage"]: None for line in metrics if line.get("loss") is not None})
    colors = dict(zip(stages, PALETTE * len(stages), strict=False))
    draws = _series(metrics, "ticket_size")
    with style():
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        (loss, rate), (norm, last) = figure.subplots(2, 2)
        for stage in stages:
            lines = [line for line in metrics if line["stage"] == stage]
            for axes, key in ((loss, "loss"), (rate, "learning_rate"), (norm, "gradient_norm")):
                axes.plot(*_thin(*_series(lines, key)), color=colors[stage], label=label_of(stage))
            valid = _series(lines, "valid_loss")
            loss.plot(*valid, "o--", color=colors[stage], markersize=3.5, linewidth=0.9)
        if len(_series(metrics, "valid_loss")[0]):
            loss.plot([], [], "o--", color=INK, markersize=3.5, linewidth=0.9, label="validation")
        rates = _series(metrics, "learning_rate")[1]
        rates = rates[rates > 0]
        if len(rates) and rates.max() > 50 * np.median(rates):
            rate.set_yscale("log")
        for axes, title in ((loss, "loss"), (rate, "learning rate"), (norm, "gradient norm")):
            axes.set(title=title, xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(draws[0]):
            _draws_panel(last, draws, _series(metrics, "ticket_overlap"))
        else:
            last.axis("off")
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _draws_panel(axes: Axes, size: tuple[np.ndarray, np.ndarray], overlap: tuple[np.ndarray, np.ndarray]) -> None:
    axes.plot(*size, "o-", color=PALETTE[3], markersize=3)
    axes.set(title="ticket size, by draws on the way", xlabel="step", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    other = axes.twinx()
    other.plot(*overlap, "--", color=PALETTE[4])
    other.set(ylim=(0, 1.03), ylabel="overlap with the last (dashed)")
    other.grid(False)


def d_histogram(statistic_V: np.ndarray, thresholds: Mapping[float, float]) -> Figure:
    """How many rows have which D, and the first D that each alpha rejects, {alpha: D}. Counts on a log scale."""
    statistic_V = np.asarray(statistic_V, dtype=np.float64)
    with style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.hist(statistic_V, bins=_lattice_bins(statistic_V).tolist(), color=PALETTE[0], log=True)
        # Neighbouring values of D are at least 1/d apart, and float32 may have been rounded below its own threshold.
        for color, (alpha, threshold) in zip(PALETTE[1:], sorted(thresholds.items()), strict=False):
            above = int((statistic_V >= threshold * (1 - 1e-6)).sum())
            label = f"α = {alpha:g}: D ≥ {threshold:.4f}, {above:,} row{'' if above == 1 else 's'}"
            axes.axvline(threshold, color=color, linestyle="--", label=label)
        axes.set(xlabel="D", ylabel="embedding rows", xlim=(0, None))
        if thresholds:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _lattice_bins(statistic_V: np.ndarray) -> np.ndarray:
    """Bin edges between the values that D = k/d can take, so that every bin holds equally many of them."""
    values = np.unique(statistic_V)
    step = np.diff(values).min(initial=1.0)
    group = np.ceil(values[-1] / step / 90) or 1
    return np.arange(-0.5, values[-1] / step + group, group) * step


def ecdf_rows(
    before_KD: np.ndarray,
    after_KD: np.ndarray,
    token_texts: Sequence[str],
) -> Figure:
    """The distribution functions of rows before and after tuning, and the distance D between them; at most six."""
    before_KD, after_KD = np.asarray(before_KD, np.float64)[:6], np.asarray(after_KD, np.float64)[:6]
    rows = len(before_KD)
    columns = min(rows, 3)
    with style():
        figure = Figure(figsize=(7.2, 0.5 + 2.1 * -(-rows // columns)), layout="constrained")
        panels = figure.subplots(-(-rows // columns), columns, sharey=True, squeeze=False).ravel()
        for axes in panels[rows:]:
            axes.axis("off")
        for axes, before_D, after_D, token in zip(panels, before_KD, after_KD, token_texts, strict=False):
            both = np.sort(np.concatenate([before_D, after_D]))
            lowest, highest = np.quantile(both, [0.002, 0.998])
            grid = np.linspace(float(lowest), float(highest), ECDF_POINTS)
            for sample_D, color, label in ((before_D, PALETTE[7], "before"), (after_D, PALETTE[0], "after")):
                axes.plot(grid, _ecdf(sample_D, grid), color=color, label=label)
            gaps = np.abs(_ecdf(before_D, both) - _ecdf(after_D, both))
            at = both[gaps.argmax()]
            ends = [_ecdf(before_D, at), _ecdf(after_D, at)]
            axes.plot([at, at], ends, color=PALETTE[1], linewidth=2.2, label="D")
            axes.set_title(f"{_short(visible(token))} · D = {gaps.max():.3f}", parse_math=False)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        figure.supxlabel("value of a coordinate", fontsize=9)
    return figure


def d_against(
    statistic_V: np.ndarray,
    other_V: np.ndarray,
    label: str,
    drawn_K: Sequence[int] = (),
) -> Figure:
    """D of every row against another number of it (shift ratio, training frequency); the ids `drawn_K` stand out.

    Whole numbers with a wide range go on a logarithmic axis that also holds zero.
    """
    statistic_V = np.asarray(statistic_V)
    other_V = np.asarray(other_V)
    drawn_V = np.zeros(len(statistic_V), dtype=bool)
    drawn_V[list(drawn_K)] = True
    with style():
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for mask_V, color, size, name in (
            (~drawn_V, PALETTE[7], 5, "other rows"),
            (drawn_V, PALETTE[1], 14, "ticket"),
        ):
            axes.scatter(
                other_V[mask_V],
                statistic_V[mask_V],
                s=size,
                color=color,
                alpha=0.5 if name == "other rows" else 0.95,
                linewidths=0,
                label=f"{name} ({mask_V.sum():,})",
                rasterized=True,
            )
        if np.issubdtype(other_V.dtype, np.integer) and other_V.max(initial=0) > 100:
            axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel=label, ylabel="D", ylim=(0, None))
        axes.set_xlim(left=0)
        if drawn_V.any():
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


# From nothing to the first colour, so that an empty cell of a heat map has the page's background, light or dark.
COLORS = LinearSegmentedColormap.from_list(
    "ksl_ds", [(*[int(PALETTE[0][at : at + 2], 16) / 255 for at in (1, 3, 5)], alpha) for alpha in (0.0, 0.85)]
)


def draw_heat_map(
    axes: Axes,
    shade: Any,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    turned: int = 0,
    font_size: float = 7.5,
) -> None:
    """Cells in shades from 0 to the largest, each with its text; NaN is empty. `turned`: degrees of the columns' names."""
    axes.imshow(shade, cmap=COLORS, aspect="auto", vmin=0, vmax=np.nanmax(shade, initial=0.0) or 1.0)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            axes.text(column, row, text, ha="center", va="center", fontsize=font_size, color=INK)
    slanted: dict[str, Any] = {"rotation": turned, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(len(columns)), columns, parse_math=False, **slanted)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(length=0, labelsize=8)
    axes.grid(False)


def direction_bars(stages: Mapping[str, Scores]) -> Figure:
    """Test loss and BLEU of every direction, a bar for each stage."""
    names = [stage for stage in in_order(stages) if stages[stage].directions]
    directions = list(dict.fromkeys(name for stage in names for name in stages[stage].directions))
    at = np.arange(len(directions))[::-1]
    height = 0.8 / len(names)
    with style():
        figure = Figure(figsize=(7.2, 1.1 + 0.16 * len(directions) * (len(names) + 1)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, title, score in zip(panels, ("test loss", "BLEU"), ("test_loss", "bleu"), strict=True):
            for number, stage in enumerate(names):
                values = [getattr(stages[stage].directions.get(name), score, None) or 0.0 for name in directions]
                axes.barh(
                    at + 0.4 - height * (number + 0.5),
                    values,
                    height * 0.92,
                    color=PALETTE[number],
                    label=label_of(stage),
                )
            axes.set_title(title)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
        panels[0].set_yticks(at, directions, parse_math=False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(names)))
    return figure


def stage_bars(stages: Mapping[str, Scores]) -> Figure:
    """BLEU raw and on the first line, chrF++ and stop rate of each stage, side by side."""
    names = in_order(stages)[::-1]
    at = np.arange(len(names))
    with style():
        figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(names)), layout="constrained")
        bleu, chrf, stop = figure.subplots(1, 3, sharey=True, width_ratios=[1.5, 1, 1])
        _bars(bleu, at + 0.2, 0.36, [stages[name].bleu for name in names], PALETTE[0], "raw", "{:.1f}")
        first_line = [stages[name].first_line_bleu for name in names]
        _bars(bleu, at - 0.2, 0.36, first_line, PALETTE[1], "first line", "{:.1f}")
        _bars(chrf, at, 0.6, [stages[name].chrf for name in names], PALETTE[2], "chrF++", "{:.1f}")
        _bars(stop, at, 0.6, [stages[name].stop_rate for name in names], PALETTE[3], "stop rate", "{:.2f}")
        bleu.set_yticks(at, [_short(label_of(name), 28) for name in names], parse_math=False)
        for axes, title in ((bleu, "BLEU"), (chrf, "chrF++"), (stop, "stop rate")):
            axes.set_title(title)
            axes.margins(x=0.18)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(4))
        figure.legend(*bleu.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _bars(
    axes: Axes, at: np.ndarray, height: float, values: list[float | None], color: str, label: str, form: str
) -> None:
    bars = axes.barh(at, [value or 0.0 for value in values], height, color=color, label=label)
    axes.bar_label(bars, ["–" if value is None else form.format(value) for value in values], padding=2, fontsize=8)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number; where a step was logged twice (a resumed run) the later line counts."""
    found = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    steps = sorted(found)
    return np.array(steps, dtype=np.float64), np.array([found[step] for step in steps], dtype=np.float64)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts


def _ecdf(sample_D: np.ndarray, at: np.ndarray | float) -> np.ndarray:
    return np.searchsorted(np.sort(sample_D), at, side="right") / len(sample_D)


def _short(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
