"""Trains a few rows of an embedding and keeps all others bit-identical, whatever the optimizer does (mode `hooks`).

A hook on the weight's gradient keeps the chosen rows only, before any reduction, clipping or optimizer sees the others. That
is not enough: weight decay and momentum of an earlier phase move rows whose gradient is zero. So the other rows are put
back after every optimizer step, on the part of the fp32 master weights that this rank steps; no rank sends anything.

Exact and simple, but gradient and optimizer states keep the size of the whole matrix, and a step copies this rank's part
of it twice. Mode `rows` (ticket_rows.py) does without.

Legend: V tokens, D coordinates, K chosen rows; `flat` tensors are parts of a flattened (V, D) weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ksl_ds.sharding.rows import master_part


class TrainedRows:
    """What `train_only_rows` returns; `remove()` undoes it."""

    def __init__(self, weight: nn.Parameter, ids: Tensor, base_KD: Tensor | None):
        self.ids = ids  # (K,) int64, ascending
        self._weight, self._base_KD = weight, base_KD
        self._before: Tensor | None = None  # this rank's part of the weight, during an optimizer step
        self._base: Tensor | None = None  # the chosen rows' elements in it, which decay pulls towards
        self._handles = [
            weight.register_hook(self._keep_chosen_rows),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Lets all rows train again. Rows and optimizer states stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_chosen_rows(self, gradient_VD: Tensor) -> Tensor:
        # Not a multiplication by a mask: an infinity in a row that does not count would become a NaN.
        ids = self.ids.to(gradient_VD.device)
        kept_VD = torch.zeros_like(gradient_VD)
        kept_VD[ids] = gradient_VD[ids]
        return kept_VD

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        flat, start = master_part(self._weight)
        if self._group_of(optimizer, flat) is None:
            return
        self._before = flat.clone()
        if self._base is None:
            chosen = self._chosen_elements(flat, start)
            self._base = flat[chosen].clone() if self._base_KD is None else self._base_elements(chosen.cpu() + start)
            self._base = self._base.to(flat)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        flat, start = master_part(self._weight)
        group = self._group_of(optimizer, flat)
        if group is None or self._before is None or self._base is None:
            return
        chosen = self._chosen_elements(flat, start)
        moved = flat[chosen]
        if _decays_decoupled(optimizer, group):
            # The optimizer pulled towards 0; the same pull towards the base value differs by this.
            moved = moved + group["lr"] * group["weight_decay"] * self._base
        flat.copy_(self._before)
        flat[chosen] = moved
        self._before = None

    def _base_elements(self, elements: Tensor) -> Tensor:
        """The values that `elements` of the flattened weight have in the chosen rows' base."""
        row_length = _shape(self._weight)[1]
        assert self._base_KD is not None
        return self._base_KD[torch.searchsorted(self.ids, elements // row_length), elements % row_length]

    def _group_of(self, optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any] | None:
        """The parameter group whose tensors contain `flat`; None when this optimizer steps something else."""
        storage = flat.untyped_storage().data_ptr()
        for group in optimizer.param_groups:
            if any(parameter.untyped_storage().data_ptr() == storage for parameter in group["params"]):
                return group if flat.numel() else None
        return None

    def _chosen_elements(self, flat: Tensor, start: int) -> Tensor:
        """Positions in `flat`, which begins at element `start` of the weight, that belong to chosen rows; int64."""
        row_length = _shape(self._weight)[1]
        elements = (self.ids[:, None] * row_length + torch.arange(row_length)).flatten() - start
        return elements[(elements >= 0) & (elements < flat.numel())].to(flat.device)


def train_only_rows(
    model_or_embedding: nn.Module, ids: Sequence[int] | Tensor, base: Tensor | None = None
) -> TrainedRows:
    """Restricts the training of an input embedding to some of its rows.

    All other rows, and their fp32 master copies, stay bit-identical under any optimizer, with weight decay, momentum,
    clipping, loss scaling and gradient accumulation; a gradient norm counts the chosen rows only. Decoupled weight decay
    (AdamW, Lion) pulls the chosen rows towards `base`, not towards 0. Nothing else about the
    model changes: freeze the rest with `model.requires_grad_(False)` first if only these rows shall train.

    Parameters
    ----------
    model_or_embedding : nn.Module
        A Hugging Face model (its input embedding is meant), a DeepSpeed engine around one, or a module with a
        (V, D) `weight`. Plain, or under ZeRO stages 0 to 3, before or after `deepspeed.initialize`. A tied output head
        is the same parameter and moves along.
    ids : sequence of int, or int64 Tensor of shape (K,)
        Rows to train; repeated ids count once.
    base : floating Tensor (K, D), optional
        What weight decay pulls the rows towards, in ascending order of ids; their values at the first step by default. A
        training that goes on from a checkpoint needs it.

    Returns
    -------
    TrainedRows
        Its `remove()` lifts the restriction.

    Raises
    ------
    ValueError
        Without ids, for an id outside the embedding, or a `base` of another shape.

    Examples
    --------
    >>> import torch
    >>> from ksl_ds import train_only_rows
    >>> embedding = torch.nn.Embedding(5, 3)
    >>> before_VD = embedding.weight.detach().clone()
    >>> handle = train_only_rows(embedding, [1, 3])
    >>> optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.1)
    >>> embedding(torch.arange(5)).square().sum().backward()
    >>> optimizer.step()
    >>> (embedding.weight != before_VD).any(dim=1)
    tensor([False,  True, False,  True, False])
    >>> handle.remove()
    """
    get_embedding = getattr(model_or_embedding, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding is not None else model_or_embedding
    weight = embedding.weight
    chosen = torch.unique(torch.as_tensor(ids, dtype=torch.int64, device="cpu"))
    num_rows = _shape(weight)[0]
    if chosen.numel() == 0:
        raise ValueError("train_only_rows needs at least one row id")
    if chosen[0] < 0 or chosen[-1] >= num_rows:
        raise ValueError(f"row ids must lie in 0 .. {num_rows - 1}; got {int(chosen[0])} .. {int(chosen[-1])}")
    if base is not None and tuple(base.shape) != (len(chosen), _shape(weight)[1]):
        raise ValueError(f"base has shape {tuple(base.shape)}; it must be {(len(chosen), _shape(weight)[1])}")
    weight.requires_grad_(True)
    return TrainedRows(weight, chosen, base)


def _shape(weight: nn.Parameter) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)


def _decays_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the optimizer multiplies weights by 1 - lr * weight_decay, apart from their gradient."""
    if not group.get("weight_decay"):
        return False
    if "decoupled_weight_decay" in group:  # torch's Adam and AdamW
        return bool(group["decoupled_weight_decay"])
    flags = [getattr(optimizer, name) for name in ("adam_w_mode", "adamw_mode") if hasattr(optimizer, name)]
    return bool(flags[0]) if flags else type(optimizer).__name__ in ("AdamW", "Lion")
