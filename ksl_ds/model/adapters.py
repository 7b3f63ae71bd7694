"""LoRA and prefix tuning by PEFT, on a model that may be partitioned.

Whether PEFT supports an architecture is tested on the meta device before weights are loaded: which modules LoRA adapts by
default, and the shape of a prefix. PEFT derives that shape from names in the config; if this does not match the
architecture's code, it is taken from the keys that the code caches.

Legend: B pairs, L positions, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import atomic_folder, reason
from ksl_ds.model.dry_run import first_line, meta_model
from ksl_ds.sharding.engine import TORCH_DTYPE
from ksl_ds.sharding.partition import gathered

ALL_LINEAR = "all-linear"  # PEFT's name for all linear layers except the output head


def adapter_config(model_config: Any, recipe: Recipe, method: str) -> Any:
    """PEFT's config of `method`, lora or prefix, for an architecture. PEFT fills in its placeholders.

    Parameters
    ----------
    model_config
        The model's transformers config.
    recipe
        Gives the adapter's section and the precision.
    method
        lora or prefix.

    Raises
    ------
    UserError
        If PEFT cannot adapt this architecture.
    """
    from peft import LoraConfig, PrefixTuningConfig

    def empty_model() -> Any:
        dtype = TORCH_DTYPE[recipe.training.precision]
        trust = recipe.model.trust_remote_code
        model = meta_model(copy.deepcopy(model_config), dtype, untied=False, trust_remote_code=trust)
        if recipe.training.gradient_checkpointing:
            enable_checkpointing(model)
        return model

    if method == "lora":
        lora = recipe.lora
        for targets in [lora.target_modules] if lora.target_modules else [None, ALL_LINEAR]:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=targets,
            )
            try:
                _placed(empty_model(), config)
                return config
            except ValueError as error:
                problem = first_line(error)
        raise UserError(f"method=lora: PEFT cannot adapt the architecture {model_config.model_type}: {problem}")

    size = recipe.prefix.num_virtual_tokens
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size)
    no_prefix = _prefix_problem(empty_model(), prefix)
    if no_prefix is None:
        return prefix
    shape = _cached_shape(empty_model())
    if shape is not None:
        layers, heads, channels = shape
        prefix = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=size,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * channels,
        )
        no_prefix = _prefix_problem(empty_model(), prefix)
        if no_prefix is None:
            return prefix
    raise UserError(
        f"method=prefix: PEFT's prefix tuning does not support the architecture {model_config.model_type} with these "
        f"settings: {no_prefix}"
    )


def with_adapter(model: nn.Module, config: Any) -> Any:
    """Adds PEFT's adapter to the model; `config` is from `adapter_config` and can be reused."""
    return _placed(model, config)


def _placed(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    # In the model's dtype, since ZeRO-3 needs one dtype; the optimizer keeps fp32 master weights anyway.
    return get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=False)


def enable_checkpointing(model: Any) -> None:
    """Switches gradient checkpointing on. Raises UserError if the architecture does not support it."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"training.gradient_checkpointing=true: {first_line(error)}; remove it") from None


def target_modules(model: Any) -> list[str]:
    """Names of the modules that a model's LoRA adapts, as resolved by PEFT."""
    found = model.peft_config["default"].target_modules
    return [found] if isinstance(found, str) else sorted({name.rpartition(".")[2] for name in found})


def save_adapter(model: Any, out: Path) -> None:
    """Writes the adapter in PEFT's format on rank 0, atomically. Collective. Raises UserError on every rank."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    message = None
    with gathered(trained):
        if distributed.is_rank0():
            try:
                with atomic_folder(out) as draft:
                    model.save_pretrained(str(draft), save_embedding_layers=False)
            except (OSError, SafetensorError) as error:  # SafetensorError: a full disk
                message = f"{out} could not be written: {reason(error)}"
    distributed.raise_if_any_rank(message)


class _AnyScalar(TorchDispatchMode):
    """Lets code on the meta device read a value of a tensor: 1 or true. Shapes do not depend on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _tokens() -> dict[str, torch.Tensor]:
    ids_BL = torch.ones(2, 4, dtype=torch.int64, device="meta")
    return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}


def _prefix_problem(model: Any, config: Any) -> str | None:
    """Why the architecture does not support a prefix of this shape; None if it does."""
    try:
        peft_model = _placed(model, config).train()
        trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        with torch.device("meta"), _AnyScalar():
            logits_BLV = peft_model(**_tokens(), use_cache=False).logits
            logits_BLV.float().sum().backward()
    except Exception as error:  # PEFT and the architecture's code may raise anything
        return first_line(error)
    return None if all(parameter.grad is not None for parameter in trained) else "its code does not read the prefix"


def _cached_shape(model: Any) -> tuple[int, int, int] | None:
    """Layers, heads and channels per head of a model's cached keys; None if layers differ or cache no keys."""
    try:
        with torch.device("meta"), _AnyScalar(), torch.no_grad():
            cached = model(**_tokens(), use_cache=True).past_key_values
        shapes = [layer.keys.shape for layer in cached.layers]
    except Exception:  # as above
        return None
    return (len(shapes), shapes[0][1], shapes[0][3]) if len(set(shapes)) == 1 else None
