"""Trains a few rows of an embedding at the cost of those rows (mode `rows`).

The (V, D) matrix is frozen. A (K, D) parameter holds how far the ticket's rows are from their base values; hooks put the
moved rows into what the embedding looks up and, where the output head is the same matrix, into the logits of those tokens.
The matrix is never copied, and no gradient, optimizer state or reduction has its size.

Choices and what they cost:
- The parameter is a difference, not the row: an optimizer's weight decay then pulls rows towards their base values, and a
  16-bit copy rounds the small difference instead of the row. In fp32 the rows that compute are the same as in mode `hooks`
  but for rounding.
- Moved rows are looked up by the embedding's own code, with them as its weight, so an embedding that scales its output
  (Gemma) or has a padding row needs no special case.
- A tied head also computes the old logits of the ticket's tokens, which are then overwritten: K redundant columns.

Legend: B pairs, L positions, D coordinates, V tokens, K ticket rows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TicketRows(nn.Module):
    """The ticket's rows as a trainable parameter within a Hugging Face causal language model.

    Creating one registers its hooks and freezes nothing; `remove()` removes them. Give `delta_KD` to the optimizer. Create it
    before `deepspeed.initialize`; any ZeRO stage works.

    Parameters
    ----------
    model : causal language model; its head is hooked too where that is the same parameter as the input embedding
    ids_K : int64 (K,), ascending
    base_KD : the rows as they are in the model, in any floating dtype that holds them exactly
    """

    def __init__(self, model: Any, ids_K: Tensor, base_KD: Tensor):
        super().__init__()
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        weight = embedding.weight
        self.ids_K: Tensor
        self.base_KD: Tensor
        self.register_buffer("ids_K", ids_K.to(weight.device), persistent=False)
        self.register_buffer("base_KD", base_KD.to(weight.device, weight.dtype), persistent=False)
        self.delta_KD = nn.Parameter(torch.zeros_like(self.base_KD))
        self._embedding = [embedding]  # in a list, since a module's modules are its children
        padding = getattr(embedding, "padding_idx", None)
        ids = ids_K.tolist()
        self._padding_place = ids.index(padding) if padding in ids else None
        embedding.ticket_rows = self
        self._handles = [embedding.register_forward_hook(self._replace_rows)]
        if head is not None and head.weight is weight:
            self._handles.append(head.register_forward_hook(self._replace_logits))

    def forward(self) -> Tensor:
        """The moved rows (K, D). A module's own forward, so that ZeRO-3 gathers the parameter for it alone."""
        return self.base_KD + self.delta_KD

    def moved(self, delta_KD: Tensor) -> Tensor:
        """The rows in float32 (K, D) on the CPU, given the fp32 master values of `delta_KD`."""
        return self.base_KD.float().cpu() + delta_KD.cpu()

    def remove(self) -> None:
        """Removes the hooks; the matrix is unchanged."""
        for handle in self._handles:
            handle.remove()
        del self._embedding[0].ticket_rows

    def _replace_rows(self, embedding: nn.Module, inputs: tuple[Tensor], looked_up_BLD: Tensor) -> Tensor:
        ids_BL = inputs[0]
        place_BL = torch.searchsorted(self.ids_K, ids_BL).clamp_(max=len(self.ids_K) - 1)
        in_ticket_BL = self.ids_K[place_BL] == ids_BL
        moved_BLD = look_up(embedding, self(), place_BL, self._padding_place)
        return torch.where(in_ticket_BL[..., None], moved_BLD, looked_up_BLD)

    def _replace_logits(self, head: Any, inputs: tuple[Tensor], logits_BLV: Tensor) -> Tensor:
        bias_V = getattr(head, "bias", None)
        bias_K = None if bias_V is None else bias_V[self.ids_K]
        return _ReplaceLogits.apply(logits_BLV, inputs[0], self(), self.base_KD, bias_K, self.ids_K)


def look_up(embedding: nn.Module, rows_KD: Tensor, place_BL: Tensor, padding_place: int | None) -> Tensor:
    """What `embedding` would give for `place_BL` if `rows_KD` were its weight; no gradient for the padding row."""
    twin: Any = copy.copy(embedding)
    twin._parameters = {"weight": rows_KD}
    if hasattr(embedding, "padding_idx"):
        twin.padding_idx = padding_place
    # Not twin(...): the copy has the embedding's hooks, and this runs inside of one.
    return twin.forward(place_BL)


class _ReplaceLogits(torch.autograd.Function):
    """Overwrites the logits of K tokens, without a second (B, L, V) tensor in either direction.

    The head has computed them from the base rows, and its own backward pass propagates their gradient through these rows. This
    adds the remainder, hence the difference of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BLV: Tensor,
        hidden_BLD: Tensor,
        rows_KD: Tensor,
        base_KD: Tensor,
        bias_K: Tensor | None,
        ids_K: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden_BLD, rows_KD, base_KD, ids_K)
        ctx.mark_dirty(logits_BLV)
        return logits_BLV.index_copy_(-1, ids_K, F.linear(hidden_BLD, rows_KD, bias_K))

    @staticmethod
    def backward(ctx: Any, gradient_BLV: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BLD, rows_KD, base_KD, ids_K = ctx.saved_tensors
        gradient_BLK = gradient_BLV.index_select(-1, ids_K)
        gradient_KD = gradient_BLK.flatten(0, -2).T @ hidden_BLD.flatten(0, -2)
        return gradient_BLV, gradient_BLK @ (rows_KD - base_KD), gradient_KD, None, None, None
