"""The certified ticket of a run: losses of every candidate on the calibration text, their tests, and the ticket's folder.

Calibration text: text.valid, which decides nothing in a training run (its loss is only logged); text.test shows whether the
promise held. Candidates are tested in sequences, the largest ticket first: partial transfer of T(alpha), the ticket that was
given, the tuned tickets of a comparison. Each of s sequences gets the s-th part of the error probability, so all certificates
of a run hold at once.

Legend: N predicted tokens, S sentences, V tokens of the vocabulary, K ticket rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ksl_ds import distributed
from ksl_ds.certificate.candidates import Candidate
from ksl_ds.certificate.criterion import Predictions
from ksl_ds.certificate.judge import leave_out
from ksl_ds.certificate.report import candidate_name, risk_sentence
from ksl_ds.certificate.risk import Losses, certify_risk
from ksl_ds.files import write_json
from ksl_ds.lottery.ticket import Shift, Ticket, make_ticket
from ksl_ds.model.folder import ModelFolder, token_strings
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import CERTIFIED_TICKET, save_ticket

logger = logging.getLogger(__name__)

LOSSES = "sentence_losses.json"


def leave_out_of_calibration(run: RunContext, trained: set[str] | None) -> None:
    """Takes sentences that were trained on, or are in the test text too, out of the calibration text.

    Raises
    ------
    UserError
        If no sentence is left.
    """
    if "valid" not in run.corpora:
        logger.warning("the recipe has no text.valid, the calibration text, so no risk is certified")
        return
    tested = {pair.source for pair in run.corpora["test"].pairs}
    leave_out(run, "valid", (trained or set()) | tested, "text.train or text.test")


def sentence_losses(risk: str, reference: Predictions, candidate: Predictions, gold_N: torch.Tensor) -> Losses:
    """What each sentence loses by the candidate: float64 (S,), in [0, 1]; 0 where the candidate is the reference.

    Parameters
    ----------
    risk : {'tokens', 'sentence', 'lost_tokens', 'chrf'}
        The share of tokens on which the top tokens differ; whether any differs; the share that the reference predicts as the
        reference translation has them and the candidate does not; or how far the chrF++ of the candidate's translation falls
        below that of the reference's, over 100.
    reference, candidate : Predictions
        Of the same text.
    gold_N : int64 tensor (N,)
        The tokens of the reference translations.

    Examples
    --------
    >>> import torch
    >>> empty, length = torch.zeros(3), torch.tensor([1, 2])
    >>> one = Predictions(empty, empty, torch.tensor([5, 6, 7]), length)
    >>> other = Predictions(empty, empty, torch.tensor([5, 6, 8]), length)
    >>> gold = torch.tensor([5, 9, 7])
    >>> for risk in ("tokens", "sentence", "lost_tokens"):
    ...     print(sentence_losses(risk, one, other, gold).tolist())
    [0.0, 0.5]
    [0.0, 1.0]
    [0.0, 0.5]
    """
    if reference.chrf_S is not None and candidate.chrf_S is not None:
        return ((reference.chrf_S - candidate.chrf_S) / 100).clamp(min=0).numpy()
    length_S = reference.length_S
    sentence_N = torch.repeat_interleave(torch.arange(len(length_S)), length_S)
    differs_N = reference.top_N != candidate.top_N
    if risk == "lost_tokens":
        differs_N &= reference.top_N == gold_N
    differing_S = torch.zeros(len(length_S), dtype=torch.float64).index_add_(0, sentence_N, differs_N.double())
    loss_S = (differing_S > 0).double() if risk == "sentence" else differing_S / length_S
    return loss_S.numpy()


def certify_texts(
    run: RunContext, candidates: Sequence[Candidate], reference: Mapping[str, Predictions]
) -> dict[str, Any] | None:
    """The record `certificate.risk` of results.json; None without a calibration text. Writes sentence_losses.json.

    Parameters
    ----------
    run
        The open run.
    candidates
        With their predictions.
    reference
        The reference's predictions by text.
    """
    if "valid" not in reference:
        return None
    asked = run.recipe.certify
    sequences = _sequences(candidates)
    confidence = 1 - (1 - asked.confidence) / len(sequences)
    gold = {
        text: torch.tensor([number for example in run.examples[text] for number in example.response_ids])
        for text in ("valid", "test")
    }
    tested: list[dict[str, Any]] = []
    losses: dict[str, dict[str, list[float]]] = {"valid": {}, "test": {}}
    for name, members in sequences.items():
        of_text = {
            text: [
                sentence_losses(asked.risk, reference[text], candidate.predictions[text], gold[text])
                for candidate in members
            ]
            for text in losses
        }
        rows = [int(candidate.in_ticket_V.sum()) for candidate in members]
        found = certify_risk(
            list(zip(rows, of_text["valid"], strict=True)), asked.epsilon, confidence, asked.risk == "sentence"
        )
        tickets = []
        for index, (candidate, ticket) in enumerate(zip(members, found.tickets, strict=True)):
            called = candidate_name(candidate.record)
            for text, of_member in of_text.items():
                losses[text][called] = of_member[index].tolist()
            held_out_risk = float(of_text["test"][index].mean())
            tickets.append(
                {"name": called, "alpha": candidate.record["alpha"], **asdict(ticket), "held_out_risk": held_out_risk}
            )
        tested.append({"name": name, "confidence": confidence, "needed": found.needed, "tickets": tickets})
    certified = [ticket for sequence in tested for ticket in sequence["tickets"] if ticket["certified"]]
    record: dict[str, Any] = {
        "risk": asked.risk,
        "epsilon": asked.epsilon,
        "confidence": asked.confidence,
        "sentences": len(reference["valid"].length_S),
        "held_out_sentences": len(reference["test"].length_S),
        "sequences": tested,
        # All certificates hold at once, so the choice among them is free.
        "smallest": min(certified, key=lambda ticket: (ticket["rows"], ticket["risk"]), default=None),
    }
    record["sentence"] = risk_sentence(record)
    distributed.run_on_rank0(lambda: write_json(run.dir / LOSSES, losses))
    return record


def _sequences(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by sequence, the largest ticket first. Of alphas with the same ticket the first is taken."""
    found: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda candidate: -int(candidate.in_ticket_V.sum())):
        members = found.setdefault(candidate.record["sequence"], [])
        if (
            candidate.ticket is not None
            or not members
            or not torch.equal(members[-1].in_ticket_V, candidate.in_ticket_V)
        ):
            members.append(candidate)
    return found


