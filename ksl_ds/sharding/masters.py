"""The fp32 master weights that DeepSpeed keeps for 16-bit weights in ZeRO stage 0.

In the other stages a parameter refers to its master. In stage 0 only DeepSpeed's wrapper of the user's optimizer does, and
neither the parameter nor the user's optimizer refers to the wrapper. So the wrapper is searched among all objects of the
process, once per parameter (about 0.1 s), and remembered.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ksl_ds.sharding.partition import is_partitioned

_wrappers = WeakTensorKeyDictionary()  # parameter -> weak reference to the wrapper that holds its master


def hidden_master(parameter: Any, *, search: bool = True) -> Tensor | None:
    """The fp32 master of a 16-bit parameter under ZeRO stage 0, as a view of the parameter's shape; None if it has none.

    Without `search`, only the master of a parameter that was found before.
    """
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return None
    if is_partitioned(parameter) or getattr(parameter, "_hp_mapping", None) is not None:
        return None
    if parameter not in _wrappers or _wrappers[parameter]() is None:
        if not search or not parameter.requires_grad:
            return None
        found = [weakref.ref(wrapper) for wrapper in live_wrappers() if _place(wrapper, parameter) is not None]
        if len(found) > 1:  # an old engine in a reference cycle
            gc.collect()
        alive = [reference for reference in found if reference() is not None]
        if not alive:
            return None
        _wrappers[parameter] = alive[-1]
    wrapper = _wrappers[parameter]()
    place = _place(wrapper, parameter)
    if place is None:
        return None
    group, index = place
    if hasattr(wrapper, "fp32_groups"):
        return wrapper.fp32_groups[group][index].detach()
    start = sum(weight.numel() for weight in wrapper.fp16_groups[group][:index])
    flat = wrapper.fp32_groups_flat[group].detach()
    return flat[start : start + parameter.numel()].view_as(parameter)


def refresh_hidden_master(parameter: Any) -> None:
    """Copies a parameter's values to its hidden master, except where the master only has more digits.

    DeepSpeed's wrapper takes an optimizer step with zero gradients when it is created, and weight decay then moves the
    masters although the weights have not changed.
    """
    master = hidden_master(parameter)
    if master is not None:
        with torch.no_grad():
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))


def holder_of(part: Tensor, tensors: Iterable[Any]) -> tuple[Tensor, int] | None:
    """Which of the tensors has a part's memory, and the part's offset in it, in elements; None for none, or an empty part."""
    wanted = _memory(part)
    if wanted is None or part.numel() == 0:
        return None
    for tensor in tensors:
        held = _memory(tensor)
        if held is not None and held[0] == wanted[0] and held[1] <= wanted[1] and wanted[2] <= held[2]:
            return tensor, (wanted[1] - held[1]) // part.element_size()
    return None


def _memory(tensor: Any) -> tuple[int, int, int] | None:
    """A tensor's storage, and the range of its bytes in it; None for one without contiguous memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return None
    if not tensor.is_contiguous():
        return None
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage().data_ptr(), begin, begin + tensor.nbytes


def live_wrappers() -> list[Any]:
    """All of DeepSpeed's wrappers of optimizers for 16-bit weights in stage 0."""
    if "deepspeed.runtime.engine" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    # By type(): some objects have a false __class__, or raise when it is read.
    kinds = (FP16_Optimizer, FP16_UnfusedOptimizer)
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def _place(wrapper: Any, parameter: Any) -> tuple[int, int] | None:
    """The parameter's group in the wrapper and its index in it."""
    for group, weights in enumerate(getattr(wrapper, "fp16_groups", [])):
        for index, weight in enumerate(weights):
            if weight is parameter:
                return group, index
    return None
