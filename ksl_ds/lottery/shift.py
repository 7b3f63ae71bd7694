"""The KS test of a whole vocabulary, and the selection of rows from its result.

The test gives one integer k per token. Selection rules work on these integers (controls also on how far rows moved), so
another rule or alpha needs no second test.

V tokens, D coordinates of a row (num_samples), B rows of a block, K rows drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.files import write_bytes
from ksl_ds.lottery.ks import row_counts
from ksl_ds.lottery.pvalues import PValueMethod, critical_count, pvalues
from ksl_ds.lottery.selection import RULES

SHIFT_TENSORS = ("count", "shift_norm", "shift_ratio")


@dataclass(frozen=True)
class Shift:
    """The result of a KS test of a whole vocabulary.

    Attributes
    ----------
    count_V : int32 tensor (V,)
        k of each token; its KS statistic is D = k / num_samples.
    shift_norm_V : float32 tensor (V,)
        Euclidean norm of after - before.
    shift_ratio_V : float32 tensor (V,)
        That norm divided by the norm of before: 0 for an unchanged row, the largest float32 if an all-zero row changed.
    num_samples : int
        Width D of a row, the size of both samples.
    tested_dtype : str
        Of the compared values, such as "float32" for master weights or "bfloat16" for saved checkpoints.
    """

    count_V: Tensor
    shift_norm_V: Tensor
    shift_ratio_V: Tensor
    num_samples: int
    tested_dtype: str


def measure_shift(
    before_VD: Tensor,
    after_VD: Tensor,
    *,
    workspace_bytes: int = 1 << 28,
    progress: Callable[[int], object] | None = None,
    first_row: int = 0,
) -> Shift:
    """Tests every row of `after_VD` against the same row of `before_VD`.

    Parameters
    ----------
    before_VD, after_VD : tensors (V, D)
        Of any floating dtype; memory-mapped tensors are read in blocks.
    workspace_bytes : int
        Memory beside the inputs and the result.
    progress : callable
        Called with the number of rows done since its last call.
    first_row : int
        Number of the first row in error messages.

    Raises
    ------
    ValueError
        For different shapes, NaN or infinity.
    """
    if before_VD.shape != after_VD.shape or before_VD.ndim != 2:
        raise ValueError(f"the matrices must have the same shape (V, D), not {before_VD.shape} and {after_VD.shape}")
    num_samples = before_VD.shape[1]
    count_V = row_counts(before_VD, after_VD, workspace_bytes=workspace_bytes, progress=progress, first_row=first_row)
    norms, ratios = [], []
    # A block needs four float32 copies.
    block = max(1, workspace_bytes // (16 * num_samples))
    for before_BD, after_BD in zip(before_VD.split(block), after_VD.split(block), strict=True):
        norm_B, ratio_B = shift_of_rows(before_BD, after_BD)
        norms.append(norm_B)
        ratios.append(ratio_B)
    tested = torch.promote_types(before_VD.dtype, after_VD.dtype)
    return Shift(count_V, torch.cat(norms), torch.cat(ratios), num_samples, dtype_name(tested))


def save_shift(shift: Shift, path: Path) -> None:
    """Writes the test of all tokens as safetensors, atomically. Raises UserError."""
    tensors = {name: getattr(shift, f"{name}_V").cpu().contiguous() for name in SHIFT_TENSORS}
    metadata = {"num_samples": str(shift.num_samples), "tested_dtype": shift.tested_dtype}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def load_shift(path: Path) -> Shift:
    """Reads what `save_shift` wrote. Raises UserError for a missing or damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {f"{name}_V": file.get_tensor(name) for name in SHIFT_TENSORS}
            metadata = file.metadata()
        shift = Shift(**tensors, num_samples=int(metadata["num_samples"]), tested_dtype=metadata["tested_dtype"])
        _check_shift(shift)
        return shift
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a valid KS test of all tokens: {error}") from None