def save_certified_ticket(
    run: RunContext, reference: ModelFolder, shift: Shift, candidates: Sequence[Candidate], risk: Mapping[str, Any]
) -> Ticket | None:
    """Writes the smallest certified ticket to `certified_ticket/`, unless there is none or it has no row. Collective.

    Parameters
    ----------
    run
        The open run.
    reference
        The embed-tuned model, whose rows a partial transfer takes.
    shift
        The KS test of base and reference.
    candidates
        As given to `certify_texts`.
    risk
        What it returned.
    """
    smallest = risk["smallest"]
    if smallest is None or smallest["rows"] == 0:
        return None
    chosen = next(candidate for candidate in candidates if candidate_name(candidate.record) == smallest["name"])
    ticket = chosen.ticket or _transferred(run, reference, shift, chosen)
    promise = {name: risk[name] for name in ("risk", "epsilon", "confidence", "sentences")}
    certified = ticket.with_rows(ticket.rows_KD, certified=promise)
    save_ticket(run, certified, run.dir / CERTIFIED_TICKET)
    return certified


def _transferred(run: RunContext, reference: ModelFolder, shift: Shift, candidate: Candidate) -> Ticket:
    ids_K = candidate.in_ticket_V.nonzero().flatten()
    folders = (run.folder, reference)
    with distributed.raise_on_all_ranks():
        base_KD, rows_KD = (folder.read_ids(folder.embedding_name, ids_K.tolist()) for folder in folders)
    return make_ticket(
        shift,
        ids_K,
        base_KD,
        rows_KD,
        selection="alpha",
        alpha=candidate.record["alpha"],
        method=candidate.record["method"],
        tokens=token_strings(run.tokenizer, ids_K.tolist()),
        embedding_scope=run.recipe.model.embedding_scope,
        source={"stage": "embed_tuning", "after": str(reference.path)},
    )
