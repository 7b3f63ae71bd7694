"""Scores the model as it stands on the held-out text: loss, translations, BLEU and what they hide."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ksl_ds import distributed
from ksl_ds.config.methods import Stage
from ksl_ds.report import records
from ksl_ds.report.records import StageResult, finite
from ksl_ds.sharding.engine import gathered_weights, inference_engine, stage_of
from ksl_ds.text.scores import Scores, score, write_translations
from ksl_ds.text.translate import translate
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
    with evaluation_model(run) as (module, partitioned):
        packing = packing_of(run, module)
        loss = corpus_loss(module, run.model, run.examples["test"], run.pad_id, evaluation.batch_size, packing)
        translations = translate(
            module, run.tokenizer, run.prompts, evaluation, partitioned=partitioned, label=f"translating, {label}"
        )
    pairs = run.corpora["test"].pairs
    hypotheses = [translation.text for translation in translations]

    def score_and_write() -> Scores:
        write_translations(
            run.dir / "translations" / stage,
            [pair.source for pair in pairs],
            [pair.target for pair in pairs],
            hypotheses,
        )
        return score(
            hypotheses,
            [pair.target for pair in pairs],
            [translation.stopped for translation in translations],
            [translation.num_tokens for translation in translations],
            evaluation.tokenize,
        )

    scores = distributed.run_on_rank0(score_and_write)
    shown = StageResult(
        trained_parameters=trained_parameters,
        test_loss=finite(loss),
        **asdict(scores),
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
    run.tracker.log(stage, 0, **shown.numbers())
    run.save_results()
    run.checkpoints(stage).remove()
    logger.info(
        f"{label}: test loss {loss:.3f}, BLEU {scores.bleu:.1f}, chrF++ {scores.chrf:.1f}, "
        f"first-line BLEU {scores.first_line_bleu:.1f}, stop rate {scores.stop_rate:.2f}"
    )


def file_bytes(folder: Path) -> int:
    """Bytes of the files in a folder that it does not share with another, such as the base model's, by a hard link."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def score_copying(run: RunContext) -> None:
    """What handing back the source would score: a baseline that templated text makes strong."""
    pairs = run.corpora["test"].pairs
    if not distributed.is_rank0():
        return
    sources = [pair.source for pair in pairs]
    lengths = [len(run.tokenizer(source, add_special_tokens=False).input_ids) for source in sources]
    copied = score(
        sources, [pair.target for pair in pairs], [True] * len(pairs), lengths, run.recipe.evaluation.tokenize
    )
    baseline = records.Scores(trained_parameters=0, test_loss=None, **asdict(copied))
    run.results.baselines[Stage.COPYING_SOURCE] = baseline
