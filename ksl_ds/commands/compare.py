"""KS tickets beside their controls and beside other methods; see comparison/runner.py."""

from __future__ import annotations

from pathlib import Path

from ksl_ds import distributed
from ksl_ds.comparison.entries import comparison_dir
from ksl_ds.comparison.results import show_file
from ksl_ds.comparison.runner import compare
from ksl_ds.config.schema import Recipe
from ksl_ds.training.run import run_lock


def main(recipe: Recipe) -> None:
    """Runs or continues the comparison of a recipe. Raises UserError for a mistake, and at the end when an entry failed."""
    home = distributed.run_on_rank0(lambda: comparison_dir(recipe))
    with run_lock(home):
        compare(recipe, home)


def show(results: Path) -> None:
    """Prints the comparison of an earlier run. Raises UserError for a file that holds none."""
    show_file(results)
