"""Rules that choose rows: what passes, how ties are broken, and what never passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ksl_ds.lottery import selection
from ksl_ds.lottery.pvalues import pvalues

NUM_SAMPLES = 64
counts_of_tokens = st.lists(st.integers(0, NUM_SAMPLES), min_size=1, max_size=50).map(
    lambda counts: torch.tensor(counts, dtype=torch.int32)
)
levels = st.floats(1e-6, 0.99)
methods = st.sampled_from(["exact", "asymp"])


@settings(deadline=None)
@given(counts_of_tokens, levels, methods)
def test_alpha_and_bonferroni_are_strict_levels(count_V, alpha, method):
    pvalue_V = pvalues(count_V, NUM_SAMPLES, method)
    for select, level in ((selection.select_alpha, alpha), (selection.select_bonferroni, alpha / len(count_V))):
        ids_K = select(count_V, NUM_SAMPLES, alpha, method)
        assert ids_K.dtype == torch.int64
        assert ids_K.tolist() == [i for i, p in enumerate(pvalue_V.tolist()) if p < level]


@settings(deadline=None)
@given(counts_of_tokens, levels, methods)
def test_benjamini_hochberg_is_scipys(count_V, alpha, method):
    pvalue_V = pvalues(count_V, NUM_SAMPLES, method)
    adjusted_V = stats.false_discovery_control(pvalue_V.numpy(), method="bh")
    if (np.abs(adjusted_V - alpha) < 1e-12).any():
        return  # a tie with alpha that rounding decides
    ids_K = selection.select_benjamini_hochberg(count_V, NUM_SAMPLES, alpha, method)
    assert ids_K.tolist() == np.flatnonzero(adjusted_V <= alpha).tolist()


def test_benjamini_hochberg_steps_up():
    # Thresholds are .05 * i / 4. The second p-value misses its own, .025, and is drawn because the third makes .0375.
    table = pvalues(torch.arange(NUM_SAMPLES + 1), NUM_SAMPLES)
    count = int((table > 0.0375).sum())
    assert 0.025 < table[count] <= 0.0375
    count_V = torch.tensor([count, 0, 64, count])
    assert selection.select_benjamini_hochberg(count_V, NUM_SAMPLES, 0.05).tolist() == [0, 2, 3]
    assert selection.select_bonferroni(count_V, NUM_SAMPLES, 0.05).tolist() == [2]


@settings(deadline=None)
@given(counts_of_tokens, levels)
def test_the_rules_are_nested(count_V, alpha):
    bonferroni, hochberg, plain, wider = (
        set(ids_K.tolist())
        for ids_K in (
            selection.select_bonferroni(count_V, NUM_SAMPLES, alpha),
            selection.select_benjamini_hochberg(count_V, NUM_SAMPLES, alpha),
            selection.select_alpha(count_V, NUM_SAMPLES, alpha),
            selection.select_alpha(count_V, NUM_SAMPLES, (1 + alpha) / 2),
        )
    )
    # Benjamini and Hochberg's comparison is not strict, so one p-value equal to alpha may tell it from the plain rule.
    assert bonferroni <= hochberg and plain <= wider
    assert all(pvalues(torch.arange(NUM_SAMPLES + 1), NUM_SAMPLES)[count_V[i]] <= alpha for i in hochberg)


@settings(deadline=None)
@given(
    st.sampled_from(["select_top_k", "select_frequency", "select_shift_norm", "select_shift_ratio"]),
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(1, 70),
)
def test_largest_values_with_ties_by_smaller_id(name, values, k):
    values_V = torch.tensor(values, dtype=torch.float32 if "shift" in name else torch.int32)
    ranked = sorted((i for i in range(len(values)) if values[i] > 0), key=lambda i: (-values[i], i))
    assert getattr(selection, name)(values_V, k).tolist() == sorted(ranked[:k])


def test_rows_that_did_not_move_are_never_drawn():
    count_V = torch.tensor([0, 9, 0, 3])
    assert selection.select_top_k(count_V, 3).tolist() == [1, 3]
    assert selection.select_alpha(count_V, NUM_SAMPLES, 0.999999).tolist() == [1]
    assert selection.select_benjamini_hochberg(torch.zeros(4, dtype=torch.int32), NUM_SAMPLES, 0.9).tolist() == []


def test_random_is_seeded_and_uniform():
    first, again, other = (selection.select_random(1000, 100, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 100 and torch.equal(first, first.sort().values)
    drawn = torch.cat([selection.select_random(10, 3, seed) for seed in range(600)]).bincount(minlength=10)
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("rule", ["select_alpha", "select_bonferroni", "select_benjamini_hochberg"])
def test_methods_differ_where_their_thresholds_do(rule):
    count_V = torch.tensor([46])  # d = 576: the exact test needs 47 at alpha = .05, the asymptotic one 46
    assert getattr(selection, rule)(count_V, 576, 0.05, "exact").tolist() == []
    assert getattr(selection, rule)(count_V, 576, 0.05, "asymp").tolist() == [0]
