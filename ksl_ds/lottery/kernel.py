"""KS counts by torch, on the device where the samples are: one sort of integers a row, one scan.

The keys are those of sorting.py: twice a value's signed magnitude, plus one for a value of `after`. Walking up the merged row,
+1 for a value of `before` and -1 for one of `after`, the sum is the difference of the two counts at the last of a run of equal
values; sums within a run are left out.

Legend: R rows of a block, D values of a sample, S = 2 D merged values; N and M sizes of samples that differ in size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordered(values: Tensor) -> Tensor:
    """Integers of the values' width that order as the floats do; -0.0 and 0.0 are one."""
    bits = values.contiguous().view(INTEGERS[values.element_size()])
    sign = bits >> (8 * values.element_size() - 1)  # 0 or -1
    return ((bits & torch.iinfo(bits.dtype).max) ^ sign) - sign


def infinity(dtype: torch.dtype) -> int:
    """The image under `ordered` of infinity: finite values lie below, NaNs above."""
    return int(ordered(torch.tensor([torch.inf], dtype=dtype)))


def block_counts(before_RD: Tensor, after_RD: Tensor) -> Tensor:
    """k of each row, int32 (R,), from the rows' images under `ordered` (one integer dtype, one device)."""
    free = 1 << (8 * before_RD.element_size() - 2)  # the image of 2.0
    wide_R = _reaches(before_RD, free) | _reaches(after_RD, free)
    if not bool(wide_R.any()):
        return _counts(before_RD, after_RD)
    counts_R = torch.empty(len(before_RD), dtype=torch.int32, device=before_RD.device)
    counts_R[~wide_R] = _counts(before_RD[~wide_R], after_RD[~wide_R])
    if before_RD.element_size() == 8:  # no integer holds such a key: the sort carries the samples along
        counts_R[wide_R] = scaled_counts(before_RD[wide_R], after_RD[wide_R]).int()
    else:
        wider = INTEGERS[2 * before_RD.element_size()]
        counts_R[wide_R] = _counts(before_RD[wide_R].to(wider), after_RD[wide_R].to(wider))
    return counts_R


def _reaches(values_RD: Tensor, free: int) -> Tensor:
    return (values_RD.amax(1) >= free) | (values_RD.amin(1) <= -free)


def _counts(before_RD: Tensor, after_RD: Tensor) -> Tensor:
    """k of each row whose values leave the top bits of their integers free."""
    keys_RS = torch.cat([before_RD << 1, after_RD << 1 | 1], dim=1).sort(dim=1).values
    sums_RS = (1 - 2 * (keys_RS & 1).to(torch.int32)).cumsum(dim=1, dtype=torch.int32)
    sums_RS[:, :-1].masked_fill_((keys_RS[:, 1:] >> 1) == (keys_RS[:, :-1] >> 1), 0)
    return sums_RS.abs().amax(dim=1)


def scaled_counts(before_RN: Tensor, after_RM: Tensor) -> Tensor:
    """max |#before <= x * m / g - #after <= x * n / g| of each row, g = gcd(n, m): int64 (R,); samples of any sizes."""
    size_before, size_after = before_RN.shape[1], after_RM.shape[1]
    divisor = math.gcd(size_before, size_after)
    merged, source = torch.cat([before_RN, after_RM], dim=1).sort(dim=1)
    up, down = size_after // divisor, size_before // divisor
    sums = torch.where(source < size_before, up, -down).cumsum(dim=1)
    sums[:, :-1].masked_fill_(merged[:, 1:] == merged[:, :-1], 0)
    return sums.abs().amax(dim=1)
