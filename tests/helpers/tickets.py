"""Matrices with rows that moved, tickets drawn from them, and a pickle that must never be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from ksl_ds.lottery.ticket import Ticket

IDS = [3, 17, 64, 130]


def shifted(before_VD: torch.Tensor, ids: list[int] = IDS, seed: int = 1) -> torch.Tensor:
    after_VD = before_VD.clone()
    noise_KD = torch.randn(len(ids), before_VD.shape[1], generator=torch.Generator().manual_seed(seed)).abs() + 1
    after_VD[ids] = (before_VD[ids].float() + noise_KD).to(before_VD.dtype)
    return after_VD


def random_matrix(vocab_size: int = 134, num_samples: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(vocab_size, num_samples, generator=torch.Generator().manual_seed(0)).to(dtype)


def same(left: Ticket, right: Ticket) -> bool:
    tensors = ("rows_KD", "base_rows_KD", "count_V")
    plain = [{k: v for k, v in vars(ticket).items() if k not in tensors} for ticket in (left, right)]
    equal = all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
    return plain[0] == plain[1] and equal and left.base_rows_KD.dtype == right.base_rows_KD.dtype


class Malicious:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
