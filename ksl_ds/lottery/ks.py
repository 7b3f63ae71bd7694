"""The two-sample Kolmogorov-Smirnov test for whole embedding matrices: exact, at about the speed of the sort.

`ks_2samp` is for everybody, along the last axis of any tensor; `row_counts` is the engine behind a draw, which only wants the
integer k of each row and skips rows that did not change. Both work in blocks where the tensors lie and never copy them
as a whole; every decision is made on integers, so it is the same on every device and in any partition into blocks.

CPUs count into buckets (buckets.py), in chunks that a core's cache holds, with `torch.get_num_threads()` threads; GPUs sort
(kernel.py), in blocks as large as the work space allows.

Legend: V tokens, D coordinates, R rows of a block, S the two samples, N and M sizes of samples that differ in size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksl_ds.lottery.buckets import bucket_counts
from ksl_ds.lottery.kernel import INTEGERS, block_counts, infinity, ordered, scaled_counts
from ksl_ds.lottery.pvalues import Method, critical_count, pvalue_table

__all__ = ["KSResult", "critical_count", "ks_2samp", "pvalue_table", "row_counts"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 256 << 20
WORKSPACE_PER_COORDINATE = 256  # bytes at most, of all intermediate results together
CPU_CHUNK = 1 << 16  # coordinates of a sample at once on a CPU
SCAN = 16  # chunks compared at once
CHUNKS_A_THREAD = 256  # before the threads wait for each other and progress is told


class KSResult(NamedTuple):
    """Result of `ks_2samp`, one entry a row.

    Attributes
    ----------
    statistic : float64 tensor
        D = k / d: largest distance of the empirical distribution functions.
    pvalue : float64 tensor
        Probability of a D at least as large under the null hypothesis.
    count : int64 tensor
        k; with samples of different sizes n and m, D times their least common multiple.
    """

    statistic: Tensor
    pvalue: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in scipy's own results


def ks_2samp(before: Tensor, after: Tensor, *, method: Method = "exact") -> KSResult:
    """Two-sided two-sample Kolmogorov-Smirnov test along the last axis.

    Parameters
    ----------
    before : tensor (..., n)
        First samples; float64, float32, float16 or bfloat16, on any device.
    after : tensor (..., m)
        Second samples, with the same leading shape and device. The dtypes may differ: values are compared exactly.
    method : {'exact', 'asymp'}
        Distribution of the statistic under the null hypothesis. 'exact' counts lattice paths (for n = m by the
        Gnedenko-Korolyuk series, one table for all rows); 'asymp' is scipy's asymptotic formula, as the authors of
        KS-Lottery use it. They disagree about one count in a thousand, at thresholds.

    Returns
    -------
    KSResult
        statistic (float64), pvalue (float64) and count (int64), each of the leading shape, on the samples' device.

    Raises
    ------
    TypeError
        For something else than floating tensors.
    ValueError
        For shapes that do not match, empty samples, samples on two devices, NaN or infinity (names the first such row
        and its input), or an unknown method.

    Notes
    -----
    Ties are handled by the right-continuous empirical distribution function: equal values, of one sample or of both,
    move it at once. 0.0 and -0.0 are equal. The p-values take the null distribution of samples without ties, which is
    conservative with ties.

    For KS-Lottery the samples are the coordinates of a token's embedding row before and after tuning. What the test
    then does not claim: the two are paired, not independent, so a level is nominal; and the order of coordinates does
    not count, so a permuted row has D = 0.

    References
    ----------
    .. [1] J. L. Hodges, "The significance probability of the Smirnov two-sample test", Arkiv för Matematik 3, 1958.
    .. [2] B. V. Gnedenko and V. S. Korolyuk, "On the maximum discrepancy between two empirical distributions", 1951.
    .. [3] Yuan et al., "KS-Lottery: Finding Certified Lottery Tickets for Multilingual Language Models",
       arXiv:2402.02801.

    Examples
    --------
    >>> import torch
    >>> from ksl_ds import ks_2samp
    >>> before = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    >>> after = torch.tensor([[3.0, 2.0, 1.0], [4.0, 5.0, 6.0]])
    >>> result = ks_2samp(before, after)
    >>> result.count
    tensor([0, 3])
    >>> result.pvalue
    tensor([1.0000, 0.1000], dtype=torch.float64)
    """
    _check(before, after)
    if method not in ("exact", "asymp"):
        raise ValueError(f"method is {method!r}; it must be exact or asymp")
    shape, size_before, size_after = before.shape[:-1], before.shape[-1], after.shape[-1]
    before_RN, after_RM = _matrix(before), _matrix(after)
    if size_before == size_after:
        count_R = row_counts(before_RN, after_RM).long()
        pvalue_R = pvalue_table(size_before, method).to(count_R.device)[count_R]
    else:
        count_R = _blocks_of_two_sizes(before_RN, after_RM)
        pvalue_R = _pvalues_of_two_sizes(before_RN, after_RM, count_R, method)
    statistic_R = count_R.double() / math.lcm(size_before, size_after)
    return KSResult(statistic_R.reshape(shape), pvalue_R.reshape(shape), count_R.reshape(shape))


def row_counts(
    before_VD: Tensor,
    after_VD: Tensor,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: Callable[[int], object] | None = None,
    first_row: int = 0,
) -> Tensor:
    """k of every row: how far the KS test sees `after_VD` from `before_VD`; int32 (V,) on their device.

    Rows without a change have k = 0 and cost a comparison only.

    Parameters
    ----------
    before_VD, after_VD : tensors (V, D)
        More leading axes count as one of their product. Memory-mapped tensors are read once, block by block. The
        dtypes may differ: values are compared exactly.
    workspace_bytes : int
        Work space beside the two inputs and the result; at least one row is worked on at a time.
    progress : callable
        Called after each block with the number of rows in it.
    first_row : int
        What messages call row 0, where the tensors are a part of something larger.

    Raises
    ------
    TypeError, ValueError
        As `ks_2samp`; NaN or infinity is found when its block is read.
    """
    _check(before_VD, after_VD)
    num_rows, width = math.prod(before_VD.shape[:-1]), before_VD.shape[-1]
    on_cpu = before_VD.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    chunk = max(1, workspace_bytes // (WORKSPACE_PER_COORDINATE * width * threads))
    if on_cpu:
        chunk = min(chunk, max(1, CPU_CHUNK // width))
    block = chunk * threads * (CHUNKS_A_THREAD if on_cpu else 1)
    counts_V = torch.zeros(num_rows, dtype=torch.int32, device=before_VD.device)
    if on_cpu:
        # glibc raises its limit for keeping freed memory to the largest block freed so far, up to 32 MiB. Without this
        # untouched one it gives every chunk's arrays back, and fresh pages for the next triple the time.
        np.empty(30 << 20, np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, num_rows, block):
            stop = min(start + block, num_rows)
            span = -(-(stop - start) // threads)

            def counts_from(first: int, stop: int = stop, span: int = span) -> Tensor:
                rows = slice(first, min(first + span, stop))
                if on_cpu:
                    return _counts_on_cpu(before_VD, after_VD, rows, chunk, first_row)
                return _counts_on_gpu(before_VD, after_VD, rows, first_row)

            parts: Iterable[Tensor] = (pool.map if threads > 1 else map)(counts_from, range(start, stop, span))
            counts_V[start:stop] = torch.cat(list(parts))
            if progress is not None:
                progress(stop - start)
    return counts_V


def _counts_on_cpu(before_VD: Tensor, after_VD: Tensor, rows: slice, chunk: int, first_row: int) -> Tensor:
    """k of some rows; int32. Works in numpy, whose operations leave other threads free to run."""
    common = torch.promote_types(before_VD.dtype, after_VD.dtype)
    infinite = infinity(common)
    shape = (2, min(chunk, rows.stop - rows.start), before_VD.shape[-1])
    values_SRD = np.empty(shape, np.float64 if common == torch.float64 else np.float32)
    scratch_SRD = np.empty(shape, np.int64)
    counts_R = np.zeros(rows.stop - rows.start, np.int32)
    filled, numbers_R = 0, np.empty(shape[1], np.int64)  # of changed rows, counted as soon as there is a chunk of them

    def count_changed() -> None:
        counts_R[numbers_R[:filled]] = _changed_counts(values_SRD[:, :filled], scratch_SRD[:, :filled])

    for start in range(rows.start, rows.stop, SCAN * chunk):
        stop = min(start + SCAN * chunk, rows.stop)
        before_RD, after_RD = (
            _bits(_rows(values, start, stop).to(common).contiguous()) for values in (before_VD, after_VD)
        )
        changed_R = np.flatnonzero((_words(before_RD) != _words(after_RD)).any(axis=1))
        finite_R = _are_finite(before_RD, infinite)
        finite_after_R = _are_finite(after_RD[changed_R], infinite) if len(changed_R) else finite_R
        if not (finite_R.all() and finite_after_R.all()):
            _check_finite(
                torch.stack([torch.isfinite(_rows(v, start, stop)).all(1) for v in (before_VD, after_VD)]),
                first_row + start,
            )
        while len(changed_R):
            taken_R, changed_R = np.split(changed_R, [shape[1] - filled])
            to = slice(filled, filled + len(taken_R))
            values_SRD[0, to], values_SRD[1, to] = (_floats(bits[taken_R], common) for bits in (before_RD, after_RD))
            numbers_R[to] = start - rows.start + taken_R
            filled = to.stop
            if filled == shape[1]:
                count_changed()
                filled = 0
    if filled:
        count_changed()
    return torch.from_numpy(counts_R)


def _bits(values: Tensor) -> NDArray[Any]:
    """Signed integers; numpy does not know bfloat16."""
    return values.view(INTEGERS[values.element_size()]).numpy()


def _words(bits_RD: NDArray[Any]) -> NDArray[Any]:
    """The same rows in fewer, longer integers where they fill them: only equality counts."""
    return bits_RD if bits_RD.shape[1] * bits_RD.itemsize % 8 else bits_RD.view(np.int64)


def _floats(bits: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    if dtype == torch.bfloat16:  # the upper half of a float32
        return (bits.astype(np.int32) << 16).view(np.float32)
    return bits.view(np.dtype(f"f{bits.itemsize}"))


def _are_finite(bits_RD: NDArray[Any], infinite: int) -> NDArray[np.bool_]:
    """Which rows are: negative numbers are the largest as unsigned integers, and the least as signed ones."""
    # The highest bit of the exponent is set from 2.0 upwards only: one pass clears a matrix of small numbers.
    if not np.bitwise_or.reduce(bits_RD.ravel()) >> (8 * bits_RD.itemsize - 2) & 1:
        return np.ones(len(bits_RD), bool)
    unsigned_RD = bits_RD.view(f"u{bits_RD.itemsize}")
    minus_infinite = infinite + (1 << (8 * bits_RD.itemsize - 1))
    return (bits_RD.max(axis=1) < infinite) & (unsigned_RD.max(axis=1) < minus_infinite)


def _changed_counts(values_SRD: NDArray[Any], scratch_SRD: NDArray[np.int64]) -> NDArray[Any]:
    if values_SRD.dtype == np.float32:
        counts_R, left_R = bucket_counts(values_SRD, scratch_SRD)
    else:
        counts_R, left_R = np.zeros(values_SRD.shape[1], np.int64), np.ones(values_SRD.shape[1], bool)
    if left_R.any():
        before_RD, after_RD = torch.from_numpy(values_SRD[:, left_R])
        counts_R[left_R] = block_counts(ordered(before_RD), ordered(after_RD)).numpy()
    return counts_R


def _counts_on_gpu(before_VD: Tensor, after_VD: Tensor, rows: slice, first_row: int) -> Tensor:
    """k of some rows; int32. On the tensors' device, whichever it is."""
    before_RD, after_RD = _images(before_VD, after_VD, rows.start, rows.stop, first_row)
    changed_R = (before_RD != after_RD).any(dim=1)
    if bool(changed_R.all()):
        return block_counts(before_RD, after_RD)
    counts_R = torch.zeros(len(before_RD), dtype=torch.int32, device=before_RD.device)
    if bool(changed_R.any()):
        counts_R[changed_R] = block_counts(before_RD[changed_R], after_RD[changed_R])
    return counts_R


