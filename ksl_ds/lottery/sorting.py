"""KS counts on a CPU: one sort of small integers a row, in numpy, which sorts many times faster than torch there.

A float's bits, read as sign and magnitude, have the order of the floats. The lowest bit of a key tells the sample, so one
integer sort merges both samples. Numbers below 2 in magnitude leave a bit free in a key of their own width (the bits of 2.0
are 0x40...0 in every IEEE format), so an embedding row is sorted as 16- or 32-bit integers, nearly as fast as sorting the two
samples separately. Larger numbers get wider keys.

Along the sorted row, with +1 for a value of `before` and -1 for one of `after`, the cumulative sum at the last of equal
values is the difference of the two counts; k is the largest in magnitude. Eight values are processed at a time: one byte
has their steps, another the ends of runs of equal values, and tables give the result of each pair.

Legend: R rows, D values of a sample, M = 2 D merged values, B = M / 8 bytes of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ksl_ds.lottery.kernel import counts_of_sorted

Ints = NDArray[np.signedinteger[Any]]

NEVER = 1 << 30  # beyond any sum


def _tables() -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Sum of a byte's steps (256,); highest and lowest sum at an end, by ends * 256 + steps (65536,)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    sums = (1 - 2 * bits.astype(np.int32)).cumsum(axis=1, dtype=np.int32)
    ends = bits[:, None, :] == 1
    highest = np.where(ends, sums, -NEVER).max(axis=2)
    lowest = np.where(ends, sums, NEVER).min(axis=2)
    return sums[:, -1].copy(), highest.ravel(), lowest.ravel()


STEPS, HIGHEST, LOWEST = _tables()


def fastest(ways: Sequence[Callable[[], object]]) -> int:
    """Which of several ways to the same result takes least processor time here: its index. 20 tries of each, in turns."""
    seconds = [math.inf] * len(ways)
    for _ in range(20):
        for number, way in enumerate(ways):
            start = time.thread_time()
            way()
            seconds[number] = min(seconds[number], time.thread_time() - start)
    return seconds.index(min(seconds))


@cache
def _fastest_sort() -> Literal["quicksort", "stable"]:
    """numpy's faster sort of 16-bit integers here; tried once.

    "stable" is a radix sort for them: 60 us for 8,192 on a processor with AVX2, where "quicksort" takes 360. The latter is
    the faster one where it has AVX-512 instructions for 16 bits.
    """
    keys_RM = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (4, 4096), dtype=np.int16)
    stable = fastest([lambda: np.sort(keys_RM, axis=1), lambda: np.sort(keys_RM, axis=1, kind="stable")])
    return "stable" if stable else "quicksort"


def sorted_counts(before_RD: Ints, after_RD: Ints, large_R: NDArray[np.bool_]) -> NDArray[np.int32]:
    """k of each row, int32 (R,), from the bits of its finite values; `large_R`: `reach_two` of either sample."""
    samples = (before_RD, after_RD)
    own = before_RD.dtype
    if not large_R.any():
        return _counts(samples, own)
    counts_R = np.empty(len(large_R), np.int32)
    counts_R[~large_R] = _counts([bits_RD[~large_R] for bits_RD in samples], own)
    large = [bits_RD[large_R] for bits_RD in samples]
    if own.itemsize == 8:  # no integer holds such a key: the samples are sorted apart
        counts_R[large_R] = counts_of_sorted(
            *(torch.from_numpy(np.sort(bits_RD.view("f8"))) for bits_RD in large)
        ).numpy()
    else:
        counts_R[large_R] = _counts(large, np.dtype(f"i{2 * own.itemsize}"))
    return counts_R


def reach_two(bits_RD: Ints) -> NDArray[np.bool_]:
    """Which rows hold a number of 2 or more in magnitude, infinity or NaN: their exponent's top bit is set; (R,)."""
    return np.bitwise_or.reduce(bits_RD, axis=1) >> (8 * bits_RD.itemsize - 2) & 1 == 1


def _counts(samples: Sequence[Ints], key_type: np.dtype[Any]) -> NDArray[np.int32]:
    keys_RM = _keys(samples, key_type)
    keys_RM.sort(axis=1, kind=_fastest_sort() if keys_RM.itemsize == 2 else None)
    ends_RM = np.ones(keys_RM.shape, np.bool_)
    np.greater((keys_RM[:, 1:] ^ keys_RM[:, :-1]).view(f"u{keys_RM.itemsize}"), 1, out=ends_RM[:, :-1])
    steps_RB = np.packbits(keys_RM.astype(np.int8) & 1, axis=1, bitorder="little")
    code_RB = np.packbits(ends_RM, axis=1, bitorder="little").astype(np.intp)
    code_RB <<= 8
    code_RB |= steps_RB
    step_RB = STEPS.take(steps_RB)
    sum_RB = step_RB.cumsum(axis=1, dtype=np.int32)
    sum_RB -= step_RB  # ahead of each byte
    above_R, below_R = (sum_RB + HIGHEST.take(code_RB)).max(axis=1), (sum_RB + LOWEST.take(code_RB)).min(axis=1)
    return np.maximum(above_R, -below_R)


def _keys(samples: Sequence[Ints], key_type: np.dtype[Any]) -> Ints:
    """Twice the signed magnitude (-0.0 and 0.0 are one), plus 1 for a value of the second sample; (R, M)."""
    (num_rows, width) = samples[0].shape
    own = samples[0].dtype
    keys_RM = np.empty((num_rows, 2 * width), key_type)
    for keys_RD, bits_RD in zip((keys_RM[:, :width], keys_RM[:, width:]), samples, strict=True):
        sign_RD = bits_RD >> (8 * own.itemsize - 1)  # 0 or -1
        np.left_shift(bits_RD, 1, out=keys_RD, dtype=key_type)
        if key_type != own:  # else the sign fell out at the top
            keys_RD &= (1 << 8 * own.itemsize) - 1
        keys_RD ^= sign_RD
        keys_RD -= sign_RD
    keys_RM[:, width:] |= 1
    return keys_RM
