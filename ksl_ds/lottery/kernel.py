"""KS counts by torch's sort and search, on the device where the samples are; samples of any two sizes.

F, the distribution function of `before`, rises only at values of `before`. So F - G, with G that of `after`, is largest at a
value of `before`, and G - F just below one. It is therefore enough to look the sorted values of `before` up in the sorted
`after`: once counting equal values (for F - G), once not (for G - F). In a run of equal values of `before` the last counts
for F - G and the first for G - F; the others give less.

Legend: R rows of a block, N and M sizes of the samples before and after.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def counts_of_sorted(before_RN: Tensor, after_RM: Tensor) -> Tensor:
    """k of each row: max |F - G| times the least common multiple of N and M.

    Parameters
    ----------
    before_RN, after_RM : tensors (R, N) and (R, M)
        Each row sorted upwards, finite; of one dtype and device.

    Returns
    -------
    tensor (R,)
        int32, or int64 where the least common multiple does not fit.
    """
    size_before = before_RN.shape[1]
    size_after = after_RM.shape[1]
    divisor = math.gcd(size_before, size_after)
    step_before = size_after // divisor  # of F, at each value of before
    step_after = size_before // divisor
    fits = math.lcm(size_before, size_after) < 1 << 31
    dtype = torch.int32 if fits else torch.int64
    count_N = torch.arange(0, size_before * step_before, step_before, dtype=dtype, device=before_RN.device)
    through_RN = torch.searchsorted(after_RM, before_RN, right=True, out_int32=fits)
    largest_R = (count_N + step_before).sub(through_RN, alpha=step_after).amax(dim=1)
    below_RN = torch.searchsorted(after_RM, before_RN, out_int32=fits)
    return torch.maximum(largest_R, below_RN.mul_(step_after).sub_(count_N).amax(dim=1))
