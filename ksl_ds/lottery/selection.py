"""Which rows a test draws, and the controls that it is compared with. Pure functions of vectors over the vocabulary.

All return ascending token ids, int64. Rows that did not move are never drawn by a rule that looks at movement, even when
fewer than k have moved: training them is what a ticket promises not to need.

Legend: V tokens, K drawn rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ksl_ds.lottery.pvalues import PValueMethod, critical_count, pvalues


def select_alpha(count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact") -> Tensor:
    """The method's own rule: tokens with p < alpha."""
    return (count_V >= critical_count(num_samples, alpha, method)).nonzero().flatten()


def select_bonferroni(count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact") -> Tensor:
    """Tokens with p < alpha / V: the chance of any wrong one is below alpha."""
    return select_alpha(count_V, num_samples, alpha / len(count_V), method)


def select_benjamini_hochberg(
    count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact"
) -> Tensor:
    """Benjamini and Hochberg's step-up rule (1995): the expected share of wrong tokens is at most alpha.

    Sorted ascending, p_(1) .. p_(V): all tokens up to the last i with p_(i) <= i * alpha / V.
    """
    pvalue_V = pvalues(count_V.cpu(), num_samples, method)
    ordered_V = pvalue_V.sort().values
    passing = (ordered_V <= torch.arange(1, len(ordered_V) + 1) * (alpha / len(ordered_V))).nonzero().flatten()
    if len(passing) == 0:
        return torch.zeros(0, dtype=torch.int64)
    return (pvalue_V <= ordered_V[passing[-1]]).nonzero().flatten()


def select_top_k(count_V: Tensor, k: int) -> Tensor:
    """The k tokens of largest KS statistic; of equal ones at the cut, those of smaller id."""
    return _largest(count_V, k)


def select_frequency(frequency_V: Tensor, k: int) -> Tensor:
    """Control: the k tokens that occur most often; of equal ones at the cut, those of smaller id."""
    return _largest(frequency_V, k)


def select_shift_norm(shift_norm_V: Tensor, k: int) -> Tensor:
    """Control: the k rows that moved furthest, by the length of after - before."""
    return _largest(shift_norm_V, k)


def select_shift_ratio(shift_ratio_V: Tensor, k: int) -> Tensor:
    """Control: the k rows that moved furthest for their length."""
    return _largest(shift_ratio_V, k)


def select_random(vocab_size: int, k: int, seed: int) -> Tensor:
    """Control: k tokens at random, the same for the same seed."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def _largest(values_V: Tensor, k: int) -> Tensor:
    ordered = values_V.sort(descending=True, stable=True)
    return ordered.indices[:k][ordered.values[:k] > 0].sort().values
