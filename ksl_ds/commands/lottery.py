"""The whole method in one run; see training/lottery.py."""

from __future__ import annotations

from ksl_ds.certificate.calibration import leave_out_of_calibration
from ksl_ds.certificate.draw import certified_ticket
from ksl_ds.config.schema import CERTIFIED, Recipe
from ksl_ds.training.lottery import run_lottery
from ksl_ds.training.run import open_run


def main(recipe: Recipe) -> None:
    """Runs the lottery of a recipe. Raises UserError for a mistake in it, and when the draw selects no row."""
    with open_run(recipe, certifies=True) as run:
        if recipe.draw.selection == CERTIFIED:
            leave_out_of_calibration(run, {pair.source for pair in run.corpora["train"].pairs})
        run_lottery(run, certified_ticket)
