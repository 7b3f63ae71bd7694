"""Run by test_shard.py on several ranks: RowShard against the whole matrix, for many shapes and every kind of parameter."""

import itertools
import unittest.mock
from functools import partial

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers.cases import run_cases
from torch import nn

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.lottery.ks import row_counts
from ksl_ds.lottery.ticket import measure_shift
from ksl_ds.sharding.draw import sharded_shift
from ksl_ds.sharding.engine import destroy_engine
from ksl_ds.sharding.rows import RowShard

ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
# Prime and odd sizes, a row on several ranks, more ranks than rows, one row, one column, nothing to cut.
SHAPES = [(7, 5), (13, 11), (64, 8), (3, 101), (2, 7), (1, 1), (1, 9), (97, 1), (50, 16), (5, 3)]


def matrix(num_rows: int, width: int, seed: int) -> torch.Tensor:
    values_VD = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    values_VD[0, 0] = -0.0  # a sum with zeros would lose its sign
    return values_VD


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def whole(parameter: nn.Parameter) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        return parameter.detach().clone()


def all_rows(rows_RD: torch.Tensor) -> torch.Tensor:
    """All ranks' rows together."""
    return torch.cat(distributed.gather_objects(rows_RD))


def mistake(action) -> str:
    """What an action says, which must be the same on every rank."""
    with pytest.raises(UserError) as caught:
        action()
    (message,) = set(distributed.gather_objects(str(caught.value)))
    return message


