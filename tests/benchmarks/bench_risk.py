"""Certified risk by simulation: how often a false ticket is certified, and how many sentences a true one needs.

    python tests/benchmarks/bench_risk.py

A sentence has 12 tokens that differ with a probability drawn from a beta distribution, so that tokens of one sentence are
correlated (.2); its loss is the share that differs (`certify.risk=tokens`) or whether any does (`sentence`).
"""

from __future__ import annotations

import argparse

import numpy as np

from ksl_ds.certificate.risk import risk_pvalue

EPSILON = 0.05
DELTA = 0.05
TOKENS = 12
CORRELATION = 0.2
SIZES = (50, 100, 200, 400, 800, 1600)
RISKS = (0.0, 0.01, 0.02, 0.03, 0.04, EPSILON)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    options = parser.parse_args()
    print(
        f"share of {options.repetitions:,} repetitions that certify at epsilon {EPSILON:g} with {1 - DELTA:.0%} confidence"
    )
    print("(the last column is the false-certification rate, at most .05)\n")
    for binary in (False, True):
        print(f"| {'sentence' if binary else 'tokens'}: n | " + " | ".join(f"risk {risk:g}" for risk in RISKS) + " |")
        print("|---" * (len(RISKS) + 1) + "|")
        for n in SIZES:
            rates = [certified(risk, n, options.repetitions, binary) for risk in RISKS]
            print(f"| {n:,} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |", flush=True)
        print()


def certified(risk: float, n: int, repetitions: int, binary: bool) -> float:
    """Share of simulated calibration texts of n sentences that certify a ticket of this true risk."""
    generator = np.random.default_rng([n, round(1e6 * risk), binary])
    if binary:
        loss_RN = (generator.random((repetitions, n)) < risk).astype(np.float64)
    else:
        spread = (1 - CORRELATION) / CORRELATION
        chance_RN = (
            generator.beta(risk * spread, (1 - risk) * spread, (repetitions, n)) if risk else np.zeros((repetitions, n))
        )
        loss_RN = generator.binomial(TOKENS, chance_RN) / TOKENS
    return float((risk_pvalue(loss_RN, EPSILON, binary)[0] <= DELTA).mean())


if __name__ == "__main__":
    main()
