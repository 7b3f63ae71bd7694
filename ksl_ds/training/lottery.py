"""The whole method: embed tuning, the draw, partial transfer, partial tuning, each scored on the same held-out text.

Legend: R rows of this rank, D coordinates.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import CERTIFIED
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Shift, Ticket, explain_empty
from ksl_ds.report.html import Section
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.evaluation import evaluate_stage, score_copying
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import (
    CERTIFIED_TICKET,
    draw_of,
    token_frequency,
    transfer_ticket,
    tune_embedding,
    tune_ticket,
)
from ksl_ds.training.summary import scan_result, show_stages, summarise

Certify = Callable[[RunContext, RowShard, Tensor, Shift], tuple[Ticket, list[Section]]]


def run_lottery(run: RunContext, certify: Certify | None = None) -> None:
    """Runs the stages that the run has not completed. Collective.

    Parameters
    ----------
    run
        The open run.
    certify
        certificate/draw.py: certified_ticket, the rule of `draw.selection: certified`: takes the run, the embedding, the rows
        (R, D) of the base model and the KS test; returns the ticket and parts of the report.

    Raises
    ------
    UserError
        When the draw selects no row.
    """
    recipe = run.recipe
    draw = draw_of(recipe)
    score_copying(run)
    evaluate_stage(run, Stage.UNTUNED, trained_parameters=0)

    # 1. Snapshot the embedding, train all of it, and see which rows shifted.
    shard = RowShard(run.model.get_input_embeddings().weight)
    base_RD = shard.read()
    shift, drawn = tune_embedding(run, shard, base_RD)
    if not drawn.token_ids:
        show_stages(run)
        scan_result(run)
        raise UserError(
            f"{explain_empty(shift, draw.alpha, draw.method)}; the embed-tuned model is kept in "
            f"{run.dir / 'checkpoints' / Stage.EMBED_TUNING}, where ksl-ds draw tries other settings at once"
        )

    # 2. Partial transfer: the drawn rows in the base model, nothing trained again.
    folder = run.dir / "checkpoints" / Stage.PARTIAL_TRANSFER
    sections: list[Section] = []
    if certify is not None and recipe.draw.selection == CERTIFIED:
        drawn, sections = certify(run, shard, base_RD, shift)
        folder = run.dir / CERTIFIED_TICKET
    shard.write(base_RD)
    transfer_ticket(run, shard, drawn, folder)

    # 3. Partial tuning: the drawn rows alone, from the base weights.
    shard.write(base_RD)
    tune_ticket(run, shard, drawn)
    summarise(run, shift, drawn, token_frequency(run), sections)
    scan_result(run)
