"""What the types of a recipe cannot express: ranges of numbers, and keys that need or exclude each other."""

from __future__ import annotations

import difflib

from ksl_ds.errors import UserError
from ksl_ds.recipe import METHODS, NEEDS_EMBED, Compare, Recipe

TUNING_OF_METHOD = {
    "embed": "embed_tuning",
    "ticket": "partial_tuning",
    "full": "full_tuning",
    "lora": "lora",
    "prefix": "prefix",
}


def check_recipe(recipe: Recipe) -> None:
    """Checks across values that types cannot express. Raises UserError naming the key."""
    tunings = {name: getattr(recipe, name) for name in TUNING_OF_METHOD.values()}
    training, text, draw = recipe.training, recipe.text, recipe.draw
    positive = {
        "training.batch_size": training.batch_size,
        "training.micro_batch_size": training.micro_batch_size,
        "training.log_every": training.log_every,
        "training.valid_every": training.valid_every,
        "text.max_length": text.max_length,
        "text.max_words": text.max_words,
        "text.max_train_pairs": text.max_train_pairs,
        "text.max_valid_pairs": text.max_valid_pairs,
        "text.max_test_pairs": text.max_test_pairs,
        "draw.top_k": draw.top_k,
        "compare.rows": recipe.compare.rows,
        "draw.every": draw.every,
        "evaluation.batch_size": recipe.evaluation.batch_size,
        "evaluation.num_beams": recipe.evaluation.num_beams,
        "evaluation.max_new_tokens": recipe.evaluation.max_new_tokens,
        "num_ranks": recipe.num_ranks,
        "checkpoint.every": recipe.checkpoint.every,
        "checkpoint.keep_last": recipe.checkpoint.keep_last,
        "timeout_minutes": recipe.timeout_minutes,
    }
    for name, tuning in tunings.items():
        positive |= {f"{name}.learning_rate": tuning.learning_rate, f"{name}.epochs": tuning.epochs}
        positive |= {f"{name}.max_steps": tuning.max_steps, f"{name}.epsilon": tuning.epsilon}
        if not 0 <= tuning.warmup < 1:
            raise UserError(f"{name}.warmup is {tuning.warmup}; it is a share of the steps, from 0 to below 1")
        if tuning.weight_decay < 0:
            raise UserError(f"{name}.weight_decay is {tuning.weight_decay}; it must not be negative")
        if len(tuning.betas) != 2 or not all(0 <= beta < 1 for beta in tuning.betas):
            raise UserError(f"{name}.betas is {tuning.betas}; it takes two numbers from 0 to below 1")
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; it must be greater than 0")
    for name, seed in {"seed": recipe.seed, "text.seed": recipe.text.seed or 0}.items():
        if seed < 0:
            raise UserError(f"{name} is {seed}; it must not be negative")
    if training.clip < 0:
        raise UserError(f"training.clip is {training.clip}; it must not be negative (0 switches clipping off)")
    check_alpha(draw.alpha, "draw.alpha")
    for alpha in recipe.certify.alphas:
        check_alpha(alpha, "certify.alphas")
    settled = draw.stop_when_settled
    if settled is not None and draw.every is None:
        raise UserError("draw.stop_when_settled needs draw.every, the number of steps between two draws")
    if settled is not None and not (0 < settled.overlap <= 1 and settled.draws >= 1):
        raise UserError(
            f"draw.stop_when_settled has overlap {settled.overlap} and draws {settled.draws}; overlap lies above 0 and up "
            "to 1, draws is at least 1"
        )
    check_compare(recipe.compare)


def check_compare(compare: Compare) -> None:
    """Raises UserError naming the key of `compare` that cannot be followed."""
    for name, values in {"methods": compare.methods, "alphas": compare.alphas, "seeds": compare.seeds}.items():
        if len(set(values)) < len(values) or not values:
            raise UserError(f"compare.{name} is {values}; it must name something, and nothing twice")
    for method in compare.methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            raise UserError(
                f"compare.methods has {method!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}")
            )
    for alpha in compare.alphas:
        check_alpha(alpha, "compare.alphas")
    if min(compare.seeds) < 0:
        raise UserError(f"compare.seeds is {compare.seeds}; seeds must not be negative")
    shifted = [name for name in NEEDS_EMBED if name in compare.methods]
    if shifted and "embed" not in compare.methods:
        raise UserError(f"compare.methods has {shifted[0]}, whose rows are those that embed tuning shifts; add embed")


def check_alpha(alpha: float, name: str) -> None:
    if not 0 < alpha < 1:
        raise UserError(f"{name} is {alpha}; a significance level lies between 0 and 1, both excluded")
