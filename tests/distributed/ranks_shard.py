"""Run by test_shard.py on several ranks: RowShard against the whole matrix, for many shapes and every kind of parameter."""

import deepspeed
import torch
from torch import nn

from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import measure_shift
from ksl_ds.sharding import cluster
from ksl_ds.sharding.draw import sharded_shift
from ksl_ds.sharding.engine import dismantle, quiet_libraries
from ksl_ds.sharding.rows import RowShard

cluster.start()
quiet_libraries(False)
RANKS, ZERO3 = cluster.world_size(), {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
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


def check(parameter: nn.Parameter, values_VD: torch.Tensor, other_VD: torch.Tensor) -> None:
    """Reading, writing, choosing rows and drawing through a shard of a parameter that holds values_VD."""
    num_rows = len(values_VD)
    shard = RowShard(parameter)
    owned = cluster.gather_objects((shard.start, shard.stop))
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


for number, (num_rows, width) in enumerate(SHAPES):
    values_VD, other_VD = matrix(num_rows, width, number), matrix(num_rows, width, 100 + number)
    for partitioned in (True, False):
        embedding = nn.Embedding(num_rows, width)
        with torch.no_grad():
            embedding.weight.copy_(values_VD)
        if partitioned:
            deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
        check(embedding.weight, values_VD, other_VD)

# Under engines: the fp32 masters are read and written, and after the engine is gone the weights.
for stage, offload in ((0, False), (1, False), (2, False), (2, True), (3, False), (3, True)):
    for precision in ("fp32", "bf16"):
        if stage == 0 and precision == "bf16":
            continue  # masters of this stage are whole on every rank; the weights decide
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(31, 7), nn.Linear(7, 7))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})},
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": precision == "bf16"},
        }
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        weight, shard = module[0].weight, RowShard(module[0].weight)
        before_RD = shard.read()
        engine.backward(engine(torch.arange(31)).float().square().sum())
        engine.step()
        master_VD = deepspeed.utils.safe_get_full_fp32_param(weight) if stage else weight.detach().float().clone()
        if stage == 3:
            master_VD = master_VD.view(31, 7)
        assert torch.equal(shard.read(), master_VD[shard.start : shard.stop]), (stage, precision)
        assert not torch.equal(shard.read(), before_RD)
        shard.write(before_RD)
        assert torch.equal(shard.read(), before_RD), (stage, precision)
        weights_VD = whole(weight).float()
        assert torch.equal(weights_VD[shard.start : shard.stop], before_RD), (stage, precision)
        shard.write_rows(torch.tensor([30]), torch.ones(1, 7))
        assert torch.equal(shard.read_rows(torch.tensor([30])), torch.ones(1, 7))
        dismantle(engine)
        weights_VD = whole(weight).float()
        assert torch.equal(shard.read(), weights_VD[shard.start : shard.stop]), (stage, precision)

# A row that is not finite on one rank is the same sentence on all.
embedding = nn.Embedding(40, 4)
deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
shard = RowShard(embedding.weight)
before_RD = shard.read()
shard.write_rows(torch.tensor([39]), torch.full((1, 4), torch.nan))
try:
    sharded_shift(shard, before_RD)
except UserError as error:
    message = str(error)
assert len(set(cluster.gather_objects(message))) == 1 and "row 39 of after" in message, message

# What travels: the broken rows at the edges, and vectors over the vocabulary.
embedding = nn.Embedding(3200, 96)
deepspeed.zero.Init(module=embedding, config_dict_or_path=ZERO3)
shard = RowShard(embedding.weight)
sharded_shift(shard, shard.read())
vectors = 3 * 2 * (RANKS - 1) * 3200 * 4 / RANKS
for moved in (shard.traffic.sent, shard.traffic.received):
    assert moved <= 2 * 96 * 4 + vectors, (moved, vectors)  # it was read twice
cluster.say(f"{RANKS} ranks: {shard.traffic}")
cluster.stop()
