"""Interim."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class KSResult(NamedTuple):
    statistic: Tensor
    pvalue: Tensor
    count: Tensor


@lru_cache(maxsize=64)
def _table(d, method):
    if method == "asymp":
        from scipy.stats import kstwo

        k = np.arange(d + 1)
        return torch.from_numpy(np.clip(kstwo.sf(k / d, np.round(d / 2)), 0, 1))
    from scipy.special import gammaln

    p = np.ones(d + 1)
    lg = lambda x: math.lgamma(x + 1)
    for k in range(1, d + 1):
        j = np.arange(1, d // k + 1)
        t = 2 * gammaln(d + 1) - gammaln(d - j * k + 1) - gammaln(d + j * k + 1)
        p[k] = 2 * np.sum(np.where(j % 2 == 1, 1, -1) * np.exp(t))
    return torch.from_numpy(np.clip(p, 0, 1))


def pvalue_table(num_samples, method="exact"):
    return _table(num_samples, method)


def critical_count(num_samples, alpha, method="exact"):
    p = _table(num_samples, method).numpy()
    hit = np.flatnonzero(p < alpha)
    return int(hit[0]) if len(hit) else num_samples + 1


def _counts(a, b):
    d = a.shape[1]
    v, i = torch.sort(torch.cat([a.float() + 0.0, b.float() + 0.0], 1), dim=1)
    s = torch.where(i < d, 1, -1).cumsum(1)
    last = torch.ones_like(v, dtype=torch.bool)
    last[:, :-1] = v[:, 1:] != v[:, :-1]
    return (s.abs() * last).amax(1).int()


def row_counts(before_VD, after_VD, *, workspace_bytes=256 << 20, progress=None):
    V, d = before_VD.shape
    step = max(1, workspace_bytes // (64 * d))
    out = torch.zeros(V, dtype=torch.int32)
    for s in range(0, V, step):
        a, b = before_VD[s : s + step], after_VD[s : s + step]
        for n, x in (("before", a), ("after", b)):
            bad = (~torch.isfinite(x)).any(1).nonzero()
            if len(bad):
                raise ValueError(f"row {s + int(bad[0])} of {n} is not finite")
        m = (a.float() != b.float()).any(1).nonzero().flatten()
        for c in m.split(512):
            out[s + c] = _counts(a[c], b[c])
        if progress:
            progress(len(a))
    return out
