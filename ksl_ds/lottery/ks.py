"""The two-sample Kolmogorov-Smirnov test for whole embedding matrices: exact, at about the speed of the sort.

`ks_2samp` is for everybody, along the last axis of any tensor; `row_counts` is the engine behind a draw, which only wants the
integer k of each row and skips rows that did not change. Both work in blocks where the tensors lie and never copy them
as a whole; every decision is made on integers, so it is the same on every device and in any partition into blocks.

Legend: V tokens, D coordinates, R rows of a block, N and M sizes of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ksl_ds.lottery.kernel import block_counts, infinity, ordered, scaled_counts
from ksl_ds.lottery.pvalues import Method, critical_count, pvalue_table

__all__ = ["KSResult", "critical_count", "ks_2samp", "pvalue_table", "row_counts"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 256 << 20
# Bytes of work space for each byte of a block: images of both samples, a copy of the changed rows, keys and scan.
WORKSPACE_PER_BYTE = 12


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
    before_RN, after_RM = before.detach().reshape(-1, size_before), after.detach().reshape(-1, size_after)
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
        Memory-mapped ones are read once, block by block. The dtypes may differ: values are compared exactly.
    workspace_bytes : int
        Work space beside the two inputs and the result; at least one row is worked on at a time.
    progress : callable
        Called after each block with the number of rows in it.
    first_row : int
        What messages call row 0, where the tensors are a part of something larger.

    Raises
    ------
    TypeError, ValueError
        As `ks_2samp`.
    """
    _check(before_VD, after_VD)
    num_rows, width = before_VD.shape
    common = torch.promote_types(before_VD.dtype, after_VD.dtype)
    block = max(1, workspace_bytes // (WORKSPACE_PER_BYTE * width * common.itemsize))
    counts_V = torch.zeros(num_rows, dtype=torch.int32, device=before_VD.device)
    for start in range(0, num_rows, block):
        before_RD, after_RD = _images(before_VD, after_VD, slice(start, start + block), common, first_row)
        changed_R = (before_RD != after_RD).any(dim=1)
        if bool(changed_R.all()):
            counts_V[start : start + block] = block_counts(before_RD, after_RD)
        elif bool(changed_R.any()):
            counts_V[start : start + block][changed_R] = block_counts(before_RD[changed_R], after_RD[changed_R])
        if progress is not None:
            progress(len(before_RD))
    return counts_V


def _images(
    before_VN: Tensor, after_VM: Tensor, rows: slice, common: torch.dtype, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Both samples of some rows as integers that order like their values. Raises ValueError where one is not finite."""
    images = []
    for name, values in (("before", before_VN), ("after", after_VM)):
        image_R = ordered(values[rows].detach().to(common))
        bound = infinity(common)
        if int(image_R.max()) >= bound or int(image_R.min()) <= -bound:
            bad_R = ((image_R >= bound) | (image_R <= -bound)).any(dim=1)
            row = first_row + rows.start + int(bad_R.nonzero()[0])
            raise ValueError(f"row {row} of {name} holds NaN or infinity; the KS test needs finite values")
        images.append(image_R)
    return images[0], images[1]


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
    common = torch.promote_types(before_RN.dtype, after_RM.dtype)
    width = before_RN.shape[1] + after_RM.shape[1]
    block = max(1, WORKSPACE_BYTES // (40 * width))  # merged values, their sources and the scan
    parts = [
        scaled_counts(*_images(before_RN, after_RM, slice(start, start + block), common))
        for start in range(0, len(before_RN), block)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=before_RN.device)


def _pvalues_of_two_sizes(before_RN: Tensor, after_RM: Tensor, count_R: Tensor, method: Method) -> Tensor:
    """scipy's p-values: it is asked once for every count that occurs, with a row that has it."""
    from scipy.stats import ks_2samp as scipy_ks_2samp

    pvalue_R = torch.empty(len(count_R), dtype=torch.float64, device=count_R.device)
    for count in count_R.unique():
        with_count_R = count_R == count
        row = int(with_count_R.nonzero()[0])
        samples = [values[row].double().cpu().numpy() for values in (before_RN, after_RM)]
        pvalue_R[with_count_R] = float(scipy_ks_2samp(*samples, method=method).pvalue)
    return pvalue_R
