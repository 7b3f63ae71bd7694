"""What a comparison of directions has found: the schema of its results.json."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ksl_ds.config.methods import Stage
from ksl_ds.environment import Environment
from ksl_ds.files import Record
from ksl_ds.report.records import BootstrapScore, DirectionScores, Document

JOINT, UNION, INTERSECTION, RANDOM = "joint", "union", "intersection", "random"


class Kind(str, Enum):
    """What a score is of; the value is its key in results.json."""

    UNTUNED = "untuned"
    EMBED = "embed"  # the whole embedding, tuned on a direction, or on all
    TRAINED = "trained"  # a ticket's rows, trained on the direction from their base values
    APPLIED = "applied"  # rows that were tuned on another direction, as they are


@dataclass(frozen=True)
class TransferRun:
    """A scored stage of a run, and of which directions it is."""

    kind: Kind
    source: str  # whose rows
    directions: list[str]
    seed: int
    folder: Path
    stage: Stage


class DirectionScore(Record):
    """Rows of `source` on `direction`, with one seed; `test` against the direction's own ticket, trained."""

    kind: Annotated[Kind, Field(strict=False)]  # text in JSON
    source: str
    direction: str
    seed: int
    scores: DirectionScores
    test: BootstrapScore | None = None


class MultilingualResults(Document):
    """results.json of a comparison of directions."""

    directions: list[str]
    seeds: list[int]
    tickets: dict[str, dict[str, list[int]]]  # token ids, by seed and source
    scores: list[DirectionScore]
    environment: Environment
    recipe: dict[str, Any]

    def mean(self, kind: Kind, source: str, direction: str, score: str) -> float | None:
        """A score's mean over the seeds; None where it is not known for any."""
        values = [
            getattr(found.scores, score)
            for found in self.scores
            if (found.kind, found.source, found.direction) == (kind, source, direction)
        ]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None
