"""One training run by one method, evaluated on the held-out text."""

from __future__ import annotations

from ksl_ds.config.methods import METHODS
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.evaluation import score_copying
from ksl_ds.training.run import open_run
from ksl_ds.training.stages import load_ticket, run_stage
from ksl_ds.training.summary import scan_result, show_stages


def main(recipe: Recipe) -> None:
    """Trains `method` from the base weights. Raises UserError for a mistake in the recipe."""
    if recipe.method == "ticket" and recipe.ticket is None:
        raise UserError("method=ticket trains the rows of a ticket: give ticket=DIR")
    with open_run(recipe, method=recipe.method) as run:
        score_copying(run)
        shard = RowShard(run.model.get_input_embeddings().weight)
        ticket = load_ticket(run, shard, recipe.ticket) if recipe.method == "ticket" and recipe.ticket else None
        run_stage(run, METHODS[recipe.method].stage, shard, ticket)
        show_stages(run)
        scan_result(run)