def _check_shift(shift: Shift) -> None:
    """Raises ValueError if shapes, dtypes or values are impossible."""
    count_V = shift.count_V
    kinds = {"count": torch.int32, "shift_norm": torch.float32, "shift_ratio": torch.float32}
    for name, dtype in kinds.items():
        values_V = getattr(shift, f"{name}_V")
        if values_V.ndim != 1 or len(values_V) != len(count_V) or values_V.dtype != dtype:
            found = f"{tuple(values_V.shape)} {dtype_name(values_V.dtype)}"
            raise ValueError(f"{name} is {found}; it must be ({len(count_V)},) {dtype_name(dtype)}")
        if not values_V.isfinite().all() or (values_V < 0).any():
            raise ValueError(f"{name} holds NaN, infinity or a negative number")
    if len(count_V) == 0 or int(count_V.max()) > shift.num_samples:
        raise ValueError(f"count is empty or above num_samples ({shift.num_samples})")


def shift_of_rows(before_BD: Tensor, after_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's shift norm, and its ratio to the row's norm before; both float32 (B,) on the rows' device."""
    before_BD = before_BD.float()
    norm_B = torch.linalg.vector_norm(after_BD.float() - before_BD, dim=1)
    ratio_B = norm_B / torch.linalg.vector_norm(before_BD, dim=1)
    ratio_B = torch.where(norm_B == 0, torch.zeros_like(norm_B), ratio_B.clamp(max=torch.finfo(torch.float32).max))
    return norm_B, ratio_B


def choose_rows(
    shift: Shift,
    *,
    selection: str = "alpha",
    alpha: float = 0.05,
    method: PValueMethod = "exact",
    top_k: int = 18,
    seed: int = 0,
    frequency_V: Tensor | None = None,
) -> Tensor:
    """The drawn token ids, int64 (K,), ascending; empty where no row passes.

    Raises
    ------
    ValueError
        For an unknown selection, alpha outside (0, 1), top_k that is no number of rows, or a rule by frequency without
        `frequency_V`.
    """
    if selection not in RULES:
        raise ValueError(f"selection is {selection!r}; it must be one of {', '.join(RULES)}")
    rule = RULES[selection]
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; a significance level lies between 0 and 1, both excluded")
    if "top_k" in rule.inputs and not 1 <= top_k <= len(shift.count_V):
        raise ValueError(f"top_k is {top_k}; it must lie between 1 and the {len(shift.count_V)} rows of the embedding")
    if "frequency_V" in rule.inputs and frequency_V is None:
        raise ValueError(f"selection {selection} needs how often each token occurs in the training text")
    known = {
        "count_V": shift.count_V,
        "num_samples": shift.num_samples,
        "shift_norm_V": shift.shift_norm_V,
        "shift_ratio_V": shift.shift_ratio_V,
        "vocab_size": len(shift.count_V),
        "frequency_V": frequency_V,
        "alpha": alpha,
        "method": method,
        "top_k": top_k,
        "seed": seed,
    }
    return rule.select(**{name: known[name] for name in rule.inputs})


def explain_empty(shift: Shift, alpha: float, method: PValueMethod = "exact") -> str:
    """A sentence on why no row was drawn at `alpha`, and what to change."""
    num_samples = shift.num_samples
    largest = int(shift.count_V.max())
    pvalue = float(pvalues(torch.tensor(largest), num_samples, method))
    ratios = ", ".join(f"{ratio:.3g}" for ratio in shift.shift_ratio_V.sort(descending=True).values[:3].tolist())
    needed = critical_count(num_samples, alpha, method) / num_samples
    return (
        f"the ticket is empty: the largest D is {largest / num_samples:.4f} (p = {pvalue:.3g}), p < {alpha} needs "
        f"D >= {needed:.4f}, and the largest shifts are {ratios} of their row's length; raise the learning rate or the "
        "number of steps so that rows move further, raise alpha, or take the rows of largest D with selection=top_k"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")
