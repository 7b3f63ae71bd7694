"""Parts without DeepSpeed: KS kernel and draw against the CPU and scipy; speed of the kernel and of training steps.

Legend: V tokens, D coordinates, P positions of a packed row.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu_check.parts import REPOSITORY, Context, Figures, part, ratio, times_in_turns
from ksl_ds.lottery import ks
from ksl_ds.lottery.ticket import choose_rows, draw_ticket, measure_shift

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK_BYTES = 1 << 30  # of the keys that the other sides sort at once


def device_counts(before_VD: Tensor, after_VD: Tensor, context: Context, workspace_bytes: int) -> Tensor:
    """k of every row by the GPU's kernel, on the CPU in a rehearsal."""
    sides = (before_VD.to(context.device), after_VD.to(context.device))
    return ks._counts_by_torch(*sides, workspace_bytes, None, 0).cpu()


def cases(dtype: torch.dtype, num_rows: int, width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of matrices as tuning leaves them, and the kinds of values that such kernels get wrong."""
    generator = torch.Generator().manual_seed(width)
    before_VD = 0.02 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    after_VD = before_VD + 0.002 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    before_VD, after_VD = before_VD.to(dtype), after_VD.to(dtype)
    yield "all rows changed", before_VD, after_VD
    few_VD = before_VD.clone()
    few_VD[::50] = after_VD[::50]
    yield "2 % of rows changed", before_VD, few_VD
    yield "ties", before_VD.sign(), after_VD.sign()
    zeros_VD = torch.zeros_like(before_VD)
    yield "signed zeros", zeros_VD, -zeros_VD
    tiny = torch.finfo(dtype).tiny
    yield "denormals", (before_VD.double() * tiny).to(dtype), (after_VD.double() * tiny).to(dtype)
    largest = torch.finfo(dtype).max
    yield "largest values", before_VD.sign() * largest, after_VD.sign() * largest / 2
    yield "non-contiguous", before_VD.T.contiguous().T, after_VD.repeat_interleave(2, dim=1)[:, ::2]
    yield "constant", torch.full_like(before_VD, 0.5), torch.full_like(before_VD, 0.25)


@part("kernel", seconds=60)
def ks_counts(context: Context) -> Figures:
    """KS counts equal the CPU's and scipy's: four dtypes, ties, zeros, denormals, large values, strides, two sizes."""
    compared = 0
    num_rows = context.size(512, 60)
    width = context.size(4096, 96)
    for dtype in DTYPES:
        for name, before_VD, after_VD in cases(dtype, num_rows, width):
            expected_V = ks.row_counts(before_VD, after_VD)
            # A work space of a few rows puts block borders everywhere.
            for workspace in (ks.WORKSPACE_BYTES, 7 * 64 * width):
                found_V = device_counts(before_VD, after_VD, context, workspace)
                assert torch.equal(found_V, expected_V), f"{name}, {dtype}: counts differ from the CPU's"
            for row in range(0, num_rows, num_rows // 6):
                theirs = stats.ks_2samp(before_VD[row].double().numpy(), after_VD[row].double().numpy(), method="asymp")
                assert round(theirs.statistic * width) == expected_V[row], f"{name}, {dtype}, row {row}: not scipy's D"
            compared += num_rows
        shorter_VD = next(cases(dtype, num_rows, width))[2][:, : width * 3 // 4]
        longer_VD = next(cases(dtype, num_rows, width))[1]
        ours = ks.ks_2samp(longer_VD.to(context.device), shorter_VD.to(context.device))
        for row in range(0, num_rows, num_rows // 6):
            theirs = stats.ks_2samp(longer_VD[row].double().numpy(), shorter_VD[row].double().numpy(), method="exact")
            assert abs(float(ours.statistic[row]) - theirs.statistic) < 1e-12, f"two sizes, {dtype}: not scipy's D"
            assert np.isclose(float(ours.pvalue[row]), theirs.pvalue, rtol=1e-6, atol=0), (
                f"two sizes, {dtype}: not scipy's p"
            )
    return {"rows compared": compared}


@part("kernel", seconds=30)
def draw(context: Context) -> Figures:
    """A ticket drawn on the GPU equals one drawn on the CPU, by every selection rule of the test."""
    vocab_size = context.size(32_000, 500)
    width = context.size(2048, 64)
    _, before_VD, after_VD = list(cases(torch.bfloat16, vocab_size, width))[1]
    after_VD[::100] *= 1.5
    here = draw_ticket(before_VD, after_VD, alpha=0.5)
    there = draw_ticket(before_VD.to(context.device), after_VD.to(context.device), alpha=0.5)
    assert here.token_ids == there.token_ids, "other rows were drawn"
    assert torch.equal(here.count_V, there.count_V), "counts of the tickets differ"
    assert torch.equal(here.rows_KD, there.rows_KD.cpu()), "rows of the tickets differ"
    on_cpu = measure_shift(before_VD, after_VD)
    on_device = measure_shift(before_VD.to(context.device), after_VD.to(context.device))
    for selection in ("alpha", "top_k", "bonferroni", "benjamini_hochberg"):
        same = choose_rows(on_cpu, selection=selection).tolist() == choose_rows(on_device, selection=selection).tolist()
        assert same, f"selection {selection} differs"
    assert 0 < len(here.token_ids) < vocab_size, f"{len(here.token_ids)} rows were drawn"
    return {"rows drawn": len(here.token_ids), "of": vocab_size}


@part("kernel", seconds=20)
def nan_is_named(context: Context) -> Figures:
    """NaN and infinity on the GPU end in an error that names the row and the side."""
    for value, side in ((float("nan"), "before"), (float("inf"), "after")):
        matrices = {name: torch.rand(64, 96, device=context.device) for name in ("before", "after")}
        matrices[side][17, 5] = value
        try:
            ks.row_counts(matrices["before"], matrices["after"])
        except ValueError as error:
            assert f"row 17 of {side}" in str(error), str(error)
        else:
            raise AssertionError(f"{value} in {side} was not noticed")
    return {}


@part("kernel", seconds=150, speed=True)
def ks_speed(context: Context) -> Figures:
    """KS test of a whole vocabulary beside a copy of both matrices, a bare sort of the keys, and the direct way."""
    figures: Figures = {}
    for width in (context.size(4096, 64), context.size(8192, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            figures |= ks_times(context, context.size(128_256, 200), width, dtype)
    return figures


def ks_times(context: Context, vocab_size: int, width: int, dtype: torch.dtype) -> Figures:
    before_VD = 0.02 * torch.randn(vocab_size, width, device=context.device, dtype=dtype)
    after_VD = before_VD + 0.002 * torch.randn_like(before_VD)
    few_VD = before_VD.clone()
    few_VD[::50] = after_VD[::50]
    times = times_in_turns(
        {
            "all changed": lambda: ks.row_counts(before_VD, after_VD),
            "2 % changed": lambda: ks.row_counts(before_VD, few_VD),
            "direct": lambda: direct(before_VD, after_VD),
            "sort": lambda: sort_keys(before_VD, after_VD),
            "copy": lambda: (before_VD.clone(), after_VD.clone()),
        },
        rounds=context.size(3, 1),
    )
    case = f"{vocab_size:,} x {width:,} {str(dtype).removeprefix('torch.')}"
    gigabytes = 2 * before_VD.numel() * before_VD.element_size() / 1e9
    figures: Figures = {}
    if not context.rehearse:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        ks.row_counts(before_VD, after_VD)
        figures[f"{case}, work space in use: MiB"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    for name in ("all changed", "2 % changed"):
        seconds = statistics.median(times[name])
        figures[f"{case}, {name}: s"] = seconds
        figures[f"{case}, {name}: GB/s"] = gigabytes / seconds
        figures[f"{case}, {name}: times a copy of both"] = ratio(times[name], times["copy"])
    for other, words in (("direct", "the direct way"), ("sort", "a sort of the keys")):
        figures[f"{case}, all changed: times {words}"] = ratio(times["all changed"], times[other])
    return figures


def direct(before_VD: Tensor, after_VD: Tensor) -> None:
    """The way that one writes down first: sort both samples, look every value up in both, take the largest difference."""
    width = before_VD.shape[1]
    block = max(1, BLOCK_BYTES // (width * 32))
    for rows_before, rows_after in zip(before_VD.split(block), after_VD.split(block), strict=True):
        before_BD = rows_before.sort(dim=1).values
        after_BD = rows_after.sort(dim=1).values
        values_BN = torch.cat([before_BD, after_BD], dim=1)
        below_before = torch.searchsorted(before_BD, values_BN, right=True)
        below_after = torch.searchsorted(after_BD, values_BN, right=True)
        (below_before - below_after).abs().amax(dim=1)


def sort_keys(before_VD: Tensor, after_VD: Tensor) -> None:
    """The sort of both samples' keys alone: what a test by one sort cannot be faster than."""
    width = before_VD.shape[1]
    integer = torch.int16 if before_VD.element_size() == 2 else torch.int32
    block = max(1, BLOCK_BYTES // (width * 32))
    for rows_before, rows_after in zip(before_VD.split(block), after_VD.split(block), strict=True):
        torch.sort(torch.cat([rows_before, rows_after], dim=1).view(integer), dim=1)


@part("kernel", seconds=40, speed=True)
def ks_block_size(context: Context) -> Figures:
    """KS test at several sizes of the work space."""
    vocab_size = context.size(32_000, 200)
    width = context.size(8192, 128)
    before_VD = 0.02 * torch.randn(vocab_size, width, device=context.device)
    after_VD = before_VD + 0.002 * torch.randn_like(before_VD)
    sizes = [64, 256, 1024, 4096] if not context.rehearse else [1, 2]
    times = times_in_turns(
        {
            f"{size} MiB": lambda size=size: ks.row_counts(before_VD, after_VD, workspace_bytes=size << 20)  # type: ignore[misc]
            for size in sizes
        },
        rounds=context.size(3, 1),
    )
    return {f"work space of {name}: s": statistics.median(seconds) for name, seconds in times.items()}


@part("kernel", seconds=90, speed=True)
def training_step(context: Context) -> Figures:
    """A training step of a ticket's rows beside PEFT's trainable tokens, a frozen pass and embed tuning: time and memory."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))
    import bench_ticket

    options = SimpleNamespace(
        vocab=context.size(128_256, 512),
        width=context.size(8192, 256),
        layers=2,
        rows=18,
        tokens=context.size(512, 32),
        rounds=context.size(5, 1),
        threads=torch.get_num_threads(),
        dtype="float32" if context.rehearse else "bfloat16",
        device=context.device,
    )
    figures: Figures = {}
    times, _ = bench_ticket.take_turns(options, tied=False)
    for side in bench_ticket.SIDES:
        figures[f"{side}: ms"] = 1000 * statistics.median(times[side])
        figures[f"{side}: of PEFT's time"] = ratio(times[side], times["PEFT"])
    for side in bench_ticket.SIDES:
        figures[f"{side}: GiB above the model"] = bench_ticket.peak_memory(options, False, side) / 2**30
    return figures


@part("kernel", seconds=90, speed=True)
def packed_attention(context: Context) -> Figures:
    """Attention of packed pairs with a mask, as training runs it, beside FlexAttention and beside the pairs padded."""
    figures: Figures = {}
    for pairs in (2,) if context.rehearse else (16, 64, 128):
        figures |= attention_times(context, pairs)
    return figures


def attention_times(context: Context, pairs: int) -> Figures:
    """Forward and backward pass of one layer's attention, 32 heads of 128, pairs of 16 shared and 8 to 56 other tokens."""
    shared = 16
    rest = torch.randint(8, 57, (pairs,), generator=torch.Generator().manual_seed(pairs)).tolist()
    packed = shared + sum(rest)
    longest = shared + max(rest)
    pair_P = torch.repeat_interleave(torch.arange(pairs + 1), torch.tensor([shared, *rest])).to(context.device)
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    sees_PP = ((pair_P == pair_P[:, None]) | (pair_P == 0)).tril()
    mask_PP = torch.zeros(packed, packed, dtype=dtype, device=context.device)
    mask_PP.masked_fill_(~sees_PP, torch.finfo(dtype).min)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((pair_P[key] == pair_P[query]) | (pair_P[key] == 0))

    # Not compiled in a rehearsal, which has no C++ compiler for certain; then there is no gradient either.
    compiled = (lambda function: function) if context.rehearse else torch.compile
    blocks = compiled(create_block_mask)(visible, None, None, packed, packed, device=context.device)
    flex = compiled(flex_attention)

    def values(rows: int, length: int) -> list[Tensor]:
        shape = (rows, context.size(32, 2), length, context.size(128, 16))
        return [
            torch.randn(shape, device=context.device, dtype=dtype, requires_grad=not context.rehearse) for _ in range(3)
        ]

    def both_ways(function: Callable[..., Tensor], inputs: list[Tensor], **settings: object) -> None:
        output = function(*inputs, **settings)
        if output.requires_grad:
            output.sum().backward()

    in_one_row = values(1, packed)
    in_rows = values(pairs, longest)
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        difference = (attention(*in_one_row, attn_mask=mask_PP) - flex(*in_one_row, block_mask=blocks)).abs().max()
    assert difference < 0.05, f"FlexAttention differs by {difference:.2g}"
    times = times_in_turns(
        {
            "mask": lambda: both_ways(attention, in_one_row, attn_mask=mask_PP),
            "FlexAttention": lambda: both_ways(flex, in_one_row, block_mask=blocks),
            "padded": lambda: both_ways(attention, in_rows, is_causal=True),
        },
        rounds=context.size(10, 1),
    )
    case = f"{pairs} pairs, {packed:,} positions"
    return {f"{case}, {name}: ms": 1000 * statistics.median(seconds) for name, seconds in times.items()}
