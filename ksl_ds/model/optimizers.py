"""What an optimizer does with a weight: which tensor it steps, which copies it keeps, how it applies weight decay.

Legend: S sampled elements of a flattened weight; `flat` tensors are parts of a flattened weight.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from ksl_ds.sharding.masters import hidden_master, holder_of
from ksl_ds.sharding.rows import master_part

# Add `weight_decay` times the weight to its gradient, unless a group has `decoupled_weight_decay`.
COUPLED = (SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop, torch.optim.ASGD)
# Multiply weights by 1 - lr * weight_decay. The decay of other optimizers is measured.
DECOUPLED = ("AdamW", "Lion", "FusedLion", "DeepSpeedCPULion", "Muon")
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass
class Stepped:
    """The part of a weight that an optimizer steps on this rank."""

    group: dict[str, Any]
    parameter: Tensor  # of the group; contains the part
    flat: Tensor  # the part: a view
    start: int  # of the part in the flattened weight
    offset: int  # of the part in the flattened parameter

    def cut(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's size: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.flat.numel()]


def stepped_part(optimizer: Optimizer, weight: nn.Parameter, *, search: bool = False) -> Stepped | None:
    """The part of a weight, or of its fp32 master, that an optimizer holds; None if it holds neither.

    With `search`, also searches for masters that only DeepSpeed's wrapper of the optimizer refers to.
    """
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return Stepped(group, weight, weight.detach().view(-1), 0, 0)
    if search:
        hidden_master(weight)
    flat, start = master_part(weight, search=False)
    for group in optimizer.param_groups:
        found = holder_of(flat, group["params"])
        if found is not None:
            parameter, offset = found
            return Stepped(group, parameter, flat, start, offset)
    return None


def held_by_any_optimizer(weight: nn.Parameter) -> bool:
    """Whether some optimizer of this process steps the weight."""
    # By type(): some objects have a false __class__, or raise when it is read.
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    return any(stepped_part(each, weight) is not None for each in optimizers if hasattr(each, "param_groups"))


def copies_of_weight(
    optimizer: Optimizer, part: Stepped, sample_S: Tensor, before_S: Tensor, known: dict[str, bool]
) -> dict[str, bool]:
    """Whether each of the optimizer's states is a copy of the weight, as in schedule-free optimizers.

    Decided when a state first appears (`known` has the earlier ones), from its values at sampled elements, whose weights
    were `before_S`.
    """
    found = {}
    size = before_S.float().norm()
    for name, state in optimizer.state.get(part.parameter, {}).items():
        if name in known or not isinstance(state, Tensor) or state.shape != part.parameter.shape or not size:
            continue
        distance = (part.cut(state)[sample_S].float() - before_S.float()).norm()
        found[name] = name not in MOMENTS and bool(distance <= 0.1 * size)
    return found


def adds_decay_to_gradient(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the optimizer adds weight_decay times the weight to the gradient."""
    modes = [getattr(optimizer, name) for name in ("adam_w_mode", "adamw_mode") if hasattr(optimizer, name)]
    if modes:  # DeepSpeed's Adam
        return not modes[0]
    return isinstance(optimizer, COUPLED) and not group.get("decoupled_weight_decay", False)


def decay_of_step(
    optimizer: Optimizer, group: dict[str, Any], before_S: Tensor, after_S: Tensor, *, is_copy: bool = False
) -> float | None:
    """The share by which weight decay shrank a weight in a step; None if it cannot be determined.

    Known from the optimizer's class and flags, or measured on elements without gradient, `before_S` before the step: weight
    decay shrinks all by the same factor. If they did not change, there was no decay or the step was skipped.
    """
    if len(before_S) and torch.equal(before_S, after_S):
        return 0.0
    weight_decay = float(group.get("weight_decay") or 0)
    if not is_copy:
        if not weight_decay or adds_decay_to_gradient(optimizer, group):
            return 0.0
        modes = [getattr(optimizer, name, False) for name in ("adam_w_mode", "adamw_mode")]
        if any(modes) or group.get("decoupled_weight_decay") or type(optimizer).__name__ in DECOUPLED:
            return float(group["lr"]) * weight_decay
    before, after = before_S.double(), after_S.double()
    if not before.any():
        return None
    kept = float(after @ before / (before @ before))
    rounding = 4 * torch.finfo(after_S.dtype).eps * before.abs()
    return 1 - kept if bool(((after - kept * before).abs() <= rounding).all()) else None
