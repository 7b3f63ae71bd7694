"""Runs that are parts of something larger, such as a comparison: each in a folder of its own below `runs/`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ksl_ds.config.load import differing_keys, save_recipe
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import clean
from ksl_ds.report.records import RunResults, read_results


def create_home(home: Path, recipe: Recipe) -> None:
    """Creates the folder of the whole, with its recipe and `runs/`. Raises UserError."""
    try:
        (home / "runs").mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, home / "recipe.yaml")
    except OSError as error:
        raise UserError(f"{home} cannot be written: {error.strerror}") from None


def first_difference(theirs: Mapping[str, Any], wanted: Recipe, ignored: Collection[str] = ()) -> str:
    """The first key in which a recorded recipe differs from a wanted one, but for `ignored` sections; empty for none."""
    for name, (left, right) in differing_keys(theirs, clean(wanted)).items():
        if name.partition(".")[0] not in ignored:
            return f"{name} is {left} there and {right} here"
    return ""


def finished_run(folder: Path, wanted: Recipe, stage: Stage, ignored: Collection[str] = ()) -> RunResults | None:
    """The results of the run in a folder if it has scored `stage` as `wanted` asks; None where it has not.

    Raises
    ------
    UserError
        When the run there was of another recipe, `ignored` sections aside.
    """
    results = read_results(folder)
    if results is None or stage not in results.stages:
        return None
    if difference := first_difference(results.recipe.content(), wanted, ignored):
        raise UserError(
            f"{folder} holds a run of another recipe: {difference}; move it away to run it again, or choose another run_dir"
        )
    return results
