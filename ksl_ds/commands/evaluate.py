"""Translates the held-out text with a model, or a model and a ticket, and scores it."""

from __future__ import annotations

from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.training.evaluation import evaluate_stage, score_copying
from ksl_ds.training.run import open_run
from ksl_ds.training.stages import score_ticket
from ksl_ds.training.summary import show_stages


def main(recipe: Recipe) -> None:
    """Evaluates `model.path`, with the rows of `ticket` where one is given. Raises UserError for a mistake."""
    with open_run(recipe, trains=False) as run:
        score_copying(run)
        if recipe.ticket is None:
            evaluate_stage(run, Stage.UNTUNED, trained_parameters=0)
        else:
            score_ticket(run, recipe.ticket)
        show_stages(run)
