"""Weights in 8 bits: groups of consecutive elements, each a signed integer times the scale of its group.

Groups are of the flattened weight, so a weight is rounded in the same way for any number of ranks.

Legend: N elements, G groups; all tensors are flat unless named otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 256  # elements that share a scale: 1.6 % of what they take
LARGEST = 127


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds values to int8 (N,), scales float32 (G,). N is a multiple of GROUP."""
    values_GN = values.detach().float().view(-1, GROUP)
    scale_G = values_GN.abs().amax(dim=1) / LARGEST
    divisor_G1 = torch.where(scale_G == 0, 1, scale_G).unsqueeze(1)
    return (values_GN / divisor_G1).round_().to(torch.int8).view(-1), scale_G


def dequantise(integers: Tensor, scale_G: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of integers of any shape, in `dtype`: products in float32, rounded once."""
    values = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    groups = (len(scale_G), -1)
    torch.mul(integers.view(groups), scale_G.unsqueeze(1), out=values.view(groups))
    return values


def round_trip(values: Tensor) -> Tensor:
    """Values as they are after rounding to 8 bits, in their dtype."""
    return dequantise(*quantise(values), values.dtype)


class Quantizer:
    """What DeepSpeed calls for gathered integers, in place of its CUDA kernels, which make and read fp16 only."""

    def dequantize(self, integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """As `dequantise`."""
        return dequantise(integers, scale, dtype)


def scale_of(part: Any) -> Tensor | None:
    """The scales of a partition that is in 8 bits; None for any other."""
    return getattr(part, "ds_quant_scale", None)
