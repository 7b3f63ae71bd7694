"""Reads back what runs have left: results.json of a run or a comparison, and metrics.jsonl.

A file that is damaged, edited or of another kind is one sentence that names file and key, raised where it is read; what
these readers return can be relied on. Keys that no model below names are kept as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ksl_ds.errors import UserError
from ksl_ds.files import Count, Number, Record, checked, parse_json, read_json, read_text


class Scores(Record):
    """What an evaluation found. JSON has null for NaN."""

    __pydantic_extra__: dict[str, Number | None]
    trained_parameters: Number
    test_loss: Number | None
    bleu: Number | None
    chrf: Number | None
    first_line_bleu: Number | None
    signatures: dict[str, str] = {}
    spread: dict[str, Number | None] = {}  # of the means of a comparison


class Stage(Scores):
    """A stage of a run."""

    steps: Count
    planned_steps: Count


class TextPart(Record):
    """One of a run's texts: training, validation or test."""

    pairs: Count
    dropped: dict[str, Count]
    sha256: str


class Environment(Record):
    """As `environment.hardware_and_versions` gives it."""

    versions: dict[str, str]
    ranks: Count
    gpus_of_a_host: list[str]
    cpu: str
    cpu_cores: Count
    memory_bytes: Count
    system: str
    git_commit: str | None


class RecordedRecipe(Record):
    """The parts of a recorded recipe that are looked at one by one; the whole is compared with another recipe."""

    seed: int
    text: dict[str, Any]
    draw: dict[str, Any]


class Results(Record):
    """results.json of a run."""

    stages: dict[str, Stage]
    baselines: dict[str, Scores]
    text: dict[str, TextPart]
    environment: Environment
    recipe: RecordedRecipe
    resumed: list[dict[str, Any]] = []


class Tested(Record):
    """A system's score in a paired bootstrap; a baseline has no difference from itself."""

    score: Number
    mean: Number
    half_width: Number
    difference: Number | None
    p: Number | None


class Metrics(Record):
    """Tests by metric, on one text."""

    __pydantic_extra__: dict[str, Tested]
    bleu: Tested


class SeedTest(Record):
    """Tests of one seed, on the whole outputs and on their first lines."""

    whole: Metrics
    first_line: Metrics


class EntryRun(Record):
    """An entry with one seed: its scores, or why there are none."""

    # May be absent, but not null.
    scores: Scores = Field(default=None)  # type: ignore[assignment]
    missing: str = Field(default=None)  # type: ignore[assignment]
    same_as: str = Field(default=None)  # type: ignore[assignment]


class Comparison(Record):
    """The `comparison` section of a comparison's results.json."""

    order: list[str]
    seeds: list[int]
    runs: dict[str, dict[str, EntryRun]]
    tests: dict[str, dict[str, Annotated[dict[str, SeedTest], Field(min_length=1)]]]

    @model_validator(mode="after")
    def _is_complete(self) -> Comparison:
        for key in self.order:
            if key not in self.runs:
                raise ValueError(f"runs has no {key}, which order names")
        for baseline, by_key in self.tests.items():
            for key, by_seed in by_key.items():
                for seed, test in by_seed.items():
                    if key != baseline and None in (*_of_bleu(test.whole), *_of_bleu(test.first_line)):
                        raise ValueError(f"tests.{baseline}.{key}.{seed} has no difference or no p")
        return self


class ComparisonResults(Record):
    """results.json of a comparison, as far as its tables and sentences read it."""

    comparison: Comparison
    stages: dict[str, Scores]
    baselines: dict[str, Scores]

    @model_validator(mode="after")
    def _is_complete(self) -> ComparisonResults:
        for key in self.comparison.order:
            if key not in self.stages and any(run.scores for run in self.comparison.runs[key].values()):
                raise ValueError(f"stages has no {key}, which has scores")
        return self


class MetricsLine(Record):
    """A line of metrics.jsonl: of these numbers figures are made."""

    stage: str
    step: Count
    loss: Number | None = None
    valid_loss: Number | None = None
    learning_rate: Number | None = None
    gradient_norm: Number | None = None
    ticket_size: Number | None = None
    ticket_overlap: Number | None = None


def _of_bleu(metrics: Metrics) -> tuple[float | None, float | None]:
    return metrics.bleu.difference, metrics.bleu.p


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results.json of the run in a folder; None where there is none. Raises UserError for a file of another kind."""
    path = folder / "results.json"
    if not path.exists():
        return None
    content = read_json(path)
    if isinstance(content, dict) and "comparison" in content:
        raise UserError(f"{path} is of a comparison, not of a run; choose another run_dir")
    return checked(content, Results, str(path))


def read_comparison(path: Path) -> dict[str, Any]:
    """The results.json of a comparison. Raises UserError for another file."""
    content = read_json(path)
    if not isinstance(content, dict) or "comparison" not in content:
        raise UserError(f"{path} holds no comparison; compare writes one into the results.json of its run folder")
    return checked(content, ComparisonResults, str(path))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.jsonl in a folder; none where there is no such file.

    A line that was cut off, by a kill or a full disk, is left out.

    Raises
    ------
    UserError
        For a line of another kind.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(read_text(path).split("\n"), 1):
        where = f"{path}, line {number}"
        try:
            line = parse_json(text, where)
        except UserError:
            if text and not text.startswith("{"):
                raise
            continue
        lines.append(checked(line, MetricsLine, where))
    return lines