def _images(before_VN: Tensor, after_VM: Tensor, start: int, stop: int, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Both samples of some rows as integers that order like their values."""
    common = torch.promote_types(before_VN.dtype, after_VM.dtype)
    before_RN, after_RM = (ordered(_rows(values, start, stop).to(common)) for values in (before_VN, after_VM))
    bound = infinity(common)
    finite_SR = torch.stack([(image.amin(1) > -bound) & (image.amax(1) < bound) for image in (before_RN, after_RM)])
    _check_finite(finite_SR, first_row + start)
    return before_RN, after_RM


def _check_finite(finite_SR: Tensor, first_row: int) -> None:
    finite_R = finite_SR.all(dim=0)
    if not bool(finite_R.all()):
        row = int((~finite_R).nonzero()[0])
        name = "after" if bool(finite_SR[0, row]) else "before"
        raise ValueError(f"row {first_row + row} of {name} holds NaN or infinity; the KS test needs finite values")


def _matrix(values: Tensor) -> Tensor:
    """`values` as a matrix of rows where that needs no copy, as it is where it does."""
    return values.reshape(-1, values.shape[-1]) if values.ndim < 3 or values.is_contiguous() else values


def _rows(values: Tensor, start: int, stop: int) -> Tensor:
    """Rows (R, D) of a tensor of any leading shape; a copy of those rows at most."""
    values = values.detach()
    if values.ndim == 2:
        return values[start:stop]
    rows = torch.arange(start, min(stop, math.prod(values.shape[:-1])), device=values.device)
    return values[torch.unravel_index(rows, values.shape[:-1])]


def _check(before: Tensor, after: Tensor) -> None:
    for name, values in (("before", before), ("after", after)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}; it must be a torch tensor")
        if values.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {values.dtype}; it must be float64, float32, float16 or bfloat16")
        if values.ndim == 0 or values.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; its last axis must hold a sample")
    if before.shape[:-1] != after.shape[:-1]:
        raise ValueError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}; all axes but the last must agree"
        )
    if before.device != after.device:
        raise ValueError(f"before is on {before.device} and after on {after.device}; move them to one device")


def _blocks_of_two_sizes(before_RN: Tensor, after_RM: Tensor) -> Tensor:
    num_rows = math.prod(before_RN.shape[:-1])
    width = before_RN.shape[-1] + after_RM.shape[-1]
    block = max(1, WORKSPACE_BYTES // (WORKSPACE_PER_COORDINATE * width))
    counts_R = torch.zeros(num_rows, dtype=torch.int64, device=before_RN.device)
    for start in range(0, num_rows, block):
        counts_R[start : start + block] = scaled_counts(*_images(before_RN, after_RM, start, start + block))
    return counts_R


def _pvalues_of_two_sizes(before_RN: Tensor, after_RM: Tensor, count_R: Tensor, method: Method) -> Tensor:
    """scipy's p-values: it is asked once for every count that occurs, with a row that has it."""
    from scipy.stats import ks_2samp as scipy_ks_2samp

    pvalue_R = torch.empty(len(count_R), dtype=torch.float64, device=count_R.device)
    for count in count_R.unique():
        with_count_R = count_R == count
        row = int(with_count_R.nonzero()[0])
        samples = [_rows(values, row, row + 1)[0].double().cpu().numpy() for values in (before_RN, after_RM)]
        pvalue_R[with_count_R] = float(scipy_ks_2samp(*samples, method=method).pvalue)
    return pvalue_R
