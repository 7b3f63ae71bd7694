"""Null distribution of the two-sample KS statistic for samples of one size.

With n = m = d the statistic is k / d with an integer k, so there are d + 1 p-values, and a decision at level alpha is an
integer threshold. Exact p-values are one table per size, computed once. Asymptotic p-values are scipy's and take up to 0.1 s
each at d = 100,000, so only those of occurring counts are computed.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PValueMethod = Literal["exact", "asymp"]


def pvalues(count: Tensor, num_samples: int, method: PValueMethod = "exact") -> Tensor:
    """p-values of counts: P(D >= k / d) under the null hypothesis.

    Parameters
    ----------
    count : integer tensor of any shape
        Counts k in 0 .. num_samples.
    num_samples : int
        Size d of both samples.
    method : {'exact', 'asymp'}
        'exact' sums the Gnedenko-Korolyuk series; its relative error is below 1e-9 wherever the p-value is a normal
        float64, and p-values below the smallest one are 0. 'asymp' is what `scipy.stats.ks_2samp(method="asymp")`
        returns; only for d = 1, where that is NaN, it is 1, as the exact p-value is.

    Returns
    -------
    float64 tensor of the shape and on the device of `count`

    Raises
    ------
    ValueError
        For an empty sample or an unknown method.

    References
    ----------
    B. V. Gnedenko and V. S. Korolyuk, "On the maximum discrepancy between two empirical distributions", 1951.

    Examples
    --------
    >>> import torch
    >>> from ksl_ds.lottery.pvalues import pvalues
    >>> pvalues(torch.arange(4), 3)
    tensor([1.0000, 1.0000, 0.6000, 0.1000], dtype=torch.float64)
    """
    _check(num_samples, method)
    count_N = count.cpu().long()
    if method == "exact":
        pvalue_N = torch.from_numpy(_exact_table(num_samples))[count_N]
    else:
        occurring_C, place_N = count_N.unique(return_inverse=True)
        pvalue_N = torch.from_numpy(_asymptotic(occurring_C.numpy(), num_samples))[place_N]
    return pvalue_N.to(count.device)


def critical_count(num_samples: int, alpha: float, method: PValueMethod = "exact") -> int:
    """The smallest count k with p < alpha: a test at level alpha rejects when its count reaches it.

    Parameters
    ----------
    num_samples : int
        Size d of both samples.
    alpha : float
        Level, above 0 and below 1.
    method : {'exact', 'asymp'}
        As in `pvalues`.

    Returns
    -------
    int
        In 1 .. d; d + 1 where even the count d has p >= alpha, so that nothing is ever rejected.

    Raises
    ------
    ValueError
        For alpha outside (0, 1), an empty sample or an unknown method.

    Examples
    --------
    >>> from ksl_ds import critical_count
    >>> critical_count(4096, 0.05)
    123
    >>> critical_count(576, 0.05), critical_count(576, 0.05, method="asymp")
    (47, 46)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; a significance level lies between 0 and 1, both excluded")
    _check(num_samples, method)
    if method == "exact":
        return int((_exact_table(num_samples) >= alpha).sum())
    return bisect_left(
        range(num_samples + 1), True, key=lambda count: bool(_asymptotic(np.array([count]), num_samples)[0] < alpha)
    )


def _check(num_samples: int, method: str) -> None:
    if method not in ("exact", "asymp"):
        raise ValueError(f"method is {method!r}; it must be exact or asymp")
    if num_samples < 1:
        raise ValueError("a KS test needs at least one value in each sample")


def _asymptotic(counts_C: np.ndarray, num_samples: int) -> np.ndarray:
    """scipy's asymptotic p-values of counts."""
    from scipy.stats import kstwo

    if num_samples == 1:
        return np.ones(len(counts_C))
    # scipy rounds n m / (n + m) = d / 2 to an integer first.
    return np.clip(kstwo.sf(counts_C / num_samples, np.round(num_samples / 2)), 0, 1)


@lru_cache(maxsize=64)
def _exact_table(num_samples: int) -> np.ndarray:
    """The exact p-values of the counts 0 .. num_samples, falling from 1."""
    # C(2d, d - x) / C(2d, d) for x = 0 .. d. Logarithms, since the binomials overflow; extended precision, since the
    # series alternates and its first terms are close to 1.
    steps = np.arange(1, num_samples + 1, dtype=np.longdouble)
    logs = np.log1p((1 - 2 * steps) / (num_samples + steps))
    ratios = np.exp(np.concatenate([np.zeros(1, np.longdouble), np.cumsum(logs)]))
    table = np.ones(num_samples + 1)
    for count in range(1, num_samples + 1):
        table[count] = 2 * (ratios[count :: 2 * count].sum() - ratios[2 * count :: 2 * count].sum())
    return np.minimum.accumulate(np.clip(table, 0, 1))
