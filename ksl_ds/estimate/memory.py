"""What a training run needs per rank, as arithmetic: memory by kind, communication, the smallest number of ranks.

With N ranks, P parameters, T of them trained, b bytes per weight (2 in bf16 and fp16, 4 in fp32), and each parameter
partitioned into N parts, rounded up:

    weights      stage 3: b P / N, and b for each element of a parameter small enough to stay whole on every rank too
                 (stage3_param_persistence_threshold); stages 0 to 2: b P. With hpZ (zero_hpz_partition_size) the
                 host's own copy beside it, b P / H for H ranks of a host. In 8 bits
                 (zero_quantized_nontrainable_weights) frozen matrices but the embedding take r = 1 + 4/256 bytes an element
                 instead of b, here and on the wire
    gradients    b T / N in stages 2 and 3, b T below: what is kept between micro-batches
    optimizer    12 T / N: fp32 master, exp_avg, exp_avg_sq (12 T in stage 0). Frozen parameters have neither gradients nor
                 optimizer states
    step         while the optimizer steps: fp32 gradients and the new 16-bit weights, 6 T / N (4 T / N in fp32) of at most
                 sub_group_size elements at once, or the largest part in fp64 for the gradient's norm
    buffers      b reduce_bucket_size, made when training starts (contiguous_gradients)
    gathered     stage 3: weights gathered at one time: the maximum of the largest parameter, of what is kept for the
                 backward pass (half of stage3_max_reuse_distance, which counts forward and backward) and, as every module
                 prefetches another bucket, of stage3_max_live_parameters; plus one prefetch bucket, b P at most; plus the
                 bucket again, since weights are copied out of the receive buffer
    working      activations, logits and passing gradients, measured by a dry run (model/dry_run.py); unknown where
                 an architecture does not run there
    snapshot     4 V D / N of host memory for the embedding before tuning, method embed only
    wire, step   of one micro-batch. Stage 3: it receives b P (N-1)/N of weights in the forward pass and again in the
                 backward pass, less what stayed whole, and b T (N-1)/N of gradients; an optimizer step, the small
                 parameters that are whole everywhere. Under checkpointing DeepSpeed drops a recomputed layer's frozen
                 weights after the backward pass of its last matrix, so all but that one come once more. Below stage 3: 2 b
                 T (N-1)/N of gradients, all-reduced, and half as much of new weights in stages 1 and 2
    between      of it what a host receives from others: as much as a rank, since a ring enters a host once. With hpZ frozen
                 weights come from the host, so only the trained ones and their gradients: 3 b T (N-1)/N; the rest is
                 `within` the host, with (H-1)/H
    wire, draw   one int32 for each of V tokens, all-reduced: 8 V (N-1)/N, and a row of 4 D at most (sharding/draw.py)

The optimizer's step and the forward and backward passes are not at the same time, so the peak is the states, the buffers,
and the larger of `step` and `gathered + working`. Offloading moves the optimizer's states, gradients and, if asked for, the
weights to host memory. What is not counted: the allocator's fragments, and what CUDA and NCCL keep for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ksl_ds.sharding.eight_bits import GROUP
from ksl_ds.sharding.rounding import rounds_frozen

ROUNDED_BYTES = 1 + 4 / GROUP  # of an element in 8 bits, with its share of a scale
MOST_RANKS = 1 << 16
AUTO = 0
SIZES = {  # of `Zero`, and DeepSpeed's names for them
    "reduce_bucket_size": "reduce_bucket_size",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "sub_group_size": "sub_group_size",
}


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says about memory; sizes in elements, DeepSpeed's defaults."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    host_ranks: int = 1  # that share a copy of the weights (hpZ); AUTO: those of a host
    rounds_frozen: bool = False  # frozen weights in 8 bits, see sharding/rounding.py
    contiguous_gradients: bool = True

    @classmethod
    def of(cls, config: dict[str, Any]) -> Zero:
        """The settings of a DeepSpeed configuration."""
        section = config.get("zero_optimization", {})
        settings: dict[str, Any] = {
            "stage": section.get("stage", 0),
            "contiguous_gradients": section.get("contiguous_gradients", True),
        }
        for name in ("offload_optimizer", "offload_param"):
            settings[name] = section.get(name, {}).get("device", "none") != "none"
        copies = section.get("zero_hpz_partition_size", 1)
        settings["host_ranks"] = AUTO if copies == "auto" else max(1, copies)
        settings["rounds_frozen"] = rounds_frozen(config)
        for ours, theirs in SIZES.items():
            if theirs in section:
                settings[ours] = int(section[theirs])
        return cls(**settings)

    def on_hosts(self, ranks_of_host: int | None) -> Zero:
        """With the size of the host's copies of weights; as on one host, without copies, where nobody knows it."""
        return replace(self, host_ranks=ranks_of_host or 1) if self.host_ranks == AUTO else self


@dataclass(frozen=True)
class MethodCost:
    """What a method trains: elements of each trained and of each frozen parameter, and the dry run's peak."""

    name: str
    trained: Sequence[int]
    frozen: Sequence[int]
    working: int | None  # bytes of one micro-batch; None where no dry run tells
    snapshots: bool = False  # whether the embedding before tuning is kept
    gathered_again: int = 0  # elements of frozen weights that checkpointing gathers a third time, see `wire, step`
    unknown: str = ""  # why `working` is None


@dataclass(frozen=True)
class ModelDims:
    """The rest of what the arithmetic needs."""

    weight_bytes: int  # of one element: 2 or 4
    vocab_size: int
    width: int
    reserved: int = 0  # bytes of a GPU that are nobody's, for CUDA and NCCL


