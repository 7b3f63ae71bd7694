"""Frozen weights in 8 bits under ZeRO-3: kept and sent so, whole numbers times scales; 16 bits while they are gathered.

A DeepSpeed JSON asks for it by `zero_quantized_nontrainable_weights`. DeepSpeed gathers and restores partitions that have
scales; how version 0.19.8 makes them is of no use here, so the key is kept from it and they are made in this file:

- it rounds what is frozen while partitions are made, before there are values, and then copies the values into the integers
  without the scale: all of them end as 0. Host copies (hpZ) of frozen weights are made in that way too
- its `quantize_nontrainable_params` takes fp16 only, and the embedding as well, whose rows are read and written as they are
- gathered together, weights are cast back to their partition's type, an integer: all of them end as 0. Hence
  `allgather_sequential`, by which each is gathered by itself
- on one rank it reads `Init.quantizer_module`, which nothing sets

The embedding stays as it is, so do vectors, and matrices that do not divide into whole groups for every rank.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ksl_ds import distributed
from ksl_ds.sharding.eight_bits import GROUP, Quantizer, quantise
from ksl_ds.sharding.partition import full_numel, full_shape

logger = logging.getLogger(__name__)

ROUNDED = "zero_quantized_nontrainable_weights"


def rounds_frozen(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks for frozen weights in 8 bits."""
    return bool(config.get("zero_optimization", {}).get(ROUNDED))


def for_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that DeepSpeed gets."""
    if not rounds_frozen(config):
        return config
    zero = {name: value for name, value in config["zero_optimization"].items() if name != ROUNDED}
    return {**config, "zero_optimization": {**zero, "allgather_sequential": True}}


def round_frozen(model: Any, config: dict[str, Any]) -> None:
    """Rounds a loaded model's weights to 8 bits, where `config` asks for it, and says once what that costs. Collective."""
    if not rounds_frozen(config):
        return
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.Init.quantizer_module = Quantizer()
    embedding = model.get_input_embeddings().weight
    parameters = [parameter for parameter in model.parameters() if parameter is not embedding]
    rounded = [parameter for parameter in parameters if _can_be_rounded(parameter)]
    for parameter in rounded:
        _round(parameter)
    share = sum(map(full_numel, rounded)) / sum(map(full_numel, parameters))
    logger.warning(
        f"{ROUNDED}: {len(rounded)} of {len(parameters)} weights, {share:.1%} of all elements outside the embedding, are "
        f"rounded to 8 bits, {GROUP} elements to a scale: training and all scores of this run are with rounded weights, and "
        "what it saves goes with those of the files"
    )


def _can_be_rounded(parameter: Any) -> bool:
    whole_groups = full_numel(parameter) % (GROUP * distributed.world_size()) == 0
    return len(full_shape(parameter)) > 1 and whole_groups and not parameter.ds_persist


def _round(parameter: Any) -> None:
    integers, scale_G = quantise(parameter.ds_tensor)
    if parameter.ds_zero_param_process_group is not None:
        parameter.ds_secondary_tensor = _part_of_host(parameter, integers, scale_G)
    parameter.ds_tensor = _partition(parameter.ds_tensor, integers, scale_G)


def _part_of_host(parameter: nn.Parameter, integers: Tensor, scale_G: Tensor) -> Tensor:
    """This rank's part of the host's copy (hpZ)."""
    group: Any = parameter.ds_zero_param_process_group  # type: ignore[attr-defined]
    parts = []
    for part in (integers, scale_G):
        whole = torch.empty(len(part) * distributed.world_size(), dtype=part.dtype, device=part.device)
        dist.all_gather_into_tensor(whole, part)
        parts.append(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone())
    return _partition(parameter.ds_tensor, *parts)  # type: ignore[attr-defined]


def _partition(like: Any, integers: Any, scale_G: Tensor) -> Tensor:
    """Integers with what DeepSpeed notes at a partition."""
    integers.ds_quant_scale = scale_G
    integers.ds_numel = integers.numel()
    integers.status = like.status
    integers.final_location = like.final_location
    return integers
