"""The counts of many two-sample KS tests at once: one sort of small integers a row.

k = max over x of |#before <= x - #after <= x|. A float's bits, read as sign and magnitude, order like the float; the sample
it came from is put below them as the lowest bit, and one integer sort merges both samples. Numbers below 2 in magnitude
leave that bit free in a key of their own width (the bits of 2.0 are 0x40...0 in every IEEE format), so an embedding row is
sorted as 16- or 32-bit integers, at nearly the speed of sorting the two samples apart. Larger numbers get wider keys.

Walking up the merged row, +1 for a value of `before` and -1 for one of `after`, the sum is the difference of the two
counts at the last of a run of equal values; sums within a run are left out. CPUs read most rows' k off the places of the
samples in the merged row instead, as a running sum waits for itself at every value.

GPUs take this for every row; CPUs where it is faster than buckets.py, and for what that leaves to it. On CPUs numpy sorts
(with AVX where there is), many times faster than torch there.

Legend: R rows of a block, D values of a sample, S = 2 D merged values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Ints = NDArray[np.signedinteger]


def ordered(values: Tensor) -> Tensor:
    """Integers of the values' width that order as the floats do; -0.0 and 0.0 are one."""
    bits: Any = values.contiguous().view(INTEGERS[values.element_size()])
    magnitude = torch.iinfo(bits.dtype).max
    if not bits.is_cuda:  # in numpy, as all work on CPUs: torch would start threads of its own in each of ours
        bits = bits.numpy()
    image, sign = bits & magnitude, bits >> (8 * values.element_size() - 1)  # 0 or -1
    image ^= sign
    image -= sign
    return torch.as_tensor(image)


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
    if values_RD.is_cuda:
        return (values_RD.amax(1) >= free) | (values_RD.amin(1) <= -free)
    array_RD = values_RD.numpy()
    return torch.from_numpy((array_RD.max(axis=1) >= free) | (array_RD.min(axis=1) <= -free))


def _counts(before_RD: Tensor, after_RD: Tensor) -> Tensor:
    if before_RD.is_cuda:
        return counts_by_torch(before_RD, after_RD)
    return torch.from_numpy(counts_by_numpy(before_RD.numpy(), after_RD.numpy()))


def counts_by_numpy(before_RD: Ints, after_RD: Ints) -> NDArray[np.int32]:
    """k of each row whose values leave the top bits of their integers free.

    Without a sum: the i-th value of `before` (from 0), at place p of the merged row, has i values of `before` and p - i of
    `after` ahead of it, so the difference is 2 i - p there and one more behind it. Equal values come `before` first. So no
    difference below 0 is overstated, and one above 0 only where an equal value of `after` follows; such rows are walked.
    """
    num_rows, width = before_RD.shape
    keys_RS = np.concatenate([before_RD, after_RD], axis=1)
    keys_RS <<= 1
    keys_RS[:, width:] |= 1
    keys_RS.sort(axis=1)
    place_RD = np.flatnonzero(keys_RS.ravel() & 1 == 0).reshape(num_rows, width)  # counted through all rows
    ahead_RD = np.arange(0, 2 * width, 2) + np.arange(0, keys_RS.size, 2 * width)[:, None] - place_RD
    rows_R, highest_R = np.arange(num_rows), ahead_RD.argmax(axis=1)
    above_R, below_R = ahead_RD[rows_R, highest_R] + 1, -ahead_RD.min(axis=1)
    place_R = place_RD[rows_R, highest_R]
    next_R = keys_RS.ravel().take(place_R + 1, mode="clip")
    overstated_R = (above_R > below_R) & (keys_RS.ravel()[place_R] >> 1 == next_R >> 1)
    counts_R = np.maximum(above_R, below_R).astype(np.int32)
    if overstated_R.any():
        counts_R[overstated_R] = _walked_counts(keys_RS[overstated_R])
    return counts_R


def _walked_counts(keys_RS: Ints) -> NDArray[np.int32]:
    sums_RS = np.cumsum(1 - 2 * (keys_RS & 1).astype(np.int8), axis=1, dtype=np.int32)
    keys_RS >>= 1
    sums_RS[:, :-1] *= keys_RS[:, 1:] != keys_RS[:, :-1]  # exact at the last of equal values
    return np.maximum(sums_RS.max(axis=1), -sums_RS.min(axis=1))


def counts_by_torch(before_RD: Tensor, after_RD: Tensor) -> Tensor:
    """The same as `counts_by_numpy`, on the tensors' device: one sort, one scan."""
    keys_RS = torch.cat([before_RD << 1, after_RD << 1 | 1], dim=1).sort(dim=1).values
    sums_RS = (1 - 2 * (keys_RS & 1).to(torch.int32)).cumsum(dim=1, dtype=torch.int32)
    sums_RS[:, :-1].masked_fill_((keys_RS[:, 1:] >> 1) == (keys_RS[:, :-1] >> 1), 0)
    return sums_RS.abs().amax(dim=1)


def scaled_counts(before_RN: Tensor, after_RM: Tensor) -> Tensor:
    """max |#before <= x * m / g - #after <= x * n / g| of each row, g = gcd(n, m): int64 (R,); samples of any sizes."""
    size_before, size_after = before_RN.shape[1], after_RM.shape[1]
    divisor = int(np.gcd(size_before, size_after))
    merged, source = torch.cat([before_RN, after_RM], dim=1).sort(dim=1)
    up, down = size_after // divisor, size_before // divisor
    sums = torch.where(source < size_before, up, -down).cumsum(dim=1)
    sums[:, :-1].masked_fill_(merged[:, 1:] == merged[:, :-1], 0)
    return sums.abs().amax(dim=1)
