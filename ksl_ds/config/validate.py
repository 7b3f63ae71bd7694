"""Checks across keys, which a recipe's types cannot express."""

from __future__ import annotations

from typing import Any

from ksl_ds.config.methods import METHODS, TUNING_SECTIONS
from ksl_ds.config.schema import CERTIFIED, Compare, Recipe
from ksl_ds.errors import UserError


def check_recipe(recipe: Recipe) -> None:
    """Checks keys that depend on each other. Raises UserError naming the key."""
    for name in TUNING_SECTIONS.values():
        betas = getattr(recipe, name).betas
        if len(betas) != 2:
            raise UserError(f"{name}.betas is {betas}; it takes two numbers")
    if recipe.draw.early_stopping is not None and recipe.draw.every is None:
        raise UserError("draw.early_stopping needs draw.every, the number of steps between two draws")
    if recipe.draw.selection == CERTIFIED and not (recipe.text.valid and recipe.certify.alphas):
        raise UserError("draw.selection=certified needs text.valid, the calibration text, and levels in certify.alphas")
    if len(set(recipe.text.directions)) < len(recipe.text.directions):
        raise UserError(f"text.directions is {recipe.text.directions}; it must have none twice")
    seeds = recipe.multilingual.seeds
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"multilingual.seeds is {seeds}; it must have at least one entry, and none twice")
    check_compare(recipe.compare)


def check_compare(compare: Compare) -> None:
    """Checks the lists of `compare`. Raises UserError naming the key."""
    lists: dict[str, list[Any]] = {"methods": compare.methods, "alphas": compare.alphas, "seeds": compare.seeds}
    for name, values in lists.items():
        if len(set(values)) < len(values) or not values:
            raise UserError(f"compare.{name} is {values}; it must have at least one entry, and none twice")
    shifted = [name for name in compare.methods if METHODS[name].needs_embed]
    if shifted and "embed" not in compare.methods:
        raise UserError(f"compare.methods has {shifted[0]}, which takes its rows from embed tuning; add embed")
