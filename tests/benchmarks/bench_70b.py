"""One rank's share of a draw at LLaMA-3-70B's size, really run: 128,256 x 8,192, on 8, 64 and 512 ranks.

    python tests/benchmarks/bench_70b.py [--rows 128256] [--width 8192] [--ranks 512 64 8] [--changed 1.0]

A rank's part of the flattened matrix is made with the bounds that ZeRO-3 gives it (the rank in the middle, whose rows are
broken at both ends), the snapshot beside it, and the draw's own code tests its rows block by block and chooses among all
tokens.
What the other ranks would add, one integer a token and the pieces of broken rows, is counted and not sent. At 8 ranks this
takes 1.1 GB of memory, and the same for the weights.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from ksl_ds import distributed
from ksl_ds.lottery.selection import select_alpha
from ksl_ds.lottery.ticket import measure_shift
from ksl_ds.sharding.draw import BLOCK_BYTES
from ksl_ds.sharding.geometry import owned_rows, travelling, zero3_parts

ROUNDS = 3


def draw_of_a_rank(num_rows: int, width: int, ranks: int, changed: float) -> dict[str, float]:
    """Seconds and bytes of one rank's draw, median of some rounds."""
    numel, rank = num_rows * width, ranks // 2
    parts = zero3_parts(numel, -(-numel // ranks), ranks)
    rows = owned_rows(parts, num_rows, width)
    received = sum(span.size for (_, owner), span in travelling(parts, rows, width).items() if owner == rank)
    generator = torch.Generator().manual_seed(rank)
    before_RD = torch.randn(rows[rank].size, width, generator=generator).mul_(0.02)
    after_RD = before_RD.clone()
    moved = torch.rand(len(after_RD), generator=generator) < changed
    for row in moved.nonzero().flatten().tolist():
        after_RD[row] += 0.01 * torch.randn(width, generator=generator)
    block, seconds = max(1, BLOCK_BYTES // (4 * width)), []
    distributed.reset_peak_memory()
    held = distributed.peak_memory()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        count_V = torch.zeros(num_rows, dtype=torch.int32)
        for first in range(0, len(before_RD), block):
            part = slice(first, first + block)
            shift = measure_shift(before_RD[part], after_RD[part], first_row=rows[rank].start + first)
            start = rows[rank].start + first
            count_V[start : start + len(shift.count_V)] = shift.count_V
        ids_K = select_alpha(count_V, width, 0.05)
        seconds.append(time.perf_counter() - started)
    return {
        "rows": len(before_RD),
        "drawn": len(ids_K),
        "seconds": median(seconds),
        "snapshot": 4 * before_RD.numel(),
        "extra": distributed.peak_memory() - held,
        "received": 4 * received + 8 * num_rows * (ranks - 1) / ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=8_192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 64, 8])
    parser.add_argument("--changed", type=float, default=1.0, help="share of rows that moved")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.rows} x {arguments.width} float32, {arguments.changed:.0%} of the rows moved, one thread")
    print("ranks | rows of a rank | draw s | ms/row | snapshot MiB | beyond it MiB | received KiB | drawn")
    for ranks in arguments.ranks:
        found = draw_of_a_rank(arguments.rows, arguments.width, ranks, arguments.changed)
        print(
            f"{ranks:5} | {found['rows']:14,} | {found['seconds']:6.2f} | {1000 * found['seconds'] / found['rows']:6.3f} "
            f"| {found['snapshot'] / 2**20:12.1f} | {found['extra'] / 2**20:13.1f} | {found['received'] / 2**10:12.1f} "
            f"| {found['drawn']:,}"
        )


if __name__ == "__main__":
    main()
