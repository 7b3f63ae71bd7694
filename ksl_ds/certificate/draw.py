"""The ticket of `draw.selection: certified`: within a lottery, the smallest one with a guarantee.

Embed tuning draws the largest candidate, T(alpha) at the largest of certify.alphas. Every candidate's rows are then tried in
the base model, as `certify` does, and text.valid, which decides nothing else in a run, decides.

Legend: R rows of this rank, D coordinates.
"""

from __future__ import annotations

from torch import Tensor

from ksl_ds import distributed
from ksl_ds.certificate.calibration import certify_texts, save_certified_ticket
from ksl_ds.certificate.candidates import rows_of_reference, transfer_candidates
from ksl_ds.certificate.predictions import predict_texts
from ksl_ds.certificate.report import risk_curves, risk_section, show_risk
from ksl_ds.config.methods import Stage
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Shift, Ticket
from ksl_ds.model.folder import open_model
from ksl_ds.report.html import Section
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.run import RunContext
from ksl_ds.training.stages import CERTIFIED_TICKET, load_ticket


def certified_ticket(run: RunContext, shard: RowShard, base_RD: Tensor, shift: Shift) -> tuple[Ticket, list[Section]]:
    """The smallest certified ticket of a run whose embed tuning is done, and its part of the report. Collective.

    Parameters
    ----------
    run
        The open run, which holds the model; its calibration text is one that decides nothing else.
    shard
        Its input embedding; any rows may be left in it.
    base_RD
        float32 (R, D): this rank's rows of the base model.
    shift
        The KS test of embed tuning.

    Raises
    ------
    UserError
        If no ticket is certified, or the untuned model is.
    """
    if Stage.PARTIAL_TRANSFER in run.stages:
        ticket = load_ticket(run, shard, str(run.dir / CERTIFIED_TICKET))
        risk = run.results.certificate["risk"]
        return ticket, [risk_section(risk, risk_curves(risk))]
    tuned = run.dir / "checkpoints" / Stage.EMBED_TUNING
    with distributed.raise_on_all_ranks():
        reference = open_model(str(tuned))
    reference_RD = rows_of_reference(run, shard, reference)
    shard.write(reference_RD)
    predictions = predict_texts(run, "embed-tuned model")
    candidates = transfer_candidates(run, shard, shift, base_RD, reference_RD, run.recipe.certify.alphas)
    risk = certify_texts(run, candidates, predictions)
    assert risk is not None  # check_recipe asks for text.valid
    run.results.certificate = {"risk": risk}
    run.save_results()
    section = show_risk(risk, run.tracker)
    certified = save_certified_ticket(run, reference, shift, candidates, risk)
    if certified is None:
        what = "The untuned model is certified, so there is no row to train" if risk["smallest"] else risk["sentence"]
        raise UserError(
            f"{what.rstrip('.')}; the embed-tuned model is kept in {tuned}, where ksl-ds certify tries other settings at once"
        )
    return certified, [section]