def check(parameter: nn.Parameter, values_VD: torch.Tensor, other_VD: torch.Tensor) -> None:
    """Reading, writing, choosing rows and drawing through a shard of a parameter that holds values_VD."""
    num_rows = len(values_VD)
    shard = RowShard(parameter)
    owned = distributed.gather_objects((shard.start, shard.stop))
    assert [row for start, stop in owned for row in range(start, stop)] == list(range(num_rows)), owned
    read_RD = shard.read()
    assert torch.equal(bits(read_RD), bits(values_VD[shard.start : shard.stop]))
    ids_K = torch.tensor(sorted({0, num_rows // 2, num_rows - 1}))
    assert torch.equal(bits(shard.read_rows(ids_K)), bits(values_VD[ids_K]))

    shard.write(other_VD[shard.start : shard.stop])
    assert torch.equal(bits(whole(parameter).float()), bits(other_VD))
    shift, expected = sharded_shift(shard, read_RD), measure_shift(values_VD, other_VD)
    assert torch.equal(shift.count_V, expected.count_V)
    assert torch.equal(shift.shift_norm_V, expected.shift_norm_V)

    shard.write_rows(ids_K, values_VD[ids_K])
    mixed_VD = other_VD.clone()
    mixed_VD[ids_K] = values_VD[ids_K]
    assert torch.equal(bits(whole(parameter).float()), bits(mixed_VD))
    # Reading never gives a live view.
    assert torch.equal(bits(read_RD), bits(values_VD[shard.start : shard.stop]))


def check_shape(number: int, partitioned: bool) -> None:
    num_rows, width = SHAPES[number]
    values_VD, other_VD = matrix(num_rows, width, number), matrix(num_rows, width, 100 + number)
    embedding = nn.Embedding(num_rows, width)
    with torch.no_grad():
        embedding.weight.copy_(values_VD)
    if partitioned:
        deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
    check(embedding.weight, values_VD, other_VD)


# DeepSpeed wants a CPU that is fast in fp16; a slow one computes it too.
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
ENGINES = [
    *itertools.product((0, 1, 2, 3), (None,), ("fp32", "bf16", "fp16")),
    (0, "flat", "bf16"),  # as for DeepSpeed's FusedAdam
    (1, "fp32 sums", "bf16"),
    *itertools.product((2, 3), ("offload_optimizer",), ("fp32", "bf16", "fp16")),
    (3, "offload_param", "bf16"),
]
WIDTH = 7


def check_engine(stage: int, offload: str | None, precision: str) -> None:
    """Under engines the fp32 masters are read and written, and after the engine is gone the weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(31, WIDTH), nn.Linear(WIDTH, WIDTH))
    module[1].requires_grad_(False)
    is_offload = offload in ("offload_optimizer", "offload_param")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **({offload: {"device": "cpu"}} if is_offload else {})},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if offload == "fp32 sums" else {}),
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 128},
    }
    # No decay: in stage 0 DeepSpeed makes a step of its own at once, which would move masters away from the weights.
    optimizer = torch.optim.AdamW([module[0].weight], lr=0.01, weight_decay=0)
    fused = torch.optim.AdamW if offload == "flat" else deepspeed.runtime.engine.FusedAdam
    with unittest.mock.patch.object(deepspeed.runtime.engine, "FusedAdam", fused):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    weight, shard = module[0].weight, RowShard(module[0].weight)
    before_RD = shard.read()
    with torch.no_grad():
        output_before = engine(torch.arange(31)).clone()
    for _ in range(2):
        engine.backward(engine(torch.arange(31)).float().square().sum())
        engine.step()
    if stage:
        master_VD = deepspeed.utils.safe_get_full_fp32_param(weight)
    else:
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        master_VD = inner.param_groups[0]["params"][0].detach().clone()
    master_VD = master_VD.view(31, WIDTH)
    start, stop = shard.start, shard.stop
    assert torch.equal(shard.read(), master_VD[start:stop])
    assert torch.equal(shard.read_rows(torch.arange(31)), master_VD)
    assert not torch.equal(shard.read(), before_RD) or start == stop
    if precision != "fp32":
        # What makes masters worth reading: they are finer than the weights.
        assert not torch.equal(master_VD, whole(weight).float())
    shift, expected = sharded_shift(shard, before_RD, lengths=False), row_counts(all_rows(before_RD), master_VD)
    assert torch.equal(shift.count_V, expected)
    # A matrix that trains alone is cut in nearly equal parts, so that only pieces of rows travel.
    shard.traffic.sent = shard.traffic.received = 0
    shard.read()
    assert max(shard.traffic.sent, shard.traffic.received) <= 2 * WIDTH * 4, shard.traffic
    # Back to the rows before: masters, weights, and what the engine computes with them, also of a small parameter that
    # stays gathered.
    shard.write(before_RD)
    assert torch.equal(shard.read(), before_RD)
    assert torch.equal(whole(weight).float()[start:stop], before_RD)
    with torch.no_grad():
        assert torch.equal(engine(torch.arange(31)), output_before)
    shard.write_rows(torch.tensor([30, 2]), torch.stack([torch.ones(WIDTH), torch.zeros(WIDTH)]))
    assert torch.equal(shard.read_rows(torch.tensor([2, 30])), torch.stack([torch.zeros(WIDTH), torch.ones(WIDTH)]))
    # Training goes on from what was written.
    engine.backward(engine(torch.arange(31)).float().square().sum())
    engine.step()
    assert (shard.read_rows(torch.tensor([30])) - 1).abs().max() < 0.05
    destroy_engine(engine)
    assert torch.equal(shard.read(), whole(weight).float()[start:stop])


def check_not_finite() -> None:
    """A row that is not finite on one rank is the same sentence on all."""
    embedding = nn.Embedding(40, 4)
    deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
    shard = RowShard(embedding.weight)
    before_RD = shard.read()
    shard.write_rows(torch.tensor([39]), torch.full((1, 4), torch.nan))
    for lengths in (True, False):
        message = mistake(partial(sharded_shift, shard, before_RD, lengths=lengths))
        assert "row 39 of after" in message, message


honest = distributed.all_reduce


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    reduced = honest(tensor, op)
    if distributed.rank() == 0 and op == dist.ReduceOp.SUM:
        reduced[0] += 1
    return reduced


def check_disagreement() -> None:
    """A collective that gives one rank another value than the others does not pass for a draw."""
    embedding = nn.Embedding(40, 4)
    deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
    shard = RowShard(embedding.weight)
    before_RD = shard.read()
    if distributed.world_size() > 1:
        with (
            pytest.raises(RuntimeError, match="the ranks disagree"),
            unittest.mock.patch.object(distributed, "all_reduce", all_reduce),
        ):
            sharded_shift(shard, before_RD, lengths=False)


def check_groups() -> None:
    """What is cut over some of the ranks only is refused, not misread."""
    ranks = distributed.world_size()
    if ranks > 1:
        groups = [dist.new_group([rank]) for rank in range(ranks)]
        embedding = nn.Embedding(40, 4)
        group = groups[distributed.rank()]
        deepspeed.zero.Init(module=embedding, data_parallel_group=group, config_dict_or_path=ZERO3)
        message = mistake(partial(RowShard, embedding.weight))
        assert "mics_shard_size" in message, message


def check_traffic() -> None:
    """What travels in a draw.

    Pieces of rows that are broken at the edges, an integer a token and the checksum; with lengths two numbers a token more.
    """
    ranks = distributed.world_size()
    num_rows, width = 3203, 96
    embedding = nn.Embedding(num_rows, width)
    deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
    shard = RowShard(embedding.weight)
    before_RD = shard.read()
    for lengths, vectors in ((False, 1), (True, 3)):
        shard.traffic.sent = shard.traffic.received = 0
        sharded_shift(shard, before_RD, lengths=lengths)
        allowed = width * 4 + 2 * (ranks - 1) / ranks * (vectors * num_rows * 4 + 2 * 32 * 4)
        moved = max(shard.traffic.sent, shard.traffic.received)
        assert moved <= allowed, (moved, allowed)
        totals = distributed.gather_objects((shard.traffic.sent, shard.traffic.received))
        assert sum(sent for sent, _ in totals) == sum(received for _, received in totals), totals
        assert ranks == 1 or moved > vectors * num_rows * 4, moved


GEOMETRIES = {
    f"{SHAPES[number][0]} x {SHAPES[number][1]}, {'partitioned' if partitioned else 'whole'}": partial(
        check_shape, number, partitioned
    )
    for number in range(len(SHAPES))
    for partitioned in (True, False)
}
CASES = GEOMETRIES | {
    f"stage {case[0]}, {case[1] or 'plain'}, {case[2]}": partial(check_engine, *case) for case in ENGINES
}
CASES |= {
    "not finite": check_not_finite,
    "ranks disagree": check_disagreement,
    "groups of ranks": check_groups,
    "traffic": check_traffic,
}
if __name__ == "__main__":
    run_cases(CASES)
