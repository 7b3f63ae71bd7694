"""report.html: one file that explains a run to a person, offline, on any screen and on paper.

Choices and what they cost:
- Everything is inside the file (style, figures), there is no script, and a content security policy forbids requests:
  what is written today opens in ten years. The price is that nothing can be sorted or zoomed.
- Figures are SVG whose ink is the page's text colour, so light and dark need one copy.
- Every text goes through Jinja's escaping; only `Section.body` and the figures' SVG are taken as HTML.
- The words are part of the result: what a score cannot show stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from ksl_ds import __version__
from ksl_ds.config.methods import Stage, label_of
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import Environment, hardware_and_versions
from ksl_ds.files import write_text
from ksl_ds.report.page import PAGE, PARTS, STYLE
from ksl_ds.report.plots import direction_bars, svg
from ksl_ds.report.records import Scores
from ksl_ds.report.tables import Column, Table, direction_table, in_order, memory, stage_table, ticket_table

NOTHING: Mapping[str, Any] = MappingProxyType({})
TICKET_ROWS = 200  # a larger ticket is cut here; ticket.json has all of it

_jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_parts: Any = _jinja.from_string(PARTS).module


@dataclass
class Section:
    """A part of the page. `body` is HTML: build it with `table`, `figure`, `paragraphs`, `bullets`."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """The fragment by which the contents link to the section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def table(content: Table, tall: bool = False) -> Markup:
    """A table in a box that scrolls sideways on narrow screens (a `tall` one downwards too), with its notes."""
    return Markup(_parts.table(content, tall))


def figure(caption: str, content: Figure, prefix: str) -> Markup:
    """A figure with its caption; `prefix` must differ between the figures of a page."""
    return Markup(_parts.figure(caption, Markup(svg(content, prefix))))


def paragraphs(*texts: str) -> Markup:
    """Plain text, a paragraph each."""
    return Markup(_parts.paragraphs(texts))


def bullets(*texts: str) -> Markup:
    """Plain text, a list item each."""
    return Markup(_parts.bullets(texts))


def samples_html(samples: Sequence[Mapping[str, Any]]) -> Markup:
    """Translations beside their source and reference: {"source", "reference", stage: hypothesis, ...} each."""
    cards = []
    for sample in samples:
        stages = in_order({name: None for name in sample if name not in ("source", "reference")})
        # As the first-line score cuts it: leading line breaks do not count.
        shown = [(label_of(stage), *(sample[stage] or "").strip().partition("\n")[::2]) for stage in stages]
        cards.append((sample["source"], sample["reference"], shown))
    return Markup(_parts.samples(cards))


def what_was_run(recipe: Recipe, pairs: Mapping[str, int], steps: Mapping[str, int], ranks: int) -> str:
    """The run in one sentence; `pairs` by part of the text (train, valid, test), `steps` by stage."""
    text = recipe.text
    counted = ", ".join(f"{number:,} {part}" for part, number in pairs.items())
    languages = f"{text.source_language} to {text.target_language}"
    if text.directions:
        languages = (
            f"{len(text.directions)} direction{'' if len(text.directions) == 1 else 's'} ({', '.join(text.directions)})"
        )
    trained = " and ".join(
        f"{number:,} step{'' if number == 1 else 's'} of {label_of(stage)}" for stage, number in steps.items() if number
    )
    return (
        f"{recipe.model.path}, {languages}, {counted} pairs"
        f"{trained and f', {trained}'} with batches of {recipe.training.batch_size} "
        f"in {recipe.training.precision} on {ranks} rank{'' if ranks == 1 else 's'}."
    )


def reading(stages: Mapping[str, Scores]) -> list[str]:
    """What the scores do and do not show, one sentence for each thing that a reader could miss."""
    sentences = []
    untuned = stages.get(Stage.UNTUNED)
    copying = stages.get(Stage.COPYING_SOURCE)
    for stage in in_order(stages):
        scores = stages[stage]
        name = label_of(stage)
        if stage in (Stage.UNTUNED, Stage.COPYING_SOURCE):
            continue
        if stopping := learned_to_stop(scores, untuned):
            sentences.append(f"{name}: {stopping}")
        if (both := pair(scores, copying, "chrf")) and both[0] <= both[1]:
            sentences.append(
                f"{name}: its chrF++ ({both[0]:.1f}) is not above that of copying the source ({both[1]:.1f})."
            )
        if (both := pair(scores, untuned, "test_loss")) and both[0] >= both[1]:
            sentences.append(f"{name}: the test loss is not below the untuned model's.")
    return sentences


