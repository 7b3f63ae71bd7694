"""Run by test_shard.py on four ranks under hpZ: rank 1 is killed in the middle of a draw."""

import os
import signal
from datetime import timedelta

import deepspeed
from torch import nn

from ksl_ds import distributed
from ksl_ds.sharding.draw import sharded_shift
from ksl_ds.sharding.engine import set_library_verbosity
from ksl_ds.sharding.rows import RowShard

distributed.initialize(timeout=timedelta(minutes=5))
set_library_verbosity(False)
embedding = nn.Embedding(101, 7)
zero = {"stage": 3, "zero_hpz_partition_size": 2}
deepspeed.zero.Init(
    module=embedding, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
)
shard = RowShard(embedding.weight)
before_RD = shard.read()
if distributed.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sharded_shift(shard, before_RD)
