"""The counts of many two-sample KS tests at once: one sort of small integers a row.

k = max over x of |#before <= x - #after <= x|. A float's bits, read as sign and magnitude, order like the float; the sample
it came from is put below them as the lowest bit, and one integer sort merges both samples. Numbers below 2 in magnitude
leave that bit free in a key of their own width (the bits of 2.0 are 0x40...0 in every IEEE format), so an embedding row is
sorted as 16- or 32-bit integers, at nearly the speed of sorting the two samples alone. Larger numbers get wider keys.

Walking up the merged row, +1 for a value of `before` and -1 for one of `after`, the sum is the difference of the two
counts, at the last of a run of equal values. Within a run `before` comes first. So a minimum is always at a run's start or
end, hence exact; a maximum may be an artefact of the order, and is looked at again where it would decide.

On CPUs numpy sorts (AVX-512 where there is), many times faster than torch there; on GPUs torch does.

Legend: R rows of a block, D values of a sample, S = 2 D merged values.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_BYTES = 1 << 20  # of keys at once on a CPU: what a core's cache holds

Ints = NDArray[np.signedinteger]

# For 16 steps, packed by numpy into two bytes read as one number, bit 0 = up and 1 = down: their sum, its extremes on the way,
# and after which step it is highest first.
_BITS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16)[:, None].view(np.uint8), axis=1)
_WALKS = np.cumsum(1 - 2 * _BITS.astype(np.int8), axis=1, dtype=np.int8)
WORD_SUM, WORD_LOW, WORD_HIGH = _WALKS[:, -1].copy(), _WALKS.min(axis=1), _WALKS.max(axis=1)
WORD_HIGHEST = _WALKS.argmax(axis=1).astype(np.int8)
WORD = 16


def ordered(values: Tensor) -> Tensor:
    """Integers of the values' width that order as the floats do; -0.0 and 0.0 are one. Not finite: `beyond` it."""
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
    if before_RD.is_cuda:
        return counts_by_torch(before_RD, after_RD)
    return torch.from_numpy(counts_by_numpy(before_RD.numpy(), after_RD.numpy()))


def counts_by_numpy(before_RD: Ints, after_RD: Ints) -> NDArray[np.int32]:
    """k of each row whose values leave the top bits of their integers free."""
    num_rows, width = before_RD.shape
    counts_R = np.empty(num_rows, np.int32)
    chunk = max(1, CHUNK_BYTES // (2 * width * before_RD.itemsize))
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        size = len(before_RD[rows])
        keys_RS = np.empty((size, 2 * width), before_RD.dtype)
        np.left_shift(before_RD[rows], 1, out=keys_RS[:, :width])
        np.left_shift(after_RD[rows], 1, out=keys_RS[:, width:])
        keys_RS[:, width:] |= 1
        keys_RS.sort(axis=1)
        counts_R[rows] = _walk(keys_RS)
    return counts_R


def _walk(keys_RS: Ints) -> NDArray[np.int32]:
    """k from merged keys, sixteen steps at a time."""
    num_rows, length = keys_RS.shape
    # A row is filled up to whole words with pairs of up and down, which end where they start.
    down_RS = np.empty((num_rows, -(-length // WORD) * WORD), np.uint8)
    np.bitwise_and(keys_RS, 1, out=down_RS[:, :length], casting="unsafe")
    down_RS[:, length::2], down_RS[:, length + 1 :: 2] = 0, 1
    words_RW = np.packbits(down_RS, axis=1).view(np.uint16)
    sums_RW = WORD_SUM[words_RW]
    starts_RW = np.cumsum(sums_RW, axis=1, dtype=np.int32)
    starts_RW -= sums_RW
    fall_R = -(starts_RW + WORD_LOW[words_RW]).min(axis=1)
    highs_RW = starts_RW + WORD_HIGH[words_RW]
    counts_R = np.maximum(fall_R, 0)
    # A rise decides only where it is higher than the fall, and is exact where it is reached at the end of a run.
    rising = np.flatnonzero(highs_RW.max(axis=1) > counts_R)
    word = highs_RW[rising].argmax(axis=1)
    step = word * WORD + WORD_HIGHEST[words_RW[rising, word]]
    inside = np.minimum(step, length - 2)
    ends_run = ((keys_RS[rising, inside] ^ keys_RS[rising, inside + 1]) >> 1 != 0) & (step == inside)
    counts_R[rising[ends_run]] = highs_RW[rising[ends_run], word[ends_run]]
    doubtful = rising[~ends_run]
    if len(doubtful):
        counts_R[doubtful] = np.maximum(counts_R[doubtful], _rise_with_ties(keys_RS[doubtful]))
    return counts_R


def _rise_with_ties(keys_RS: Ints) -> NDArray[np.int32]:
    """The highest sum at the end of a run of equal values."""
    steps_RS = 1 - 2 * (keys_RS & 1).astype(np.int8)
    sums_RS = np.cumsum(steps_RS, axis=1, dtype=np.int16 if keys_RS.shape[1] < 1 << 15 else np.int32)
    sums_RS[:, :-1] *= (keys_RS[:, 1:] ^ keys_RS[:, :-1]) >> 1 != 0
    return sums_RS.max(axis=1)


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
