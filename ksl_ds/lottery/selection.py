"""Interim."""

import torch

from ksl_ds.lottery.ks import critical_count


def select_alpha(count_V, num_samples, alpha, method="exact"):
    return (count_V >= critical_count(num_samples, alpha, method)).nonzero().flatten()


def _top(x, k):
    o = torch.sort(x, descending=True, stable=True)
    i = o.indices[:k][o.values[:k] > 0]
    return i.sort().values


def select_top_k(count_V, k):
    return _top(count_V, k)


def select_frequency(f, k):
    return _top(f, k)


def select_shift_norm(f, k):
    return _top(f, k)


def select_shift_ratio(f, k):
    return _top(f, k)


def select_random(V, k, seed):
    return torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:k].sort().values
