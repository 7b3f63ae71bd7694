"""The negative log-likelihood of responses, in training and on held-out text.

Sums over tokens, never means of means: a batch's loss is the sum over its response tokens divided by their number in the
*global* batch, so it does not depend on how pairs are divided over ranks and accumulation steps.

Legend: B pairs, L positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ksl_ds import distributed
from ksl_ds.text.batches import collate_training, rank_micro_batches, response_tokens
from ksl_ds.text.prompt import Example


def response_logits(
    model: Callable[..., Any],  # the module or the engine around it
    batch: dict[str, Tensor],  # input_ids, attention_mask, labels: (B, L) int64, labels -100 outside the response
    keeps_logits: bool,  # whether the model can skip the logits of early positions: see `can_keep_logits`
) -> tuple[Tensor, Tensor]:
    """Logits that predict the response tokens of a batch, float32 (N, V), and these tokens, int64 (N,): pair after pair."""
    labels_BL = batch["labels"].to(distributed.device())
    extra = {}
    if keeps_logits:
        # Prompts are most of a batch and have no labels: the head need not see them.
        first = int((labels_BL != -100).any(dim=0).float().argmax())
        extra["logits_to_keep"] = labels_BL.shape[1] - first + 1
    logits_BLV = model(
        input_ids=batch["input_ids"].to(distributed.device()),
        attention_mask=batch["attention_mask"].to(distributed.device()),
        use_cache=False,
        **extra,
    ).logits
    targets_BL = labels_BL[:, labels_BL.shape[1] - logits_BLV.shape[1] + 1 :]
    at_response_BL = targets_BL != -100
    return logits_BLV[:, :-1][at_response_BL].float(), targets_BL[at_response_BL]


def response_nll(model: Callable[..., Any], batch: dict[str, Tensor], keeps_logits: bool) -> Tensor:
    """Sum of -log p over the response tokens of a batch: a float32 scalar with gradient. Takes what `response_logits` does."""
    logits_NV, targets_N = response_logits(model, batch, keeps_logits)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def can_keep_logits(model: nn.Module) -> bool:
    """Whether the model computes logits of chosen positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.no_grad()
def corpus_loss(model: Callable[..., Any], module: nn.Module, examples: list[Example], pad_id: int, size: int) -> float:
    """Mean negative log-likelihood per response token of `examples`. Collective; the same on every rank.

    Parameters
    ----------
    model
        What runs the forward pass: the module, or the DeepSpeed engine around it.
    module
        The module itself, which is set to eval mode for the call.
    examples
        Tokenized pairs, divided over the ranks.
    pad_id
        Token id that pads shorter pairs.
    size
        Pairs per rank and forward pass.
    """
    keeps_logits = can_keep_logits(module)
    total = torch.zeros((), dtype=torch.float64, device=distributed.device())
    was_training = module.training
    module.eval()
    for indices in rank_micro_batches(
        examples, range(len(examples)), distributed.rank(), distributed.world_size(), size
    ):
        batch = collate_training([examples[index] for index in indices], pad_id)
        total += response_nll(model, batch, keeps_logits).double()
    module.train(was_training)
    return float(distributed.all_reduce(total)) / response_tokens(examples)
