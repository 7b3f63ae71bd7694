"""The models that `certify` compares, one after the other in the memory of one model, and what each predicts.

All candidates come first, on the one base model, whose embedding rows are exchanged in place; then it is freed and the
reference is loaded. So no rank ever holds two models. The price: beside a model a rank holds three float32 copies of its
part of the embedding in host memory, and the reference's embedding is read twice, from its file and with its model.

Legend: V tokens, D coordinates, R rows of this rank, K ticket rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.certificate.criterion import Predictions
from ksl_ds.certificate.predictions import predict_texts
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Model, Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.pvalues import critical_count
from ksl_ds.lottery.shift import dtype_name
from ksl_ds.lottery.ticket import Shift, Ticket
from ksl_ds.model.folder import ModelFolder, check_same_model
from ksl_ds.model.load import differing_weight, free_weights, load_model, open_folder
from ksl_ds.sharding.draw import sharded_shift
from ksl_ds.sharding.engine import TORCH_DTYPE
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import load_ticket

logger = logging.getLogger(__name__)


@dataclass
class Candidate:
    """Which rows of the base model were exchanged, and what the model then predicted."""

    record: dict[str, Any]  # what it is, for results.json
    tau_count: int  # tau is tau_count / D; every row outside the ticket has a smaller k
    in_ticket_V: Tensor  # bool
    predictions: dict[str, Predictions]  # by text: "test", and "valid" where there is one
    ticket: Ticket | None = None  # the ticket that was given


def open_reference(recipe: Recipe) -> ModelFolder:
    """The reference's folder. Raises UserError unless it is the base model with another embedding, as far as shapes tell."""
    base = open_folder(recipe.model)
    reference = open_folder(_reference_model(recipe))
    with distributed.raise_on_all_ranks():
        check_same_model(base, reference)
        scope = recipe.model.embedding_scope
        if reference.tied != (base.tied and scope == "shared"):
            other = {"input": "shared", "shared": "input"}[scope]
            raise UserError(
                f"the output head of reference {reference.path} is {'' if reference.tied else 'not '}tied to its embedding, "
                f"which model.embedding_scope={scope} does not leave of {base.path}; try model.embedding_scope={other}"
            )
    return reference


def _reference_model(recipe: Recipe) -> Model:
    return replace(recipe.model, path=recipe.reference or "", revision=None)


def predict_candidates(run: RunContext, reference: ModelFolder) -> tuple[list[Candidate], Shift]:
    """Every candidate's predictions, and the KS test of base and reference. The base model is freed at the end."""
    embedding = run.model.get_input_embeddings().weight
    recipe = run.recipe
    with distributed.raise_on_all_ranks():
        name = differing_weight(run.model, reference, leave_out=embedding)
        if name is not None:
            raise UserError(
                f"reference {reference.path}: {name} differs from {run.folder.path}, but a certificate is about models "
                "that differ in the input embedding alone: give the embed-tuned model of this base"
            )
    shard = RowShard(embedding)
    ticket = load_ticket(run, shard, recipe.ticket) if recipe.ticket is not None else None
    if ticket is not None and run.folder.tied and ticket.embedding_scope != recipe.model.embedding_scope:
        raise UserError(
            f"ticket {recipe.ticket} was tuned with model.embedding_scope={ticket.embedding_scope}, which the recipe sets "
            f"to {recipe.model.embedding_scope}: the output head of this tied model would be another one"
        )
    base_RD = shard.read()
    with distributed.raise_on_all_ranks():
        stored_RD = reference.read_rows(reference.embedding_name, shard.start, shard.stop)
    dtype = TORCH_DTYPE[recipe.training.precision]
    reference_RD = stored_RD.to(dtype).float()
    shard.write(reference_RD)
    shift = replace(sharded_shift(shard, base_RD), tested_dtype=dtype_name(dtype))
    candidates = []
    if ticket is not None:
        shard.write(base_RD)
        shard.write_rows(torch.tensor(ticket.token_ids), ticket.rows_KD)
        candidates.append(_given_ticket(run, ticket, shift))
    alphas = set(recipe.certify.alphas)
    if ticket is not None and ticket.selection == "alpha":
        alphas.add(ticket.alpha)
    last: Candidate | None = None
    for alpha in sorted(alphas):
        count = critical_count(shift.num_samples, alpha, recipe.draw.method)
        in_ticket_V = shift.count_V >= count
        if last is None or not torch.equal(in_ticket_V, last.in_ticket_V):
            shard.write(torch.where(in_ticket_V[shard.start : shard.stop, None], reference_RD, base_RD))
            predictions = predict_texts(run, f"partial transfer, alpha {alpha:g}")
        else:
            predictions = last.predictions  # tickets are nested in alpha: the same size is the same ticket
        last = Candidate(
            {
                "candidate": Stage.PARTIAL_TRANSFER,
                "given": False,
                "selection": "alpha",
                "alpha": alpha,
                "method": recipe.draw.method,
                "critical_count": count,
            },
            count,
            in_ticket_V,
            predictions,
        )
        candidates.append(last)
    free_weights(run.model)
    return candidates, shift


def _given_ticket(run: RunContext, ticket: Ticket, shift: Shift) -> Candidate:
    """The ticket that was given, in the model already. Its tau is one that no row outside it reaches."""
    in_ticket_V = torch.zeros(len(shift.count_V), dtype=torch.bool)
    in_ticket_V[ticket.token_ids] = True
    by_alpha = ticket.selection == "alpha"
    count = critical_count(shift.num_samples, ticket.alpha, ticket.method) if by_alpha else None
    outside = int(shift.count_V[~in_ticket_V].max()) if not in_ticket_V.all() else 0
    stage = str(ticket.source.get("stage", "given"))
    record = {
        "candidate": Stage.PARTIAL_TRANSFER if stage == Stage.EMBED_TUNING else stage,
        "given": True,
        "selection": ticket.selection,
        "alpha": ticket.alpha if by_alpha else None,
        "method": ticket.method,
        "critical_count": count,
        "tokens_of_other_count": int((ticket.count_V != shift.count_V).sum()),
    }
    return Candidate(record, max(count or 0, outside + 1), in_ticket_V, predict_texts(run, "the ticket given"), ticket)


def predict_reference(run: RunContext, reference: ModelFolder) -> dict[str, Predictions]:
    """The reference's predictions. It takes the place of the freed base in memory, and is freed too."""
    logger.info(f"loading the reference {reference.path}")
    run.model = load_model(replace(run.recipe, model=_reference_model(run.recipe)), reference, run.config)
    predictions = predict_texts(run, "reference")
    free_weights(run.model)
    return predictions
