"""The whole method: embed tuning, the draw, partial transfer, partial tuning, each scored on the same held-out text."""

from __future__ import annotations

from ksl_ds.config.methods import Stage
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import explain_empty
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.evaluation import evaluate_stage, score_copying
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import token_frequency, transfer_ticket, tune_embedding, tune_ticket
from ksl_ds.training.summary import scan_result, show_stages, summarise


def run_lottery(run: RunContext) -> None:
    """Runs the stages that the run has not completed. Raises UserError when the draw selects no row. Collective."""
    recipe = run.recipe
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
            f"{explain_empty(shift, recipe.draw.alpha, recipe.draw.method)}; the embed-tuned model is kept in "
            f"{run.dir / 'checkpoints' / Stage.EMBED_TUNING}, where ksl-ds draw tries other settings at once"
        )

    # 2. Partial transfer: the drawn rows in the base model, nothing trained again.
    shard.write(base_RD)
    transfer_ticket(run, shard, drawn, run.dir / "checkpoints" / Stage.PARTIAL_TRANSFER)

    # 3. Partial tuning: the drawn rows alone, from the base weights.
    shard.write(base_RD)
    tune_ticket(run, shard, drawn)
    summarise(run, shift, drawn, token_frequency(run))
    scan_result(run)
