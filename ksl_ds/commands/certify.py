"""How far the model of a ticket agrees with the embed-tuned one; see certificate/judge.py and candidates.py there."""

from __future__ import annotations

from ksl_ds.certificate.calibration import certify_texts, leave_out_of_calibration, save_certified_ticket
from ksl_ds.certificate.candidates import open_reference, predict_candidates, predict_reference
from ksl_ds.certificate.criterion import CONFIDENCE, MIN_SENTENCES
from ksl_ds.certificate.judge import judge, leave_out, show, trained_sources
from ksl_ds.certificate.report import CLAIMS
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.training.run import open_run


def main(recipe: Recipe) -> None:
    """Certifies against `reference`. Raises UserError for a mistake, and where no held-out sentence is left."""
    if recipe.reference is None:
        raise UserError("certify compares with the embed-tuned model: give reference=RUN_DIR/checkpoints/embed_tuning")
    if recipe.ticket is None and not recipe.certify.alphas:
        raise UserError(
            "certify.alphas is empty and no ticket is given: there is nothing to compare with the reference"
        )
    reference = open_reference(recipe)
    trained = trained_sources(recipe)
    with open_run(recipe, trains=False, validates=True) as run:
        left_out = leave_out(run, "test", trained) if trained is not None else None
        leave_out_of_calibration(run, trained)
        candidates, shift = predict_candidates(run, reference)
        predictions = predict_reference(run, reference)
        judged = [judge(run, candidate, predictions["test"], shift.num_samples) for candidate in candidates]
        risk = certify_texts(run, candidates, predictions)
        rows = [row for row, _ in judged]
        run.results.certificate = {
            "claims": CLAIMS,
            "confidence": CONFIDENCE,
            "least_sentences": MIN_SENTENCES,
            "sentences_left_out_as_trained": left_out,
            "num_samples": shift.num_samples,
            "tested_dtype": shift.tested_dtype,
            "candidates": rows,
            "risk": risk,
        }
        run.save_results()
        if risk is not None:
            save_certified_ticket(run, reference, shift, candidates, risk)
        show(run, rows, [example for _, examples in judged for example in examples], risk)
