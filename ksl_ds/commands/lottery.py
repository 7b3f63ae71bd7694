"""The whole method in one run; see training/lottery.py."""

from __future__ import annotations

from ksl_ds.config.schema import Recipe
from ksl_ds.training.lottery import run_lottery
from ksl_ds.training.run import open_run


def main(recipe: Recipe) -> None:
    """Runs the lottery of a recipe. Raises UserError for a mistake in it, and when the draw selects no row."""
    with open_run(recipe) as run:
        run_lottery(run)
