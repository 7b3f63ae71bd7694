"""The sharded draw against gathering everything: bytes, seconds and memory on 1 to 4 ranks.

    python tests/benchmarks/bench_draw.py [--rows 32000] [--width 4096] [--changed 0.05] [--ranks 1 2 3 4]

On each number of ranks, in one job and in turns: the draw on whole rows of the ZeRO-3 partition, and what a user would
write, which gathers the matrix on every rank and asks scipy for each changed row. scipy is timed on a sample of the rows
and scaled up, since all of them take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROUNDS = 3
SCIPY_ROWS = 60


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def on_a_rank(num_rows: int, width: int, changed: float) -> None:
    import deepspeed
    import torch
    from scipy.stats import ks_2samp
    from torch import nn

    from ksl_ds import distributed
    from ksl_ds.sharding.draw import sharded_shift
    from ksl_ds.sharding.engine import set_library_verbosity
    from ksl_ds.sharding.rows import RowShard

    distributed.initialize()
    set_library_verbosity(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
        embedding = nn.Embedding(num_rows, width)
    shard = RowShard(embedding.weight)
    before_RD = shard.read()
    moved_RD = before_RD.clone()
    chosen_R = torch.rand(len(moved_RD), generator=torch.Generator().manual_seed(distributed.rank())) < changed
    moved_RD[chosen_R] += 0.3 * torch.randn(int(chosen_R.sum()), width)
    shard.write(moved_RD)
    del moved_RD
    shard.traffic.sent = shard.traffic.received = 0
    held, seconds, gather_seconds = anonymous_bytes(), [], []
    distributed.reset_peak_memory()
    for _ in range(ROUNDS):
        distributed.barrier()
        started = time.perf_counter()
        shift = sharded_shift(shard, before_RD, lengths=False)
        seconds.append(time.perf_counter() - started)
    draw_peak = distributed.peak_memory()
    for _ in range(ROUNDS):
        distributed.barrier()
        started = time.perf_counter()
        with deepspeed.zero.GatheredParameters([embedding.weight]):
            after_VD = embedding.weight.detach().float()
            gather_seconds.append(time.perf_counter() - started)
            gather_held = anonymous_bytes() - held
            rows = (shift.count_V > 0).nonzero().flatten()[:SCIPY_ROWS]
            rows = rows[(rows >= shard.start) & (rows < shard.stop)]
            started = time.perf_counter()
            for row in rows.tolist():
                ks_2samp(before_RD[row - shard.start].numpy(), after_VD[row].numpy())
            scipy_seconds = (time.perf_counter() - started) / max(1, len(rows))
    per_row = max(distributed.gather_objects(scipy_seconds))
    # Of the rank that moved most: the first has no row to complete for a neighbour, the last none to receive.
    moved = max(distributed.gather_objects(max(shard.traffic.sent, shard.traffic.received))) / ROUNDS
    if distributed.is_rank0():
        num_changed = int((shift.count_V > 0).sum())
        ranks = distributed.world_size()
        result = {
            "ranks": ranks,
            "moved": moved,
            "edge_rows": (moved - 2 * (ranks - 1) / ranks * num_rows * 4) / (width * 4),
            "gather_moved": (ranks - 1) / ranks * num_rows * width * 4,
            "seconds": median(seconds),
            "gather_scipy_seconds": median(gather_seconds) + num_changed * per_row,
            "extra_bytes": max(0, draw_peak - held),
            "gather_bytes": gather_held,
            "changed": num_changed,
        }
        print("RESULT", json.dumps(result), flush=True)
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=4_096)
    parser.add_argument("--changed", type=float, default=0.05, help="share of rows that moved")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank(arguments.rows, arguments.width, arguments.changed)
        return
    print(f"{arguments.rows} x {arguments.width} float32, {arguments.changed:.0%} of the rows moved, one thread a rank")
    print("ranks |  moved by a rank: draw   (edge rows)   full gather | draw s | gather + scipy s | ratio | extra MiB")
    for ranks in arguments.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port, __file__, *sys.argv[1:]]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not lines:
            sys.exit(f"the job on {ranks} ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = json.loads(lines[0].removeprefix("RESULT"))
        print(
            f"{ranks:5} | {found['moved'] / 1e6:15.3f} MB {found['edge_rows']:10.2f} {found['gather_moved'] / 1e6:15.1f} MB "
            f"| {found['seconds']:6.3f} | {found['gather_scipy_seconds']:16.1f} "
            f"| {found['gather_scipy_seconds'] / found['seconds']:5.0f} | {found['extra_bytes'] / 2**20:.0f} against "
            f"{found['gather_bytes'] / 2**20:.0f}"
        )


if __name__ == "__main__":
    main()
