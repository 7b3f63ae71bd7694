"""The negative log-likelihood of responses, in training and on held-out text.

Sums over tokens, never means of means: a batch's loss is the sum over its response tokens divided by their number in the
*global* batch, so it does not depend on how pairs are divided over ranks and accumulation steps.

Legend: B pairs, L positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ksl_ds import distributed
from ksl_ds.text.batches import response_tokens
from ksl_ds.text.packing import Packing
from ksl_ds.text.prompt import Example

PADDED = Packing()


def response_logits(
    model: Callable[..., Any],  # the module or the engine around it
    batch: dict[str, Tensor],  # of collate_training or collate_packed
    keeps_logits: bool,  # whether the model can skip the logits of early positions: see `can_keep_logits`
) -> tuple[Tensor, Tensor]:
    """Logits that predict the response tokens of a batch, float32 (N, V), and these tokens, int64 (N,): pair after pair."""
    if "predicts" in batch:
        return _packed_logits(model, batch, keeps_logits)
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


def _packed_logits(model: Callable[..., Any], batch: dict[str, Tensor], keeps_logits: bool) -> tuple[Tensor, Tensor]:
    inputs = {name: tensor.to(distributed.device()) for name, tensor in batch.items()}
    predicts_N = inputs.pop("predicts")
    targets_N = inputs.pop("targets")
    extra = {"logits_to_keep": predicts_N} if keeps_logits else {}
    # Without a cache: with one, transformers does not take restarting positions for packed sequences.
    logits_PV = model(**inputs, use_cache=False, **extra).logits[0]
    return (logits_PV if keeps_logits else logits_PV[predicts_N]).float(), targets_N


def response_nll(model: Callable[..., Any], batch: dict[str, Tensor], keeps_logits: bool) -> Tensor:
    """Sum of -log p over the response tokens of a batch: a float32 scalar with gradient. Takes what `response_logits` does."""
    logits_NV, targets_N = response_logits(model, batch, keeps_logits)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def can_keep_logits(model: Any) -> bool:
    """Whether the model computes logits of chosen positions only."""
    return "logits_to_keep" in forward_parameters(model)


def forward_parameters(model: Any) -> Iterable[str]:
    """Names of what a model's forward takes. PEFT's models pass on what they do not know."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


@torch.no_grad()
def corpus_loss(
    model: Callable[..., Any],
    module: nn.Module,
    examples: list[Example],
    pad_id: int,
    size: int,
    packing: Packing = PADDED,
) -> float:
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
    packing
        How micro-batches are laid out.
    """
    keeps_logits = can_keep_logits(module)
    total = torch.zeros((), dtype=torch.float64, device=distributed.device())
    was_training = module.training
    module.eval()
    micro_batches, packed = packing.micro_batches(
        examples, range(len(examples)), distributed.rank(), distributed.world_size(), size
    )
    for indices in micro_batches:
        batch = packing.collate([examples[index] for index in indices], pad_id, packed=packed)
        total += response_nll(model, batch, keeps_logits).double()
    module.train(was_training)
    return float(distributed.all_reduce(total)) / response_tokens(examples)
