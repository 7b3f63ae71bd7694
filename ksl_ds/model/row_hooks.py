"""Trains a few rows of an embedding and keeps all others bit-identical, whatever the optimizer does (mode `hooks`).

The same rows of an output head of its own, and of its bias, on demand: new tokens need both.

A hook on the weight's gradient keeps the chosen rows only, before any reduction, clipping or optimizer sees the others. That
is not enough: weight decay and momentum of an earlier phase move rows whose gradient is zero. So the other rows are put
back after every optimizer step, on the part of the fp32 master weights that this rank steps; no rank sends anything. So
are copies of the weights that an optimizer keeps (optimizers.py).

The hooks live as long as the weight; deep or pickled copies of the model have their own. Anything that would silently remove
the restriction, such as replacing the weight, raises an error at the next forward pass that records gradients.

Exact and simple, but gradient and optimizer states keep the size of the whole matrix, and a step copies this rank's part
of it twice. Mode `rows` (row_parameter.py) avoids both.

Legend: V tokens, D coordinates, K chosen rows; `flat` tensors are parts of a flattened (V, D) weight.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from ksl_ds.model.embeddings import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    Part,
    embedding_of,
    head_of,
    is_in_adapter_model,
    unwrapped,
    weight_of,
)
from ksl_ds.model.optimizers import (
    Stepped,
    adds_decay_to_gradient,
    copies_of_weight,
    decay_of_step,
    held_by_any_optimizer,
    stepped_part,
)
from ksl_ds.sharding.masters import refresh_hidden_master
from ksl_ds.sharding.partition import full_shape
from ksl_ds.sharding.rows import is_stepped_by_zero

SAMPLE = 1024  # elements outside the chosen rows by which an optimizer's decay is measured


@dataclass
class Elements:
    """The elements of a part of the weight: those of chosen rows, a sample of the others, and the base of the chosen."""

    chosen: Tensor
    sample: Tensor
    base: Tensor


@dataclass
class OpenStep:
    """State that an optimizer step passes from its pre-hook to its post-hook."""

    part: Stepped
    before: Tensor
    has_gradient: bool


class TrainedRows:
    """What `train_only_rows` returns; `remove()` undoes it."""

    def __init__(self, weight: nn.Parameter, ids: Tensor, base_KD: Tensor | None, part: Part = EMBEDDING):
        self.ids = ids  # (K,) int64, ascending
        self.of_head: list[TrainedRows] = []  # the same rows of an output head, where they train too
        self._part = part
        self._base_KD = base_KD
        # The weight's hook holds this object, and nothing here holds the weight.
        self._reference = TensorWeakRef(weight)
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._elements: tuple[Any, Elements] | None = None  # of the part that was stepped last
        self._open: dict[int, OpenStep] = {}
        self._copies: weakref.WeakKeyDictionary[Optimizer, dict[str, bool]] = weakref.WeakKeyDictionary()
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # they do not step the weight
        self._has_gradient = False
        self._has_optimizer = False
        self._has_warned = False
        trains = weight.requires_grad
        weight.requires_grad_(True)  # a copy may be frozen, and torch then refuses a hook
        self._handles = [
            weight.register_hook(self._keep_chosen_rows),
            register_optimizer_step_pre_hook(_weakly(self._before_step)),
            register_optimizer_step_post_hook(_weakly(self._after_step)),
        ]
        weight.requires_grad_(trains)
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)

    def watch(self, *modules: nn.Module) -> None:
        """Checks in forward passes of these modules that the restriction still holds."""
        for module in modules:
            self._watched.add(module)
            self._handles.append(module.register_forward_pre_hook(self._check))

    def remove(self) -> None:
        """Removes the restriction. Rows and optimizer states are unchanged."""
        for rows in self.of_head:
            rows.remove()
        self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedRows:
        weight = self._reference()
        if weight is None:
            return self
        copied = TrainedRows(copy.deepcopy(weight, memo), self.ids, self._base_KD, self._part)
        copied._watched.update(memo[id(module)] for module in self._watched if id(module) in memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        weight = self._reference()
        weight = nn.Parameter(torch.empty(0)) if weight is None else weight
        return TrainedRows, (weight, self.ids, self._base_KD, self._part)

    def _keep_chosen_rows(self, gradient_VD: Tensor) -> Tensor:
        self._has_gradient = True
        ids = self.ids.to(gradient_VD.device)
        if gradient_VD.is_sparse:
            gradient_VD = gradient_VD.coalesce()
            kept = torch.isin(gradient_VD.indices()[0], ids)
            rows = gradient_VD.indices()[:, kept], gradient_VD.values()[kept]
            return torch.sparse_coo_tensor(*rows, gradient_VD.shape, is_coalesced=True, check_invariants=False)
        # Not a multiplication by a mask, which would turn an infinity in another row into a NaN.
        kept_VD = torch.zeros_like(gradient_VD)
        kept_VD[ids] = gradient_VD[ids]
        return kept_VD

    def _before_step(self, optimizer: Optimizer) -> None:
        weight = self._reference()
        if weight is None:
            return
        part = stepped_part(optimizer, weight, search=optimizer not in self._strangers)
        if part is None:
            self._strangers.add(optimizer)
            self._refuse_unknown(optimizer, weight)
            return
        self._has_optimizer = True
        elements = self._elements_of(part, weight)
        gradient = part.parameter.grad
        decay = float(part.group.get("weight_decay") or 0)
        if gradient is not None and decay and adds_decay_to_gradient(optimizer, part.group):
            # It will add decay times the row; this makes it decay times the distance from the base.
            pull = -decay if part.group.get("maximize") else decay
            part.cut(gradient)[elements.chosen] -= (pull * elements.base).to(gradient.dtype)
        self._open[id(optimizer)] = OpenStep(part, part.flat.clone(), gradient is not None)

    def _after_step(self, optimizer: Optimizer) -> None:
        weight = self._reference()
        step = self._open.pop(id(optimizer), None)
        if weight is None or step is None:
            return
        part = stepped_part(optimizer, weight) or step.part
        elements = self._elements_of(part, weight)
        before_S = step.before[elements.sample]
        known = self._copies.setdefault(optimizer, {})
        known.update(copies_of_weight(optimizer, part, elements.sample, before_S, known))
        states = optimizer.state.get(part.parameter, {})
        copies = [part.cut(states[name]) for name, is_copy in known.items() if is_copy and name in states]
        for flat in (part.flat, *copies):
            moved = flat[elements.chosen]
            decay = 0.0
            if step.has_gradient:  # without one, optimizers leave a parameter alone
                decay = self._decay(optimizer, part, before_S, flat[elements.sample], is_copy=flat is not part.flat)
            if decay:
                # The optimizer pulled towards 0; the same pull towards the base value differs by this.
                moved = moved + decay * elements.base
            flat.copy_(step.before)
            flat[elements.chosen] = moved

    def _decay(self, optimizer: Optimizer, part: Stepped, before_S: Tensor, after_S: Tensor, *, is_copy: bool) -> float:
        decay = decay_of_step(optimizer, part.group, before_S, after_S, is_copy=is_copy)
        if decay is None and part.group.get("weight_decay") and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"train_only_rows cannot tell how {type(optimizer).__name__} applies weight_decay: it may pull the "
                "chosen rows towards 0 instead of their base values; set weight_decay to 0 for the embedding",
                stacklevel=2,
            )
        return decay or 0.0

    def _refuse_unknown(self, optimizer: Optimizer, weight: nn.Parameter) -> None:
        """Raises RuntimeError if the weight has a gradient and no known optimizer steps it."""
        if self._has_optimizer or not self._has_gradient or is_stepped_by_zero(weight):
            return
        self._has_optimizer = held_by_any_optimizer(weight)
        if not self._has_optimizer:
            raise RuntimeError(
                f"train_only_rows: no optimizer holds the {self._part.what}'s {self._part.name} or its fp32 master, so its "
                f"rows cannot be "
                f"restricted ({type(optimizer).__name__} steps now); give the optimizer the model's own parameters, "
                "or call remove()"
            )

    def _check(self, module: nn.Module, inputs: Any) -> None:
        """Raises RuntimeError if this forward pass would not train the chosen rows."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._finalizer.alive:
            return
        for watched in {module, *self._watched}:
            if not _is_restricted(self._part.find(watched), self._part):
                raise RuntimeError(
                    f"train_only_rows: the {self._part.what} or its {self._part.name} was replaced (assigned, parametrized or "
                    "wrapped), so its rows are no longer restricted; call remove() and then train_only_rows again"
                )
        # Not by [...]: in a forward pass ZeRO-3 would gather the weight for that, and keep it gathered for the whole step.
        weight = self._part.find(module)._parameters.get(self._part.name)
        is_own = weight is not None and weight is self._reference()
        if weight is not None and is_own and module.training and not weight.requires_grad and not self._has_optimizer:
            raise RuntimeError(
                f"train_only_rows: the {self._part.what} was frozen afterwards, so none of its rows would train; PEFT does "
                "that: call train_only_rows after get_peft_model, or call remove()"
            )

    def _elements_of(self, part: Stepped, weight: nn.Parameter) -> Elements:
        key = (part.start, part.flat.numel(), part.flat.dtype, part.flat.device)
        if self._elements is None or self._elements[0] != key:
            num_rows, *rest = full_shape(weight)
            row_length = math.prod(rest)  # 1 for a bias
            end = part.start + part.flat.numel()

            def within(elements: Tensor) -> Tensor:
                return elements[(elements >= part.start) & (elements < end)]

            chosen = within((self.ids[:, None] * row_length + torch.arange(row_length)).flatten())
            is_other_V = torch.ones(num_rows, dtype=torch.bool)
            is_other_V[self.ids] = False
            rows = torch.arange(part.start // row_length, -(-end // row_length))
            others = rows[is_other_V[rows]]
            others = others[:: len(others) // SAMPLE + 1]
            sample = within(others * row_length + torch.arange(len(others)) % row_length)
            positions = (chosen - part.start).to(part.flat.device)
            if self._base_KD is None:
                base = part.flat[positions].clone()
            else:
                base = self._base_KD[torch.searchsorted(self.ids, chosen // row_length), chosen % row_length]
            elements = Elements(positions, (sample - part.start).to(part.flat.device), base.to(part.flat))
            self._elements = key, elements
        return self._elements[1]


def train_only_rows(
    model_or_embedding: nn.Module, ids: Sequence[int] | Tensor, base: Tensor | None = None, *, head: bool = False
) -> TrainedRows:
    """Restricts the training of an input embedding to some of its rows.

    All other rows, and their fp32 master copies, stay bit-identical under any optimizer, with weight decay, momentum,
    clipping, loss scaling and gradient accumulation; a gradient norm counts the chosen rows only. Weight decay pulls the
    chosen rows towards `base`, not towards 0. Nothing else about the
    model changes: freeze the rest with `model.requires_grad_(False)` first if only these rows should train.

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
        training resumed from a checkpoint needs it.
    head : bool
        Also train these rows of the model's output head, and of its bias if it has one, with the same guarantees; new
        tokens need both. Weight decay pulls them towards their values at the first step. Nothing more for a tied head.

    Returns
    -------
    TrainedRows
        Its `remove()` lifts the restriction.

    Raises
    ------
    ValueError
        Without ids, for an id outside the embedding or head, a `base` of another shape, a model without an output head, or a
        weight that is not supported (FSDP, tensor parallelism, adapters over the embedding).
    RuntimeError
        Later: at the first step if no optimizer holds the weight, and in a forward pass if the weight was replaced.

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
    embedding = embedding_of(model_or_embedding)
    weight = weight_of(model_or_embedding, embedding)
    chosen = torch.unique(torch.as_tensor(ids, dtype=torch.int64, device="cpu"))
    if chosen.numel() == 0:
        raise ValueError("train_only_rows needs at least one row id")
    of_head = _weights_of_head(model_or_embedding, weight) if head else {}
    num_rows = min(full_shape(each)[0] for each in (weight, *of_head.values()))
    if chosen[0] < 0 or chosen[-1] >= num_rows:
        raise ValueError(f"row ids must lie in 0 .. {num_rows - 1}; got {int(chosen[0])} .. {int(chosen[-1])}")
    if base is not None and tuple(base.shape) != (len(chosen), full_shape(weight)[1]):
        raise ValueError(f"base has shape {tuple(base.shape)}; it must be {(len(chosen), full_shape(weight)[1])}")
    for each in (weight, *of_head.values()):
        each.requires_grad_(True)
        refresh_hidden_master(each)
    if is_in_adapter_model(model_or_embedding, embedding):
        warnings.warn(
            "rows trained by train_only_rows are no part of PEFT's adapter; save the model with "
            "save_pretrained(..., save_embedding_layers=True), or let PEFT train the rows (trainable_token_indices)",
            stacklevel=2,
        )
    rows = TrainedRows(weight, chosen, base)
    rows.watch(*{embedding, unwrapped(model_or_embedding)})
    for part, each in of_head.items():
        restricted = TrainedRows(each, chosen, None, part)
        restricted.watch(head_of(model_or_embedding), unwrapped(model_or_embedding))
        rows.of_head.append(restricted)
    return rows


def _weights_of_head(model: nn.Module, embedding_weight: nn.Parameter) -> dict[Part, nn.Parameter]:
    """The parameters of a model's output head that have rows of their own. Raises ValueError."""
    if not hasattr(unwrapped(model), "get_output_embeddings"):
        raise ValueError(f"head=True needs a model with an output head; {type(unwrapped(model)).__name__} is none")
    module = head_of(model)
    found = {}
    if module._parameters.get("weight") is not embedding_weight:
        found[HEAD] = weight_of(model, module, HEAD)
    if module._parameters.get("bias") is not None:
        found[HEAD_BIAS] = weight_of(model, module, HEAD_BIAS)
    return found


def _is_restricted(module: nn.Module, part: Part) -> bool:
    weight = module._parameters.get(part.name)
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return any(isinstance(owner, TrainedRows) and owner._reference() is weight for owner in owners)


def _weakly(method: Callable[[Optimizer], None]) -> Callable[..., None]:
    """A hook for optimizer steps that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(optimizer)

    return hook


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
