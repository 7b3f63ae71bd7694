"""Scores the model as it stands on the held-out text: loss, translations, BLEU and what they hide."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ksl_ds import distributed
from ksl_ds.config.methods import Stage
from ksl_ds.lottery.ticket_files import CARD
from ksl_ds.report import records
from ksl_ds.report.records import StageResult, finite
from ksl_ds.report.tables import decimals
from ksl_ds.sharding.engine import gathered_weights, inference_engine, stage_of
from ksl_ds.text.comet import comet_scores
from ksl_ds.text.scores import score, write_translations
from ksl_ds.text.translate import Translation, translate
from ksl_ds.training.loop import TrainingStats
from ksl_ds.training.loss import corpus_loss
from ksl_ds.training.packing import packing_of
from ksl_ds.training.run import RunContext

logger = logging.getLogger(__name__)


@contextmanager
def evaluation_model(run: RunContext) -> Iterator[tuple[nn.Module, bool]]:
    """The model ready for forward passes, and whether these are collectives of all ranks."""
    if run.recipe.evaluation.gather_weights or stage_of(run.config) < 3:
        with gathered_weights(run.model) as module:
            yield module, False
    else:
        with inference_engine(run.model, run.config) as module:
            yield module, distributed.world_size() > 1


def evaluate_stage(
    run: RunContext,
    stage: Stage,
    *,
    trained_parameters: int,
    outcome: TrainingStats | None = None,
    tuned: Path | None = None,
) -> None:
    """Scores the model as it is on the test text and records the stage as complete, unless it already is.

    Writes `results.json` and `translations/STAGE/`. Collective.

    Parameters
    ----------
    run
        The open run, which holds the model.
    stage
        The stage to record.
    trained_parameters
        Number of parameters that training may have changed.
    outcome
        The stage's training statistics, if it trains.
    tuned
        Folder of what the training saved.
    """
    if stage in run.stages:
        return
    if outcome is None:
        distributed.reset_peak_memory()
    evaluation = run.recipe.evaluation
    started = time.perf_counter()
    label = stage.label
    pairs = run.corpora["test"].pairs
    places = run.corpora["test"].by_direction()
    with evaluation_model(run) as (module, partitioned):
        packing = packing_of(run, module)
        losses = {
            name: corpus_loss(
                module,
                run.model,
                [run.examples["test"][place] for place in some],
                run.pad_id,
                evaluation.batch_size,
                packing,
            )
            for name, some in places.items()
        }
        translations = translate(
            module,
            run.tokenizer,
            run.prompts,
            evaluation,
            partitioned=partitioned,
            label=f"translating, {label}",
            shares_prompt=packing.layout == "prefix",
        )

    def score_and_write() -> dict[str, Any]:
        hypotheses = [translation.text for translation in translations]
        folder = run.dir / "translations" / stage
        write_translations(folder, [pair.source for pair in pairs], [pair.target for pair in pairs], hypotheses)
        return _scores(run, translations, losses)

    scores = distributed.run_on_rank0(score_and_write)
    shown = StageResult(
        trained_parameters=trained_parameters,
        **scores,
        steps=outcome.steps if outcome else 0,
        planned_steps=outcome.planned_steps if outcome else 0,
        valid_loss=finite(outcome.valid_loss) if outcome else None,
        seconds=outcome.seconds if outcome else 0.0,
        evaluation_seconds=time.perf_counter() - started,
        tuned_file_bytes=distributed.run_on_rank0(lambda: file_bytes(tuned)) if tuned is not None else 0,
        optimizer_bytes=outcome.optimizer_bytes if outcome else 0,
        peak_memory_bytes=max(
            distributed.gather_objects(outcome.peak_memory_bytes if outcome else distributed.peak_memory())
        ),
    )
    run.stages[stage] = shown
    by_direction = {
        f"{name}/{score}": value for name, of in shown.directions.items() for score, value in of.content().items()
    }
    run.tracker.log(stage, 0, **shown.numbers(), **by_direction)
    run.save_results()
    run.checkpoints(stage).remove()
    logger.info(
        f"{label}: test loss {decimals(3)(shown.test_loss)}, BLEU {decimals(1)(shown.bleu)}, chrF++ "
        f"{decimals(1)(shown.chrf)}, first-line BLEU {decimals(1)(shown.first_line_bleu)}, stop rate "
        f"{decimals(2)(shown.stop_rate)}" + (f", COMET {decimals(4)(shown.comet)}" if shown.comet is not None else "")
    )


def file_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, but its model card, that it does not share with another by a hard link."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file() and path.name != CARD]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def score_copying(run: RunContext) -> None:
    """What handing back the source would score: a baseline that templated text makes strong. Collective."""

    def found_on_rank0() -> dict[str, Any]:
        sources = [pair.source for pair in run.corpora["test"].pairs]
        lengths = [len(run.tokenizer(source, add_special_tokens=False).input_ids) for source in sources]
        copied = [Translation(source, length, True) for source, length in zip(sources, lengths, strict=True)]
        return _scores(run, copied, dict.fromkeys(run.corpora["test"].by_direction()))

    found = distributed.run_on_rank0(found_on_rank0)
    run.results.baselines[Stage.COPYING_SOURCE] = records.Scores(trained_parameters=0, **found)


def _scores(run: RunContext, translations: list[Translation], losses: Mapping[str, float | None]) -> dict[str, Any]:
    """The scores of the test text's translations, as fields of `records.Scores`: of each direction, and their means.

    `losses` are the test losses by direction.
    """
    pairs = run.corpora["test"].pairs
    model = run.recipe.evaluation.comet
    comet = []
    if model:
        texts = [translation.text for translation in translations]
        comet = comet_scores(model, [pair.source for pair in pairs], texts, [pair.target for pair in pairs])
    found = {}
    signatures: dict[str, str] = {}
    for name, places in run.corpora["test"].by_direction().items():
        scores = score(
            [translations[place].text for place in places],
            [pairs[place].target for place in places],
            [translations[place].stopped for place in places],
            [translations[place].num_tokens for place in places],
            run.recipe.evaluation.tokenize,
        )
        found[name] = {"test_loss": finite(losses[name]), **asdict(scores)}
        signatures = found[name].pop("signatures")
        if model:
            found[name]["comet"] = fmean(comet[place] for place in places)
            signatures["comet"] = model
    if not run.recipe.text.directions:
        return {**found[""], "signatures": signatures}
    names = next(iter(found.values()))
    means = {name: _mean([scores[name] for scores in found.values()]) for name in names}
    directions = {name: records.DirectionScores(**scores) for name, scores in found.items()}
    return {**means, "signatures": signatures, "directions": directions}


def _mean(values: list[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
