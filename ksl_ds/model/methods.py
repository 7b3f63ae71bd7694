"""Tests on the meta device, before weights are loaded, whether an architecture can be trained by a recipe."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ksl_ds.config.methods import ADAPTERS
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.model.adapters import adapter_config, enable_checkpointing
from ksl_ds.model.dry_run import first_line, meta_model
from ksl_ds.sharding.engine import TORCH_DTYPE, stage_of
from ksl_ds.sharding.rounding import ROUNDED, rounds_frozen


def prepare_method(recipe: Recipe, model_config: Any, zero_config: dict[str, Any], method: str | None) -> Any:
    """Checks that `method` can train the architecture. Returns PEFT's config for lora and prefix, else None.

    Parameters
    ----------
    recipe
        Gives the adapter's section and the precision.
    model_config
        The model's transformers config.
    zero_config
        The DeepSpeed configuration.
    method
        As `recipe.method`; None for no adapter.

    Raises
    ------
    UserError
        If the architecture does not support the method, the checkpointing or ZeRO-3.
    """
    if method == "full" and rounds_frozen(zero_config):
        raise UserError(
            f"method full trains every weight, but {recipe.deepspeed} keeps them in 8 bits "
            f"(zero_optimization.{ROUNDED}); choose another DeepSpeed JSON"
        )
    dtype = TORCH_DTYPE[recipe.training.precision]
    trust = recipe.model.trust_remote_code
    model = meta_model(copy.deepcopy(model_config), dtype, untied=False, trust_remote_code=trust)
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model)
    if stage_of(zero_config) == 3:
        check_initialization(model)
    return adapter_config(model_config, recipe, method) if method in ADAPTERS else None


def check_initialization(model: Any) -> None:
    """Raises UserError if an architecture cannot be loaded under ZeRO-3. Empties the model.

    Most architectures skip the initialization of weights that a checkpoint fills. Code that still computes with the shape
    of such a weight fails, since under ZeRO-3 its shape is (0,).
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.new_empty(0), requires_grad=False)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what a checkpoint fills
            setattr(module, name, empty)
    try:
        with torch.device("meta"):
            model.initialize_weights()
    except Exception as error:  # the architecture's code may raise anything
        raise UserError(
            f"models of type {model.config.model_type} cannot be loaded under ZeRO stage 3, which partitions weights before "
            f"the architecture's code initializes them ({first_line(error)}); use deepspeed=zero2.json"
        ) from None
