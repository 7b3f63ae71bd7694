"""One parameter under ZeRO-3: whether it is partitioned, its full shape, this rank's part, gathering it.

Other packages call these functions instead of reading DeepSpeed's attributes. DeepSpeed is imported only when needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksl_ds.sharding.eight_bits import dequantise, scale_of


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has partitioned the parameter, so that its own data may be empty."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_numel(parameter: Any) -> int:
    """The number of elements of the whole parameter."""
    return full_shape(parameter).numel()


def stored_weight(parameter: Any) -> Tensor:
    """The tensor that holds this rank's values: its flat part with padding, or the parameter itself."""
    return getattr(parameter, "ds_tensor", parameter)


def local_part(parameter: Any) -> tuple[Tensor, int]:
    """This rank's flat part of the weights without padding, a view, and its offset in the flattened parameter.

    The whole parameter, with offset 0, if it is not partitioned; the values, not a view, where they are in 8 bits.
    """
    if not is_partitioned(parameter):
        return parameter.detach().view(-1), 0
    return _part(parameter, parameter.ds_tensor, parameter.ds_process_group)


def host_part(parameter: Any) -> tuple[Tensor, int] | None:
    """This rank's flat part of the host's own copy under hierarchical partitioning (hpZ), and its offset; None without one.

    DeepSpeed makes the copy when a weight is gathered, and takes frozen weights from it ever after.
    """
    copy = getattr(parameter, "ds_secondary_tensor", None)
    if copy is None:
        return None
    return _part(parameter, copy, parameter.ds_zero_param_process_group)


def _part(parameter: Any, part: Any, group: Any) -> tuple[Tensor, int]:
    """A rank's flat part, of those of a group of ranks, without padding; and its offset."""
    start = part.ds_numel * dist.get_rank(group)
    scale_G = scale_of(part)
    values = part.detach() if scale_G is None else dequantise(part, scale_G, parameter.dtype)
    return values[: max(0, min(part.ds_numel, parameter.ds_numel - start))], start


def is_rounded(parameter: Any) -> bool:
    """Whether the parameter is kept in 8 bits, see rounding.py."""
    return scale_of(stored_weight(parameter)) is not None


def drop_host_copy(parameter: Any) -> None:
    """Drops the host's copy after a write to the weight: the next gathering makes it anew."""
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """Gathers these parameters on every rank for the block. Collective if any of them is partitioned."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield
