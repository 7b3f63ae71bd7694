"""Bandwidth within and between hosts, measured, and what a training step will cost in communication.

ZeRO-3 gathers weights from all ranks and reduces gradients over all ranks. Under hierarchical partitioning (hpZ) frozen
weights are gathered from the ranks that share a copy, so a host's network carries only what is trained. These three
collectives are timed, all hosts at once, as in training; the bytes of a step come from estimate/memory.py. A ring enters a
host once, so what a rank receives in a collective of all ranks is what its host receives from others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import Needs, Zero, rank_needs
from ksl_ds.estimate.plan import Estimated, plan_of
from ksl_ds.preflight.checks import Checklist
from ksl_ds.report.tables import duration, size
from ksl_ds.sharding.engine import TORCH_DTYPE, accumulation_steps

FIRST_BYTES = 1 << 18  # also on a slow network a matter of seconds
MOST_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}
GROWTH = 8
ROUND_SECONDS = 0.1  # a round that is long beside what starting a collective takes
ROUNDS = 5


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that a rank receives, in the collectives of a training step."""

    gather: float  # all-gather over all ranks
    reduce: float  # reduce-scatter over all ranks
    gather_within: float | None  # all-gather over the ranks that share a copy (hpZ), all hosts at once

    def seconds(self, needs: Needs) -> float:
        """What a step of one micro-batch communicates for, were nothing computed meanwhile."""
        seconds = (needs.wire_between - needs.wire_gradients) / self.gather + needs.wire_gradients / self.reduce
        return seconds + (needs.wire_within / self.gather_within if self.gather_within else 0)


def ranks_of_copy(checks: Checklist, zero: Zero) -> int:
    """How many ranks share a copy of the weights under hpZ: as configured, else those of a host; 1 where it has no use."""
    if zero.host_ranks > 1:
        return zero.host_ranks
    here = checks.hosts.count(checks.hosts[0])
    equal = all(checks.hosts.count(host) == here for host in checks.hosts)
    return here if zero.stage == 3 and equal and here < distributed.world_size() else 1


def bandwidth_check(checks: Checklist, recipe: Recipe, copies: int) -> Bandwidth | None:
    """Measures and prints the bandwidth; None for one rank. Collective. `copies`: as from `ranks_of_copy`."""
    ranks = distributed.world_size()
    if ranks == 1:
        return None
    dtype = TORCH_DTYPE[recipe.training.precision]

    def gather(whole: Tensor, part: Tensor, group: Any) -> None:
        dist.all_gather_into_tensor(whole, part, group=group)

    def reduce(whole: Tensor, part: Tensor, group: Any) -> None:
        dist.reduce_scatter_tensor(part, whole, group=group)

    within = None
    if copies > 1:
        groups = [dist.new_group(list(range(first, first + copies))) for first in range(0, ranks, copies)]
        mine = groups[distributed.rank() // copies]
        within = bytes_per_second(gather, mine, copies, dtype)
        dist.destroy_process_group(mine)
    found = Bandwidth(
        bytes_per_second(gather, None, ranks, dtype), bytes_per_second(reduce, None, ranks, dtype), within
    )
    several = len(set(checks.hosts)) > 1
    where = "between hosts" if several else "within the host"
    line = f"{where} {_bits(found.gather)} by all-gather, {_bits(found.reduce)} by reduce-scatter"
    if within is not None:
        line += f"; within a host {_bits(within)} by all-gather"
    checks.add("ok", "network", line)
    return found


def bytes_per_second(
    collective: Callable[[Tensor, Tensor, Any], None], group: Any, ranks: int, dtype: torch.dtype
) -> float:
    """The median of several rounds of a collective of `group`, a group of `ranks` ranks; the slowest rank counts."""
    device = distributed.device()

    def round_of(numel: int) -> float:
        part = torch.zeros(numel, dtype=dtype, device=device)
        whole = torch.zeros(numel * ranks, dtype=dtype, device=device)
        distributed.barrier()
        started = time.perf_counter()
        collective(whole, part, group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=device)
        return distributed.all_reduce(seconds, dist.ReduceOp.MAX).item()

    most = MOST_BYTES[device.type] // (ranks * dtype.itemsize)
    numel = FIRST_BYTES // (ranks * dtype.itemsize) + 1
    round_of(numel)  # makes connections
    while round_of(numel) < ROUND_SECONDS and numel < most:
        numel = min(GROWTH * numel, most)
    rounds = [round_of(numel) for _ in range(ROUNDS)]
    return numel * (ranks - 1) * dtype.itemsize / statistics.median(rounds)


def traffic_check(checks: Checklist, recipe: Recipe, bandwidth: Bandwidth, zero: Zero, copies: int) -> None:
    """Prints what a step of each training run of the recipe costs in communication, without and with hpZ."""
    names = [Estimated.of(recipe)]
    if recipe.method == "embed":  # a lottery goes on with the ticket
        names.append(Estimated.of(replace(recipe, method="ticket")))
    try:
        plan = plan_of(recipe)
        training = plan.training()
        checkpointing = recipe.training.gradient_checkpointing
        methods = [plan.method(name, checkpointing=checkpointing, dry_run=False) for name in names]
    except UserError:
        return  # reported by `memory_check`
    several = len(set(checks.hosts)) > 1
    for method in methods:
        ways = []
        for ranks_of_host in dict.fromkeys((1, copies)):
            needs = rank_needs(method, training, replace(zero, host_ranks=ranks_of_host), distributed.world_size())
            way = step_line(needs, bandwidth, accumulation_steps(recipe), several=several)
            way = f"with hpZ {way}" if ranks_of_host > 1 else way
            ways.append(way + " (this recipe)" * (copies > 1 and ranks_of_host == max(1, zero.host_ranks)))
        line = f"{method.name}: a step receives {'; '.join(ways)}; without overlap with computation"
        checks.add("ok", "traffic", line)


def step_line(needs: Needs, bandwidth: Bandwidth, micro_batches: int, *, several: bool) -> str:
    """What a step of so many micro-batches receives, from where, and how long that takes."""
    seconds = duration(micro_batches * bandwidth.seconds(needs))
    between = size(micro_batches * needs.wire_between)
    if not several:
        return f"{between} in {seconds}"
    within = f" and {size(micro_batches * needs.wire_within)} within" if needs.wire_within else ""
    return f"{between} between hosts{within} in {seconds}"


def _bits(bytes_per_second: float) -> str:
    gigabits = 8e-9 * bytes_per_second
    return f"{gigabits:,.0f} Gbit/s" if gigabits >= 100 else f"{gigabits:.3g} Gbit/s"
