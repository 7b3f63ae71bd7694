"""The two-sample Kolmogorov-Smirnov test for whole embedding matrices: exact, at about the speed of the sort.

`ks_2samp` is the public function, along the last axis of any tensor. `row_counts` is what a draw needs: the integer k of each
row, skipping unchanged rows. Both work in blocks on the tensors' device and never copy them as a whole. All decisions are
made on integers, so they are the same on every device and for any block size.

CPUs sort (sorting.py) or count into buckets (buckets.py), whichever is faster there, in chunks that a core's cache holds, with
`torch.get_num_threads()` threads; GPUs sort and search (kernel.py), in blocks as large as the work space allows.

Legend: V tokens, D coordinates, R rows of a block, B of a smaller one, C changed rows, S the two samples, N and M sizes of
samples that differ in size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksl_ds.lottery.buckets import bucket_counts
from ksl_ds.lottery.kernel import counts_of_sorted
from ksl_ds.lottery.pvalues import PValueMethod, critical_count, pvalues
from ksl_ds.lottery.sorting import fastest, reach_two, sorted_counts

__all__ = ["KSResult", "critical_count", "ks_2samp", "pvalues", "row_counts"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 256 << 20
WORKSPACE_PER_COORDINATE = 256  # bytes at most of a CPU's intermediate results; torch needs fewer, see _torch_chunk
CPU_CHUNK = 1 << 16  # coordinates of a sample at once on a CPU
SCAN = 2  # chunks compared at once; more of them, and the second pass over a block finds it out of the cache
SCANNED_CHUNKS = 4  # of a GPU: their comparison takes no more memory than the sorts of one
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


def ks_2samp(before: Tensor, after: Tensor, *, method: PValueMethod = "exact") -> KSResult:
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
        For anything but floating tensors.
    ValueError
        For shapes that do not match, empty samples, samples on different devices, NaN or infinity (names the first such
        row and its input), or an unknown method.

    Notes
    -----
    Ties are handled by the right-continuous empirical distribution function: equal values, of one sample or of both,
    move it at once. 0.0 and -0.0 are equal. The p-values take the null distribution of samples without ties, which is
    conservative with ties.

    For KS-Lottery the samples are the coordinates of a token's embedding row before and after tuning. Two caveats: the
    samples are paired, not independent, so alpha is a nominal level; and the order of coordinates is ignored, so a
    permuted row has D = 0.

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
    shape = before.shape[:-1]
    size_before = before.shape[-1]
    size_after = after.shape[-1]
    before_RN, after_RM = _matrix(before), _matrix(after)
    if size_before == size_after:
        count_R = row_counts(before_RN, after_RM).long()
        pvalue_R = pvalues(count_R, size_before, method)
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
    """The KS count k of every row, int32 (V,) on the tensors' device.

    Rows without a change have k = 0 and cost a comparison only.

    Parameters
    ----------
    before_VD, after_VD : tensors (V, D)
        Further leading axes are flattened. Memory-mapped tensors are read block by block, and only the changed rows of a
        block a second time. The dtypes may differ: values are compared exactly.
    workspace_bytes : int
        Memory beside the inputs and the result; at least one row is processed at a time.
    progress : callable
        Called after each block with the number of rows in it.
    first_row : int
        Number of the first row in error messages, if the tensors are part of a larger matrix.

    Raises
    ------
    TypeError, ValueError
        As `ks_2samp`. All but NaN and infinity are checked first; those are found when their block is read, since a
        separate pass would read both matrices twice.
    """
    _check(before_VD, after_VD)
    num_rows = math.prod(before_VD.shape[:-1])
    width = before_VD.shape[-1]
    if before_VD.device.type != "cpu":
        return _counts_by_torch(before_VD, after_VD, workspace_bytes, progress, first_row)
    threads = torch.get_num_threads()
    chunk = max(1, workspace_bytes // (WORKSPACE_PER_COORDINATE * width * threads))
    chunk = min(chunk, max(1, CPU_CHUNK // width))
    block = chunk * threads * CHUNKS_A_THREAD
    counts_V = torch.zeros(num_rows, dtype=torch.int32)
    # glibc raises its limit for keeping freed memory to the largest block freed so far, up to 32 MiB. Without this
    # untouched one it gives every chunk's arrays back, and fresh pages for the next triple the time.
    np.empty(30 << 20, np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, num_rows, block):
            stop = min(start + block, num_rows)
            span = -(-(stop - start) // threads)

            def counts_from(first: int, stop: int = stop, span: int = span) -> Tensor:
                rows = slice(first, min(first + span, stop))
                return _counts_on_cpu(before_VD, after_VD, rows, chunk, first_row)

            parts: Iterable[Tensor] = (pool.map if threads > 1 else map)(counts_from, range(start, stop, span))
            counts_V[start:stop] = torch.cat(list(parts))
            if progress is not None:
                progress(stop - start)
    return counts_V


def _counts_on_cpu(before_VD: Tensor, after_VD: Tensor, rows: slice, chunk: int, first_row: int) -> Tensor:
    """k of some rows; int32. Works in numpy, whose operations leave other threads free to run."""
    dtypes = (before_VD.dtype, after_VD.dtype)
    arrays_VD = [_array(values) for values in (before_VD, after_VD)]
    changed: list[NDArray[np.int64]] = []
    for start in range(rows.start, rows.stop, SCAN * chunk):
        block = slice(start, min(start + SCAN * chunk, rows.stop))
        before_RD, after_RD = (_take(array_VD, block) for array_VD in arrays_VD)
        changed.append(start + np.flatnonzero(_changed_or_infinite(before_RD, after_RD, dtypes)))
    numbers_R = np.concatenate(changed)

    # Read again, chunk after chunk: counted during the scan, each chunk would find its work space out of the cache.
    counts_R = np.zeros(rows.stop - rows.start, np.int32)
    for start in range(0, len(numbers_R), chunk):
        taken_R = numbers_R[start : start + chunk]
        before_RD, after_RD = (_take(array_VD, taken_R) for array_VD in arrays_VD)
        before_RD, after_RD, dtype = _common_bits(before_RD, after_RD, dtypes)
        counts_R[taken_R - rows.start] = _changed_counts(before_RD, after_RD, dtype, first_row + taken_R)
    return torch.from_numpy(counts_R)


def _array(values: Tensor) -> NDArray[Any]:
    """The tensor's own memory; 16-bit floats as integers, since numpy does not know bfloat16."""
    values = values.detach()
    return (values.view(torch.int16) if values.element_size() == 2 else values).numpy()


