"""Weights in 8 bits: bounds of the rounding, what is exact, and the same groups for any number of parts."""

from __future__ import annotations

import pytest
import torch

from ksl_ds.sharding.eight_bits import GROUP, Quantizer, dequantise, quantise, round_trip

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_of_255_values(dtype):
    values = torch.randn(8 * GROUP, generator=GENERATOR).to(dtype)
    integers, scale_G = quantise(values)
    assert integers.dtype == torch.int8 and scale_G.dtype == torch.float32 and len(scale_G) == 8
    largest_G = values.float().view(8, -1).abs().amax(1)
    assert torch.equal(scale_G, largest_G / 127)
    grid = torch.arange(-127, 128) * scale_G[:, None]
    nearest = (values.float().view(8, -1, 1) - grid[:, None]).abs().amin(2)
    exact = dequantise(integers, scale_G, torch.float32).view(8, -1)
    assert torch.allclose((values.float().view(8, -1) - exact).abs(), nearest, atol=1e-6)
    assert torch.equal(round_trip(values), exact.view(-1).to(dtype))


def test_groups_do_not_depend_on_the_parts():
    values = torch.randn(8 * GROUP, generator=GENERATOR)
    whole, scale_G = quantise(values)
    parts = [quantise(part) for part in values.chunk(4)]
    assert torch.equal(torch.cat([integers for integers, _ in parts]), whole)
    assert torch.equal(torch.cat([scale for _, scale in parts]), scale_G)
    shaped = Quantizer().dequantize(whole.view(16, -1), scale_G, torch.bfloat16)
    assert torch.equal(shaped, round_trip(values).bfloat16().view(16, -1))


def test_a_group_of_zeros_stays():
    values = torch.cat([torch.zeros(GROUP), torch.ones(GROUP)])
    assert torch.equal(round_trip(values), values)
