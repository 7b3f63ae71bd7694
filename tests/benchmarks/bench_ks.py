"""Speed and memory of the KS test: ksl_ds beside np.sort of both samples (the floor of anything that sorts) and scipy.

    python tests/benchmarks/bench_ks.py            # the table and the memory demonstration; 2 to 4 minutes
    python tests/benchmarks/bench_ks.py --gpu-rows 16032    # on a smaller GPU

Every figure is the median of rounds in which the sides take turns in one process, so that a busy machine slows both alike;
ratios are medians of the rounds' ratios. scipy and np.sort get one thread, as they have, and float32 copies of bfloat16 rows,
which they do not know; scipy gets few rows, as its time a row does not depend on their number. "2 %" is a matrix of which
every 50th row changed, as embed tuning leaves it; its time is that of the whole matrix, over all of its rows. "reading" is
one pass over the bits of both matrices on one thread (np.bitwise_or.reduce), the floor of anything that looks at every row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from ksl_ds.lottery.ks import WORKSPACE_BYTES, row_counts

SHIFT = 0.1  # of a row's standard deviation
clock = time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab", type=int, default=128_256, help="rows of the memory demonstration")
    parser.add_argument("--gpu-rows", type=int, default=128_256, help="rows of 8,192 float32 on the GPU")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, of all threads together: for a machine that others use",
    )
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
    print(
        f"{cpu_name()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; python {platform.python_version()}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}, torch {torch.__version__}\n"
    )
    speed(options.rounds)
    memory(options.vocab)
    if torch.cuda.is_available():
        gpu(options.gpu_rows, options.rounds)
    else:
        print("\nGPU: not run, there is none here")


def speed(rounds: int) -> None:
    print(
        "| d | dtype | rows changed | threads | ours us/row | reading us/row | np.sort us/row | scipy us/row "
        "| ours/sort | scipy/ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for width in (576, 1024, 4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            for every in (1, 50):
                before, after = matrices((1 if every == 1 else 8) * (1 << 21) // width, width, dtype, every)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    ours, read, sort, reference = compare(before, after, rounds)
                    print(
                        f"| {width} | {str(dtype)[6:]} | {'all' if every == 1 else '2 %'} | {threads} "
                        f"| {median(ours):.2f} | {median(read):.2f} | {median(sort):.1f} | {median(reference):.0f} "
                        f"| {ratio(ours, sort):.2f} | {ratio(reference, ours):.0f} |",
                        flush=True,
                    )


def matrices(num_rows: int, width: int, dtype: torch.dtype, every: int) -> tuple[Tensor, Tensor]:
    """Rows N(0, .02^2); every so-manieth is shifted by noise."""
    generator = torch.Generator().manual_seed(width)
    before = 0.02 * torch.randn(num_rows, width, generator=generator)
    after = before.to(dtype).clone()
    changed = before[::every]
    after[::every] = (changed + SHIFT * 0.02 * torch.randn(changed.shape, generator=generator)).to(dtype)
    return before.to(dtype), after


def compare(before: Tensor, after: Tensor, rounds: int) -> tuple[list[float], ...]:
    """Microseconds a row of ours, of reading both matrices, of sorting both, and of scipy, round by round."""
    scipy_rows = 50 if torch.equal(before[1], after[1]) else 8
    before_numpy, after_numpy = before[:512].float().numpy(), after[:512].float().numpy()

    bits = [values.view(torch.int64).numpy().ravel() for values in (before, after)]

    def read() -> None:
        for matrix in bits:
            np.bitwise_or.reduce(matrix)

    def sort() -> None:
        for start in range(0, len(before_numpy), 8):  # in the cache, at its best
            np.sort(before_numpy[start : start + 8], axis=1)
            np.sort(after_numpy[start : start + 8], axis=1)

    def reference() -> None:
        scipy.stats.ks_2samp(before_numpy[:scipy_rows], after_numpy[:scipy_rows], axis=-1)

    sides: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: row_counts(before, after), len(before)),
        (read, len(before)),
        (sort, len(before_numpy)),
        (reference, scipy_rows),
    )
    times: tuple[list[float], ...] = tuple([] for _ in sides)
    for turn in range(rounds + 1):
        for side, (run, num_rows) in zip(times, sides, strict=True):
            elapsed = seconds(run)
            if turn:  # the first one warms up
                side.append(elapsed / num_rows * 1e6)
    return times


def memory(vocab: int, width: int = 8192) -> None:
    """Tests memory-mapped float32 matrices of several GB and watches the process's own memory.

    Pages of a mapped file belong to the system's cache and go when memory is short; what a process cannot give back is its
    anonymous memory (RssAnon), and that is what the stated work space bounds. The files are sparse: 2 % of rows are written.
    """
    before, after = matrices(vocab // 50, width, torch.float32, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name, written in (("before", before), ("after", after)):
            path = Path(folder) / name
            np.memmap(path, np.float32, "w+", shape=(vocab, width))[: 50 * len(written) : 50] = written.numpy()
        print(
            f"\nmemory: two mapped {vocab} x {width} float32 matrices, {vocab * width * 8e-9:.1f} GB, 2 % of rows changed"
        )
        for threads in (1, 2):
            for workspace in (WORKSPACE_BYTES, 8 << 20):
                process = multiprocessing.get_context("spawn").Process(
                    target=watch_test, args=(folder, vocab, width, threads, workspace)
                )
                process.start()
                process.join()


def watch_test(folder: str, vocab: int, width: int, threads: int, workspace: int) -> None:
    """In a fresh process, whose allocator holds no freed memory yet."""
    torch.set_num_threads(threads)
    mapped = [
        torch.from_file(f"{folder}/{name}", shared=True, size=vocab * width).view(vocab, width)
        for name in ("before", "after")
    ]
    with PeakMemory() as peak:
        elapsed = seconds(lambda: row_counts(*mapped, workspace_bytes=workspace))
    print(
        f"  {threads} threads, work space {workspace / 2**20:.0f} MiB: peak of anonymous memory "
        f"{peak.grown / 2**20:.1f} MiB above the start, {elapsed:.1f} s",
        flush=True,
    )


class PeakMemory:
    """Largest growth of the process's anonymous memory within a `with` block, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.start, self.grown, self.running = anonymous_bytes(), 0, True
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.grown = max(self.grown, anonymous_bytes() - self.start)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.watcher.join()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def gpu(num_rows: int, rounds: int) -> None:
    """The CUDA path beside the direct version, the sort of its keys alone and a copy of both matrices."""
    print(f"\nGPU: {torch.cuda.get_device_name()}")
    for dtype in (torch.float32, torch.bfloat16):
        before, after = matrices(512, 8192, dtype, 1)
        before[:64], after[:64] = before[:64].sign(), after[:64].sign()
        before[64:128] = 0.25
        same = torch.equal(row_counts(before.cuda(), after.cuda()).cpu(), row_counts(before, after))
        print(f"  counts of 512 x 8192 {dtype} (random, tied, constant) {'equal' if same else 'DIFFER FROM'} the CPU's")

        before = 0.02 * torch.randn(num_rows, 8192, device="cuda", dtype=dtype)
        after = before + SHIFT * 0.02 * torch.randn_like(before)
        block = 1 << 30 >> 16  # rows of the other sides at once

        def direct(before: Tensor = before, after: Tensor = after, block: int = block) -> None:
            for rows_before, rows_after in zip(before.split(block), after.split(block), strict=True):
                values, order = torch.sort(torch.cat([rows_before, rows_after], dim=1), dim=1)
                sums = torch.where(order < 8192, 1, -1).cumsum(dim=1)
                sums[:, :-1].masked_fill_(values[:, 1:] == values[:, :-1], 0)
                sums.abs().amax(dim=1)

        def sort_keys(before: Tensor = before, after: Tensor = after, block: int = block) -> None:
            integer = torch.int16 if before.dtype == torch.bfloat16 else torch.int32
            for rows_before, rows_after in zip(before.split(block), after.split(block), strict=True):
                torch.sort(torch.cat([rows_before, rows_after], dim=1).view(integer), dim=1)

        def copy(before: Tensor = before, after: Tensor = after) -> None:
            before.clone()
            after.clone()

        sides: tuple[Callable[[], object], ...] = (lambda: row_counts(before, after), direct, sort_keys, copy)  # noqa: B023
        times: list[list[float]] = [[] for _ in sides]
        for turn in range(min(rounds, 5) + 1):
            for side, run in zip(times, sides, strict=True):
                elapsed = seconds(run)
                if turn:
                    side.append(elapsed)
        ours = times[0]
        print(f"  {num_rows} x 8192 {dtype}: ours {median(ours):.3f} s")
        for name, other in zip(("direct version", "sort of the keys alone", "copy of both"), times[1:], strict=True):
            print(f"    {name} {median(other):.3f} s, ours takes {ratio(ours, other):.2f} of that")


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def median(times: list[float]) -> float:
    return statistics.median(times)


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