def _take(array_VD: NDArray[Any], rows: slice | NDArray[np.int64]) -> NDArray[Any]:
    """Rows (R, D) of an array of any leading shape."""
    if array_VD.ndim == 2:
        return array_VD[rows]
    return array_VD[np.unravel_index(np.r_[rows], array_VD.shape[:-1])]


def _floats(bits: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    if dtype == torch.bfloat16:  # the upper half of a float32
        return (bits.astype(np.int32) << 16).view(np.float32)
    return bits.view(f"f{bits.itemsize}")


def _common_bits(
    before_RD: NDArray[Any], after_RD: NDArray[Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[NDArray[Any], NDArray[Any], torch.dtype]:
    """Both samples' bits as integers of one dtype, converted where theirs differ, and what they are the bits of."""
    common = torch.promote_types(*dtypes)
    if dtypes[0] != dtypes[1]:
        kind = f"f{common.itemsize}"
        before_RD, after_RD = _floats(before_RD, dtypes[0]).astype(kind), _floats(after_RD, dtypes[1]).astype(kind)
    integer = f"i{common.itemsize}"
    return before_RD.view(integer), after_RD.view(integer), common


def _changed_or_infinite(
    before_RD: NDArray[Any], after_RD: NDArray[Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> NDArray[np.bool_]:
    """Which rows differ, or hold NaN or infinity."""
    if before_RD.dtype == np.int16 and dtypes[0] == dtypes[1]:  # numpy's arithmetic with 16-bit floats is slow
        before_RD, after_RD = np.ascontiguousarray(before_RD), np.ascontiguousarray(after_RD)
        found_R = (_words(before_RD) != _words(after_RD)).any(axis=1)
        # The highest bit of the exponent is set from 2.0 upwards only: one pass clears a block of small numbers.
        if np.bitwise_or.reduce(before_RD.ravel()) >> 14 & 1:
            found_R |= (before_RD & 0x7FFF).max(axis=1) >= _infinity(dtypes[0])
        return found_R
    # One pass for both, at about the speed of reading: x - x is 0.0 for finite x, else NaN. A difference of floats is 0.0 for
    # equal ones only, unless torch.set_flush_denormal makes those below 1e-38 one.
    with np.errstate(all="ignore"):
        difference_RD = np.subtract(_floats(before_RD, dtypes[0]), _floats(after_RD, dtypes[1]), order="C")
    return np.bitwise_or.reduce(_words(difference_RD), axis=1) != 0


def _infinity(dtype: torch.dtype) -> int:
    """The bits of infinity, a 16-bit float: those of finite values are smaller numbers, those of NaNs larger ones."""
    return int(torch.tensor([torch.inf], dtype=dtype).view(torch.int16))


def _words(array_RD: NDArray[Any]) -> NDArray[Any]:
    """The rows' bits as integers, of 64 bits where they fill them."""
    row_bytes = array_RD.shape[1] * array_RD.itemsize
    return array_RD.view(f"i{array_RD.itemsize}" if row_bytes % 8 else np.int64)


def _changed_counts(
    before_RD: NDArray[Any], after_RD: NDArray[Any], dtype: torch.dtype, numbers_R: NDArray[np.int64]
) -> NDArray[np.int32]:
    """k of each row from the bits of both samples, values of `dtype`."""
    large_R = reach_two(before_RD) | reach_two(after_RD)
    if large_R.any():  # only those can hold NaN or infinity
        finite_SR = [np.isfinite(_floats(bits_RD, dtype)).all(axis=1) for bits_RD in (before_RD, after_RD)]
        _check_finite(torch.from_numpy(np.stack(finite_SR)), numbers_R)
    if _sorting_is_faster(dtype):
        return sorted_counts(before_RD, after_RD, large_R)
    counts_R, left_R = bucket_counts(_floats(before_RD, dtype), _floats(after_RD, dtype))
    if left_R.any():
        counts_R[left_R] = sorted_counts(before_RD[left_R], after_RD[left_R], large_R[left_R])
    return counts_R


@cache
def _sorting_is_faster(dtype: torch.dtype) -> bool:
    """Whether numpy here sorts rows of `dtype` in less time than it counts them into buckets; tried once, on random ones.

    The counts are the same either way. With Intel's AVX-512 sorting takes half of the time; on AMD's
    Zen 4 np.sort alone takes 1.2 to 1.5 times as long as counting for float32.
    """
    if dtype == torch.float64:  # buckets hold 32-bit floats
        return True
    values = 0.02 * torch.randn(2, 4, 4096, generator=torch.Generator().manual_seed(0))
    before_RD, after_RD = (_array(values_RD) for values_RD in values.to(dtype))
    before_RD, after_RD, _ = _common_bits(before_RD, after_RD, (dtype, dtype))
    floats = (_floats(before_RD, dtype), _floats(after_RD, dtype))
    no_R = np.zeros(4, np.bool_)
    return fastest([lambda: sorted_counts(before_RD, after_RD, no_R), lambda: bucket_counts(*floats)]) == 0


def _counts_by_torch(
    before_VD: Tensor,
    after_VD: Tensor,
    workspace_bytes: int,
    progress: Callable[[int], object] | None,
    first_row: int,
) -> Tensor:
    """k of every row; int32, on the tensors' device, whichever it is.

    Changed rows are found first, in all of the matrix: a GPU wants many rows at once.
    """
    num_rows = math.prod(before_VD.shape[:-1])
    chunk = _torch_chunk(before_VD, after_VD, workspace_bytes)
    found = [torch.empty(0, dtype=torch.int64, device=before_VD.device)]
    for start in range(0, num_rows, SCANNED_CHUNKS * chunk):
        rows = slice(start, min(start + SCANNED_CHUNKS * chunk, num_rows))
        # Of finite numbers only equal ones have a difference of 0; inf - inf is NaN.
        differs_R = (_rows(before_VD, rows) - _rows(after_VD, rows)).any(dim=1)
        found.append(start + differs_R.nonzero().flatten())
        unchanged = rows.stop - start - len(found[-1])
        if progress is not None and unchanged:
            progress(unchanged)
    changed_C = torch.cat(found)
    counts_V = torch.zeros(num_rows, dtype=torch.int32, device=before_VD.device)
    finite_SC = torch.ones(2, len(changed_C), dtype=torch.bool, device=before_VD.device)
    for start in range(0, len(changed_C), chunk):
        rows_R = changed_C[start : start + chunk]
        before_RD, after_RD, finite_SC[:, start : start + chunk] = _sorted_rows(before_VD, after_VD, rows_R)
        counts_V[rows_R] = counts_of_sorted(before_RD, after_RD)
        if progress is not None:
            progress(len(rows_R))
    _check_finite(finite_SC, first_row + changed_C)  # at the end: the GPU waits for nothing on the way
    return counts_V


def _torch_chunk(before_VN: Tensor, after_VM: Tensor, workspace_bytes: int) -> int:
    """Rows at once. The bytes of a value as measured on an H100: copies of it, and the sorts' indices."""
    itemsize = torch.promote_types(before_VN.dtype, after_VM.dtype).itemsize
    width = max(before_VN.shape[-1], after_VM.shape[-1])
    return max(1, workspace_bytes // ((6 * itemsize + 26) * width))


def _sorted_rows(before_VN: Tensor, after_VM: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both samples of some rows, sorted and in one dtype; and which samples are finite, (2, R)."""
    common = torch.promote_types(before_VN.dtype, after_VM.dtype)
    before_RN = _rows(before_VN, rows_R).to(common).sort(dim=1).values
    after_RM = _rows(after_VM, rows_R).to(common).sort(dim=1).values
    ends = [sample[:, :: max(1, sample.shape[1] - 1)] for sample in (before_RN, after_RM)]  # NaN sorts last
    return before_RN, after_RM, torch.stack([values.isfinite().all(dim=1) for values in ends])


def _check_finite(finite_SR: Tensor, numbers_R: Tensor | NDArray[np.int64]) -> None:
    finite_R = finite_SR.all(dim=0)
    if not bool(finite_R.all()):
        row = int((~finite_R).nonzero()[0])
        name = "after" if bool(finite_SR[0, row]) else "before"
        raise ValueError(f"row {numbers_R[row]} of {name} holds NaN or infinity; the KS test needs finite values")


def _matrix(values: Tensor) -> Tensor:
    """`values` as a matrix of rows where that needs no copy, as it is where it does."""
    return values.reshape(-1, values.shape[-1]) if values.ndim < 3 or values.is_contiguous() else values


def _rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows (R, D) of a tensor of any leading shape: a copy, but for a slice of a matrix."""
    values = values.detach()
    if values.ndim == 2:
        return values[rows]
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=values.device)
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
    chunk = _torch_chunk(before_RN, after_RM, WORKSPACE_BYTES)
    counts_R = torch.zeros(num_rows, dtype=torch.int64, device=before_RN.device)
    for rows_B in torch.arange(num_rows, device=before_RN.device).split(chunk):
        before_BN, after_BM, finite_SB = _sorted_rows(before_RN, after_RM, rows_B)
        _check_finite(finite_SB, rows_B)
        counts_R[rows_B] = counts_of_sorted(before_BN, after_BM).long()
    return counts_R


def _pvalues_of_two_sizes(before_RN: Tensor, after_RM: Tensor, count_R: Tensor, method: PValueMethod) -> Tensor:
    """scipy's p-values: it is asked once for every count that occurs, with a row that has it."""
    from scipy.stats import ks_2samp as scipy_ks_2samp

    pvalue_R = torch.empty(len(count_R), dtype=torch.float64, device=count_R.device)
    for count in count_R.unique():
        with_count_R = count_R == count
        row = with_count_R.nonzero()[0]
        samples = [_rows(values, row)[0].double().cpu().numpy() for values in (before_RN, after_RM)]
        pvalue_R[with_count_R] = float(scipy_ks_2samp(*samples, method=method).pvalue)
    return pvalue_R
