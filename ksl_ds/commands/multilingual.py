"""Tickets of several directions side by side, and what each does for the others; see multilingual/runner.py."""

from __future__ import annotations

from pathlib import Path

from ksl_ds.config.schema import Recipe
from ksl_ds.multilingual.runner import compare_directions
from ksl_ds.training.run import run_lock


def main(recipe: Recipe) -> None:
    """Runs or continues the comparison of directions. Raises UserError for a mistake, and at the end when a run failed."""
    with run_lock(Path(recipe.run_dir)):
        compare_directions(recipe)
