"""The files of numbers that runs leave: results.json of a run or a comparison, and metrics.jsonl.

The records below are the schema of results.json. Commands fill them and write them with `to_json`; whoever reads one gets it
from `from_json`. A file that is damaged, edited or of another kind is one sentence that names file and key, raised where it
is read; what these readers return can be relied on. Keys that no record names are kept as they are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from ksl_ds.environment import Environment
from ksl_ds.errors import UserError
from ksl_ds.files import Count, Number, Record, checked, json_text, parse_json, read_json, read_text, record_of

# 1: until version 0.1, without the key. 2: with it, and without stages' first_line_chrf.
FORMAT_VERSION = 2


class DirectionScores(Record):
    """How good a model is on the test text of one direction."""

    test_loss: Number | None
    bleu: Number | None
    chrf: Number | None
    first_line_bleu: Number | None
    comet: Number | None = None
    stop_rate: Number | None
    output_length: Number | None  # tokens


class Scores(Record):
    """How good a model is on the test text, and what it cost. None: NaN, or not measured.

    With several directions the scores are means over them.
    """

    __pydantic_extra__: dict[str, Number | None]
    trained_parameters: Number
    test_loss: Number | None
    bleu: Number | None
    chrf: Number | None
    first_line_bleu: Number | None
    comet: Number | None = None  # where evaluation.comet names a model
    stop_rate: Number | None = None
    output_length: Number | None = None  # tokens
    signatures: dict[str, str] = {}  # sacrebleu's, by metric; of COMET the model
    seconds: Number | None = None  # of the training
    evaluation_seconds: Number | None = None
    tuned_file_bytes: Number | None = None
    optimizer_bytes: Number | None = None
    peak_memory_bytes: Number | None = None  # of the training; of the evaluation where nothing was trained
    valid_loss: Number | None = None
    directions: dict[str, DirectionScores] = {}
    spread: dict[str, Number | None] = {}  # standard deviations over the seeds of a comparison
    seeds: Count = 1  # of a comparison, over which these are means

    def numbers(self) -> dict[str, float]:
        """The numbers among these, NaN left out."""
        return {name: value for name, value in self.content().items() if isinstance(value, (int, float))}


class StageResult(Scores):
    """A stage of a run."""

    steps: Count
    planned_steps: Count


class TextPart(Record):
    """One of a run's texts: training, validation or test."""

    pairs: Count
    dropped: dict[str, Count]  # by reason
    sha256: str
    directions: dict[str, Count] = {}  # pairs of each; of training, as often as they occur in an epoch


class RecordedRecipe(Record):
    """The parts of a recorded recipe that are looked at one by one; the whole is compared with another recipe."""

    seed: int
    text: dict[str, Any]
    draw: dict[str, Any]


class Document(Record):
    """A whole results.json."""

    format_version: Count = 1

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Reads a file's text. Raises UserError, naming `where`, for another kind of file or a newer version of this one."""
        return cls.from_content(parse_json(text, where), where)

    @classmethod
    def from_content(cls, content: Any, where: str) -> Self:
        """As `from_json`, from parsed JSON."""
        document = record_of(content, cls, where)
        if document.format_version > FORMAT_VERSION:
            raise UserError(
                f"{where} has format_version {document.format_version}, but this version of ksl_ds reads up to "
                f"{FORMAT_VERSION}; update ksl_ds"
            )
        return document

    def to_json(self) -> str:
        """The file's text: JSON with sorted keys; NaN becomes null."""
        return json_text({**self.content(), "format_version": FORMAT_VERSION})


class RunResults(Document):
    """results.json of a run."""

    stages: dict[str, StageResult]
    baselines: dict[str, Scores]
    text: dict[str, TextPart]
    environment: Environment
    recipe: RecordedRecipe
    resumed: list[dict[str, Any]] = []  # one item each time: stage, step, ranks, ranks_before
    target_modules: list[str] = []  # of LoRA
    draw: dict[str, Any] = {}  # of a lottery: settings, and `tokens`
    scan: dict[str, Any] = {}  # a summary of scan/results.json
    certificate: dict[str, Any] = {}


class BootstrapScore(Record):
    """A system's score in a paired bootstrap; a baseline has no difference from itself."""

    score: Number
    mean: Number
    half_width: Number
    difference: Number | None
    p: Number | None


class Metrics(Record):
    """Tests by metric, on one text."""

    __pydantic_extra__: dict[str, BootstrapScore]
    bleu: BootstrapScore

    def __getitem__(self, metric: str) -> BootstrapScore:
        """The test of a metric: `bleu` or `chrf`."""
        return getattr(self, metric)


class SeedTest(Record):
    """Tests of one seed, on the whole outputs and on their first lines."""

    whole: Metrics
    first_line: Metrics

    def __getitem__(self, text: str) -> Metrics:
        """The tests on `whole` outputs or on `first_line`."""
        return getattr(self, text)


class EntryRun(Record):
    """An entry with one seed: its scores and where they come from, or why there are none."""

    # May be absent, but not null.
    scores: StageResult = Field(default=None)  # type: ignore[assignment]
    folder: str = Field(default=None)  # type: ignore[assignment]
    stage: str = Field(default=None)  # type: ignore[assignment]
    missing: str = Field(default=None)  # type: ignore[assignment]
    same_as: str = Field(default=None)  # type: ignore[assignment]
    failed: bool = False
    empty: bool = False


class ComparisonSection(Record):
    """The `comparison` section of a comparison's results.json."""

    order: list[str]
    seeds: list[int]
    runs: dict[str, dict[str, EntryRun]]
    tests: dict[str, dict[str, Annotated[dict[str, SeedTest], Field(min_length=1)]]]
    signatures: dict[str, str] = {}

    @model_validator(mode="after")
    def _is_complete(self) -> ComparisonSection:
        for key in self.order:
            if key not in self.runs:
                raise ValueError(f"runs has no {key}, which order names")
        for baseline, by_key in self.tests.items():
            for key, by_seed in by_key.items():
                for seed, test in by_seed.items():
                    if key != baseline and None in (*_of_bleu(test.whole), *_of_bleu(test.first_line)):
                        raise ValueError(f"tests.{baseline}.{key}.{seed} has no difference or no p")
        return self


class ComparisonResults(Document):
    """results.json of a comparison."""

    comparison: ComparisonSection
    stages: dict[str, Scores]  # means over seeds, by entry
    baselines: dict[str, Scores]
    text: dict[str, TextPart] = {}
    environment: Environment = Field(default=None)  # type: ignore[assignment]
    environments_of_runs: list[Environment] = []
    recipe: dict[str, Any] = {}

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


def finite(value: float | None) -> float | None:
    """A number as the records hold it: None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def _of_bleu(metrics: Metrics) -> tuple[float | None, float | None]:
    return metrics.bleu.difference, metrics.bleu.p


def read_results(folder: Path) -> RunResults | None:
    """The results.json of the run in a folder; None where there is none. Raises UserError for a file of another kind."""
    path = folder / "results.json"
    if not path.exists():
        return None
    content = read_json(path)
    if isinstance(content, dict) and "comparison" in content:
        raise UserError(f"{path} is of a comparison, not of a run; choose another run_dir")
    return RunResults.from_content(content, str(path))


def read_comparison(path: Path) -> ComparisonResults:
    """The results.json of a comparison. Raises UserError for another file."""
    content = read_json(path)
    if not isinstance(content, dict) or "comparison" not in content:
        raise UserError(f"{path} holds no comparison; compare writes one into the results.json of its run folder")
    return ComparisonResults.from_content(content, str(path))


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