def learned_to_stop(scores: Scores, untuned: Scores | None) -> str:
    """A sentence if at least half of a gain in BLEU is missing on the first line; empty otherwise."""
    whole = pair(scores, untuned, "bleu")
    first_lines = pair(scores, untuned, "first_line_bleu")
    if whole is None or first_lines is None:
        return ""
    raw = whole[0] - whole[1]
    first = first_lines[0] - first_lines[1]
    if raw < 0.5 or first >= raw / 2:
        return ""
    line = f"only by {first:.1f} on the first line"
    share = "more than half"
    if first <= 0.05:
        share = "all"
        line = f"but falls by {-first:.1f} on the first line" if first < -0.05 else "but not on the first line"
    return f"BLEU rises by {raw:.1f} over the untuned model, {line}: {share} of the gain is the model learning to stop."


def pair(one: Scores, other: Scores | None, name: str) -> tuple[float, float] | None:
    """A score of two stages, where both have it."""
    left = getattr(one, name)
    right = getattr(other, name, None)
    return None if left is None or right is None else (left, right)


def environment_table(environment: Environment) -> Table:
    """Hardware and versions."""
    gpus = environment.gpus_of_a_host
    rows = [
        ["ranks", str(environment.ranks)],
        ["accelerators of a host", ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none"],
        ["processor", f"{environment.cpu}, {environment.cpu_cores} cores"],
        ["memory of a host", memory(environment.memory_bytes)],
        ["system", environment.system],
        ["git commit of the working directory", environment.git_commit or "none"],
    ]
    rows += [[name, version] for name, version in environment.versions.items()]
    return Table("Hardware and versions", [Column("", numeric=False), Column("", numeric=False)], rows)


def write_report(
    path: Path,
    *,
    title: str,
    recipe_yaml: str = "",
    stages: Mapping[str, Scores] = NOTHING,
    ticket_rows: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Figure] = NOTHING,
    samples: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    summary: str = "",
    sections: Sequence[Section] = (),
    environment: Environment | None = None,
) -> None:
    """Writes the report, whole or not at all. A part without content is left out.

    Parameters
    ----------
    path
        The HTML file to write.
    title, summary
        The heading, and the run in one sentence (see `what_was_run`).
    recipe_yaml
        The recipe, shown at the end.
    stages
        Scores by stage as in results.json; put `copying_source` among them.
    ticket_rows
        As for `tables.ticket_table`.
    figures
        By caption.
    samples
        As for `samples_html`.
    notes
        Remarks on this run that a reader must know, such as dropped pairs; beside the scores where there are some.
    sections
        Further parts (a certificate, a comparison), shown between the figures and the samples.
    environment
        Of this process unless given.

    Raises
    ------
    UserError
        When the file cannot be written.
    """
    parts = []
    if stages:
        scores = stage_table(stages)
        body = table(scores) + Markup(_parts.reading(reading(stages), [*notes]))
        parts.append(Section("Scores", body))
        by_direction = direction_table(stages)
        if by_direction.rows:
            bars = figure("Test loss and BLEU by direction", direction_bars(stages), "directions")
            parts.append(Section("Directions", table(by_direction) + bars))
    if ticket_rows:
        parts.append(
            Section("Ticket", table(ticket_table(ticket_rows, TICKET_ROWS), tall=True) + Markup(_parts.ticket()))
        )
    if figures:
        drawn = (figure(caption, content, f"f{number}") for number, (caption, content) in enumerate(figures.items()))
        parts.append(Section("Figures", Markup("\n").join(drawn)))
    parts += sections
    if notes and not stages:
        parts.append(Section("Notes", paragraphs(*notes)))
    if samples:
        parts.append(Section("Sample translations", samples_html(samples)))
    if recipe_yaml:
        parts.append(Section("Recipe", Markup(_parts.recipe(recipe_yaml))))
    environment = environment or hardware_and_versions()
    parts.append(Section("Hardware and versions", table(environment_table(environment))))
    page = _jinja.from_string(PAGE).render(
        style=Markup(STYLE),
        title=title,
        summary=summary,
        parts=[(part.anchor, part.title, Markup(part.body)) for part in parts],
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_text(path, page + "\n")
