"""A certificate's numbers, made up, as commands/certify.py writes them to results.json."""

from __future__ import annotations

from typing import Any

from ksl_ds.certificate.criterion import MIN_SENTENCES, clopper_pearson

TOKENS = 100


def candidate(
    alpha: float | None,
    certified: int,
    agreeing: int,
    *,
    given: str = "",
    selection: str = "alpha",
    sentences: int = 64,
    tau_count: int = 29,
) -> dict[str, Any]:
    """One candidate with so many certified and agreeing tokens of 100."""
    return {
        "candidate": given or "partial_transfer",
        "given": bool(given),
        "selection": selection,
        "alpha": alpha,
        "method": "exact",
        "critical_count": 29 if selection == "alpha" else None,
        "tau_count": tau_count,
        "tau": tau_count / 576,
        "ticket_rows": 73,
        "reconstructed": found(certified, agreeing, sentences if certified else 0),
        "reconstructed_union_bound": found(0, 0, 0),
        "overall": found(TOKENS, 90, sentences),
    }


def found(tokens: int, agreeing: int, sentences: int) -> dict[str, Any]:
    whole = sentences * 58 // 64
    whole = whole if sentences >= MIN_SENTENCES else sentences // 2
    return {
        "tokens": tokens,
        "agreeing": agreeing,
        "sentences": sentences,
        "agreeing_sentences": whole,
        "interval": clopper_pearson(whole, sentences) if sentences >= MIN_SENTENCES else None,
        "share": tokens / TOKENS,
        "agreement": agreeing / tokens if tokens else None,
        "sentence_agreement": whole / sentences if sentences else None,
    }


COUNTEREXAMPLES = [
    {
        "candidate": f"partial transfer, alpha {alpha}",
        "token": number,
        "sentence": number,
        "source": "You can customize the <b>source</b> of the menu.",
        "prefix": "Vous pouvez personnaliser la source du menu en ajoutant " * (number % 2),
        "reference_token_id": 5,
        "candidate_token_id": 6,
        "reference_token": " chat",
        "candidate_token": "<img src=http://a.b/c>",
        "p_A": 0.9 - number / 100,
        "p_B": 0.02,
        "candidate_p_A": 0.4,
        "by_reconstructed": True,
        "by_union_bound": number % 2 == 0,
    }
    for alpha, many in ((0.5, 12), (0.95, 1))
    for number in range(many)
]
