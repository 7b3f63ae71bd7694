"""The models that `certify` compares, one after the other in the memory of one model, and what each predicts.

All candidates come first, on the one base model, whose embedding rows are exchanged in place; then it is freed and the
reference is loaded. So no rank ever holds two models. The price: beside a model a rank holds three float32 copies of its
part of the embedding in host memory, and the reference's embedding is read twice, from its file and with its model.

Legend: V tokens, D coordinates, R rows of this rank, K ticket rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.certificate.criterion import Predictions
from ksl_ds.certificate.predictions import predict_texts
from ksl_ds.config.methods import METHODS, Stage
from ksl_ds.config.schema import Model, Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.pvalues import critical_count
from ksl_ds.lottery.shift import dtype_name
from ksl_ds.lottery.ticket import Shift, Ticket
from ksl_ds.model.folder import ModelFolder, check_same_model
from ksl_ds.model.load import differing_weight, free_weights, load_model, open_folder
from ksl_ds.sharding.draw import sharded_shift
from ksl_ds.sharding.engine import TORCH_DTYPE
from ksl_ds.sharding.rounding import round_frozen
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import load_ticket

logger = logging.getLogger(__name__)

# Sequences of candidates, each tested from its largest ticket down.
TRANSFER = "partial transfer"
GIVEN = "ticket given"
COMPARED = "tickets compared"


@dataclass
class Candidate:
    """Which rows of the base model were exchanged, and what the model then predicted."""

    record: dict[str, Any]  # what it is, for results.json
    tau_count: int  # tau is tau_count / D; every row outside the ticket has a smaller k
    in_ticket_V: Tensor  # bool
    predictions: dict[str, Predictions]  # by text: "test", and "valid" where there is one
    ticket: Ticket | None = None  # one that has rows of its own


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
    paths = [(GIVEN, recipe.ticket)] if recipe.ticket is not None else []
    paths += [(COMPARED, path) for path in distributed.run_on_rank0(lambda: compared_tickets(recipe))]
    tickets = [(sequence, load_ticket(run, shard, path)) for sequence, path in paths]
    for (_, path), (_, ticket) in zip(paths, tickets, strict=True):
        if run.folder.tied and ticket.embedding_scope != recipe.model.embedding_scope:
            raise UserError(
                f"ticket {path} was tuned with model.embedding_scope={ticket.embedding_scope}, which the recipe sets "
                f"to {recipe.model.embedding_scope}: the output head of this tied model would be another one"
            )
    base_RD = shard.read()
    reference_RD = rows_of_reference(run, shard, reference)
    shard.write(reference_RD)
    dtype = TORCH_DTYPE[recipe.training.precision]
    shift = replace(sharded_shift(shard, base_RD), tested_dtype=dtype_name(dtype))
    candidates = []
    for sequence, ticket in tickets:
        shard.write(base_RD)
        shard.write_rows(torch.tensor(ticket.token_ids), ticket.rows_KD)
        candidates.append(_candidate_of_ticket(run, ticket, shift, sequence))
    alphas = set(recipe.certify.alphas)
    alphas |= {ticket.alpha for sequence, ticket in tickets if sequence == GIVEN and ticket.selection == "alpha"}
    candidates += transfer_candidates(run, shard, shift, base_RD, reference_RD, alphas)
    free_weights(run.model)
    return candidates, shift


def rows_of_reference(run: RunContext, shard: RowShard, reference: ModelFolder) -> Tensor:
    """This rank's rows of the reference's embedding in the run's precision, float32 (R, D)."""
    with distributed.raise_on_all_ranks():
        stored_RD = reference.read_rows(reference.embedding_name, shard.start, shard.stop)
    return stored_RD.to(TORCH_DTYPE[run.recipe.training.precision]).float()


def transfer_candidates(
    run: RunContext, shard: RowShard, shift: Shift, base_RD: Tensor, reference_RD: Tensor, alphas: Iterable[float]
) -> list[Candidate]:
    """Partial transfer of T(alpha) at every level: the base model with the reference's rows. Leaves the last in the model."""
    candidates: list[Candidate] = []
    method = run.recipe.draw.method
    for alpha in sorted(alphas):
        count = critical_count(shift.num_samples, alpha, method)
        in_ticket_V = shift.count_V >= count
        if not candidates or not torch.equal(in_ticket_V, candidates[-1].in_ticket_V):
            shard.write(torch.where(in_ticket_V[shard.start : shard.stop, None], reference_RD, base_RD))
            predictions = predict_texts(run, f"partial transfer, alpha {alpha:g}")
        else:
            predictions = candidates[-1].predictions  # tickets are nested in alpha: the same size is the same ticket
        record = {
            "candidate": Stage.PARTIAL_TRANSFER,
            "sequence": TRANSFER,
            "given": False,
            "selection": "alpha",
            "alpha": alpha,
            "method": method,
            "critical_count": count,
        }
        candidates.append(Candidate(record, count, in_ticket_V, predictions))
    return candidates


def compared_tickets(recipe: Recipe) -> list[str]:
    """Folders of the tickets that a comparison has tuned with the recipe's seed. Raises UserError if there is none."""
    home = recipe.certify.comparison
    if home is None:
        return []
    pattern = f"runs/{METHODS['ticket'].key}_alpha_*-seed{recipe.seed}/ticket"
    found = sorted(map(str, Path(home).glob(pattern)))
    if not found:
        raise UserError(f"certify.comparison={home} has no tuned ticket of seed {recipe.seed} (no folder {pattern})")
    return found


def _candidate_of_ticket(run: RunContext, ticket: Ticket, shift: Shift, sequence: str) -> Candidate:
    """A ticket with rows of its own, in the model already. Its tau is one that no row outside it reaches."""
    in_ticket_V = torch.zeros(len(shift.count_V), dtype=torch.bool)
    in_ticket_V[ticket.token_ids] = True
    by_alpha = ticket.selection == "alpha"
    count = critical_count(shift.num_samples, ticket.alpha, ticket.method) if by_alpha else None
    outside = int(shift.count_V[~in_ticket_V].max()) if not in_ticket_V.all() else 0
    stage = str(ticket.source.get("stage", "given"))
    record = {
        "candidate": Stage.PARTIAL_TRANSFER if stage == Stage.EMBED_TUNING else stage,
        "sequence": sequence,
        "given": sequence == GIVEN,
        "selection": ticket.selection,
        "alpha": ticket.alpha if by_alpha else None,
        "method": ticket.method,
        "critical_count": count,
        "tokens_of_other_count": int((ticket.count_V != shift.count_V).sum()),
    }
    label = f"{sequence}, {len(ticket):,} rows"
    return Candidate(record, max(count or 0, outside + 1), in_ticket_V, predict_texts(run, label), ticket)


def predict_reference(run: RunContext, reference: ModelFolder) -> dict[str, Predictions]:
    """The reference's predictions. It takes the place of the freed base in memory, and is freed too."""
    logger.info(f"loading the reference {reference.path}")
    run.model = load_model(replace(run.recipe, model=_reference_model(run.recipe)), reference, run.config)
    round_frozen(run.model, run.config)
    predictions = predict_texts(run, "reference")
    free_weights(run.model)
    return predictions
