"""LoRA and prefix tuning, by PEFT, on a model that may be partitioned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ksl_ds.errors import UserError
from ksl_ds.files import reason
from ksl_ds.lottery.ticket_files import whole_folder
from ksl_ds.recipe import Recipe
from ksl_ds.sharding import cluster


def with_adapter(model: nn.Module, recipe: Recipe) -> Any:
    """The model with PEFT's adapter for `recipe.method`, lora or prefix. Raises UserError where PEFT cannot place one."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    if recipe.method == "lora":
        config: Any = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.lora.r,
            lora_alpha=recipe.lora.lora_alpha,
            lora_dropout=recipe.lora.lora_dropout,
            target_modules=recipe.lora.target_modules or None,
        )
    else:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=recipe.prefix.num_virtual_tokens)
    try:
        # In the model's own dtype, as ZeRO-3 wants all parameters of a run; the optimizer keeps fp32 masters anyway.
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"method={recipe.method}: {' '.join(str(error).split())}") from None


def save_adapter(model: Any, out: Path) -> None:
    """Writes the adapter as PEFT does, from rank 0, whole or not at all. Collective.

    Raises
    ------
    UserError
        On every rank, where it cannot be written.
    """
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    partitioned = [parameter for parameter in trained if hasattr(parameter, "ds_id")]
    message = None
    with deepspeed.zero.GatheredParameters(partitioned):
        if cluster.is_main():
            try:
                with whole_folder(out) as draft:
                    model.save_pretrained(str(draft), save_embedding_layers=False)
            except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
                message = f"{out} could not be written: {reason(error)}"
    cluster.raise_together(message)