@dataclass(frozen=True)
class Needs:
    """Bytes of one rank. `device` is the peak on its GPU, without `working` where that is unknown."""

    weights: int
    gradients: int
    optimizer: int
    step: int
    buffers: int
    gathered: int
    working: int | None
    snapshot: int
    wire_step: int
    wire_between: int  # of wire_step: in collectives of all ranks
    wire_within: int  # of wire_step: in collectives of the ranks that share a copy (hpZ)
    wire_gradients: int  # of wire_between: reduced, not gathered
    wire_draw: int
    device: int
    host: int
    on_host: frozenset[str] = field(default_factory=frozenset)  # the kinds that are offloaded


def rank_needs(method: MethodCost, training: ModelDims, zero: Zero, ranks: int) -> Needs:
    """The needs of each of `ranks` ranks; see the file's docstring for the formulas."""
    b = training.weight_bytes
    sharded = zero.stage == 3
    everything = [*method.trained, *method.frozen]
    persistent = [numel for numel in everything if sharded and numel <= zero.persistence_threshold]
    trained_share = _share(method.trained, ranks if zero.stage >= 1 else 1)
    total = sum(everything)
    kept_whole = sum(persistent)
    weights = b * (_share(everything, ranks) + kept_whole if sharded else total)
    has_copies = sharded and 1 < zero.host_ranks < ranks
    if has_copies:
        weights += b * _share(everything, zero.host_ranks)
    rounded = _rounded(method, training, zero, ranks)
    spared = b - ROUNDED_BYTES  # by an element in 8 bits
    weights -= round(spared * (rounded / ranks + (rounded / zero.host_ranks if has_copies else 0)))
    gradients = b * (trained_share if zero.stage >= 2 else sum(method.trained))
    optimizer = 12 * trained_share
    stepped = (6 if b == 2 else 4) * min(trained_share, zero.sub_group_size)
    step = max(stepped, 8 * -(-max(method.trained) // ranks))
    buffers = b * zero.reduce_bucket_size if zero.contiguous_gradients and zero.stage >= 2 else 0
    passing = total - kept_whole
    stays = 0
    gathered = 0
    if sharded:
        stays = min(passing, zero.max_reuse_distance // 2)
        largest = max(everything)
        bucket = min(passing, zero.prefetch_bucket_size)
        live = max(stays, largest, zero.max_live_parameters if bucket else 0)
        gathered = b * (min(passing, live + bucket) + bucket)
    snapshot = 4 * -(-training.vocab_size // ranks) * training.width if method.snapshots else 0
    moved = (ranks - 1) / ranks
    trained = sum(method.trained)
    if sharded:
        wire_step = b * (2 * passing - stays + method.gathered_again + trained) + b * kept_whole
        rounded_share = rounded / passing if rounded else 0
        wire_step -= round(spared * ((2 * passing - stays) * rounded_share + method.gathered_again * bool(rounded)))
    else:
        wire_step = b * trained * (3 if zero.stage else 2)
    between = min(wire_step, b * (3 * trained + kept_whole)) if has_copies else wire_step
    wire_between = round(between * moved)
    wire_within = round((wire_step - between) * (zero.host_ranks - 1) / zero.host_ranks) if has_copies else 0
    wire_draw = 8 * training.vocab_size * moved + (4 * training.width if ranks > 1 and sharded else 0)

    on_host = set()
    if zero.offload_optimizer:
        on_host |= {"gradients", "optimizer", "step"}
    if zero.offload_param and sharded:
        on_host |= {"weights"}
    sizes = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "step": step}
    here = {name: 0 if name in on_host else size for name, size in sizes.items()}
    device = here["weights"] + here["gradients"] + here["optimizer"] + buffers
    device += max(here["step"], gathered + (method.working or 0))
    return Needs(
        **sizes,
        buffers=buffers,
        gathered=gathered,
        working=method.working,
        snapshot=snapshot,
        wire_step=wire_between + wire_within,
        wire_between=wire_between,
        wire_within=wire_within,
        wire_gradients=round(b * trained * moved),
        wire_draw=round(wire_draw),
        device=device,
        host=snapshot + sum(sizes[name] for name in on_host),
        on_host=frozenset(on_host),
    )


def fits(needs: Needs, training: ModelDims, memory: int) -> bool:
    """Whether a GPU of `memory` bytes holds a rank."""
    return needs.device + training.reserved <= memory


def min_ranks(method: MethodCost, training: ModelDims, zero: Zero, memory: int) -> int | None:
    """The smallest number of ranks of `memory` bytes that each hold their part; None where no number does."""

    def enough(ranks: int) -> bool:
        return fits(rank_needs(method, training, zero, ranks), training, memory)

    return first_true(enough, MOST_RANKS)


def first_true(holds: Callable[[int], bool], most: int) -> int | None:
    """The least number from 1 to `most` for which `holds`, which once true stays so; None without one."""
    if not holds(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _rounded(method: MethodCost, training: ModelDims, zero: Zero, ranks: int) -> int:
    """Elements of the weights in 8 bits: frozen, not the embedding, not small, and of whole groups on every rank."""
    if not zero.rounds_frozen or zero.stage < 3:
        return 0
    frozen = list(method.frozen)
    embedding = training.vocab_size * training.width
    if embedding not in method.trained and embedding in frozen:
        frozen.remove(embedding)
    return sum(numel for numel in frozen if numel > zero.persistence_threshold and numel % (GROUP * ranks) == 0)


def _share(numels: Sequence[int], ranks: int) -> int:
    return sum(-(-numel // ranks) for numel in numels)
