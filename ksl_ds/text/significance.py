"""Are two systems' scores really different? sacrebleu's paired bootstrap, for every system against one baseline.

Each resample draws sentences with replacement, the same ones for both systems (Koehn 2004). What that covers is the choice of
test sentences; it says nothing about another seed of the training, so runs of several seeds are tested one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ksl_ds.text.corpus import one_line

MIN_SENTENCES = 30  # below, a bootstrap is meaningless


@dataclass
class Tested:
    """A system's score, its interval, and how it differs from the baseline.

    Attributes
    ----------
    score : sacrebleu's, 0 .. 100
    mean, half_width : of the 95 % interval that the resamples give
    difference : score minus the baseline's; None for the baseline itself
    p : chance of so large a difference, either way, between equal systems; None for the baseline itself
    """

    score: float
    mean: float
    half_width: float
    difference: float | None = None
    p: float | None = None


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    baseline: str,
    tokenize: str,
    metrics: Sequence[str] = ("bleu", "chrf"),
) -> tuple[dict[str, dict[str, Tested]], dict[str, str]]:
    """BLEU and chrF++ of all systems, each tested against `baseline` with sacrebleu's 1,000 resamples.

    Parameters
    ----------
    systems
        Hypotheses by name, in the order of the references.
    references
        One reference per sentence.
    baseline
        A name in `systems`.
    tokenize
        sacrebleu's tokenizer for BLEU.
    metrics
        Any of "bleu" and "chrf". One metric of one system takes about a second.

    Returns
    -------
    by system, then by metric, and sacrebleu's signature by metric
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.significance import PairedTest

    named = [(baseline, systems[baseline]), *((name, lines) for name, lines in systems.items() if name != baseline)]
    named = [(name, [one_line(line) for line in lines]) for name, lines in named]
    scorers = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF(word_order=2)}
    chosen = {metric: scorers[metric] for metric in metrics}
    signatures, scores = PairedTest(named, chosen, [[one_line(line) for line in references]], test_type="bs")()
    found: dict[str, dict[str, Tested]] = {name: {} for name, _ in named}
    # sacrebleu names them as it prints them, in the order given.
    for metric, title in zip(metrics, signatures, strict=True):
        results: Any = scores[title]
        for (name, _), result in zip(named, results, strict=True):
            tested = found[name][metric] = Tested(result.score, float(result.mean), float(result.ci))
            if name != baseline:
                tested.difference = result.score - results[0].score
                # Where all resamples agree that there is none, sacrebleu finds 1 / 1001: it counts larger differences only.
                tested.p = result.p_value if tested.difference else 1.0
    return found, {metric: str(signature) for metric, signature in zip(metrics, signatures.values(), strict=True)}
