"""The ranks of a job: rank and world size, collectives, errors raised on all ranks.

Works without a launcher (one process is a job of one rank) and without torch.distributed being initialized, so that
other packages can call it anywhere. All collectives of ksl_ds that carry Python objects are here.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from ksl_ds.errors import LostRanks, MistakeOfThisRank, UserError

Item = TypeVar("Item")


def initialize(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Joins the job that deepspeed's launcher or torchrun started, or makes a job of this one process."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    _check_launch()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise MistakeOfThisRank(
                f"LOCAL_RANK={local}, but {socket.gethostname()} shows {torch.cuda.device_count()} GPUs; start no more "
                "ranks than that on it"
            )
        torch.cuda.set_device(local)
    # DeepSpeed would compile shared-memory collectives on CPU (a minute, a lock that a killed process leaves behind for all
    # later jobs, 69 MB of /dev/shm a rank). Only its tensor-parallel inference calls them: training and we use gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)


LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_ADVICE = (
    "start the ranks by deepspeed or torchrun, which set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or "
    "unset them all for a single process"
)


def _check_launch() -> None:
    """Raises MistakeOfThisRank unless the launcher's variables are all there and fit, or this is a job of one process."""
    given = {name: os.environ[name].strip() for name in LAUNCH_VARIABLES if os.environ.get(name, "").strip()}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if name in given and not re.fullmatch(r"[0-9]{1,9}", given[name]):
            raise MistakeOfThisRank(
                f"the environment variable {name} is {given[name]!r}, not a number; {LAUNCH_ADVICE}"
            )
    world = int(given.get("WORLD_SIZE", "1" if "RANK" not in given else "0"))
    if world == 1 and given.get("RANK", "0") == "0" and given.get("LOCAL_RANK", "0") == "0":
        if len(given) < len(LAUNCH_VARIABLES):  # one process, whatever a job controller has set of the rest
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
        return
    missing = [name for name in LAUNCH_VARIABLES if name not in given]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items())
        raise MistakeOfThisRank(f"the environment has {there} but no {' and no '.join(missing)}; {LAUNCH_ADVICE}")
    if not (int(given["RANK"]) < world and int(given["LOCAL_RANK"]) < world and 0 < int(given["MASTER_PORT"]) < 65536):
        there = ", ".join(f"{name}={value}" for name, value in given.items())
        raise MistakeOfThisRank(f"the environment has {there}, which do not fit together; {LAUNCH_ADVICE}")


# Error messages of gloo, NCCL and the rendezvous that indicate a lost peer.
LOST = re.compile(
    r"timed? ?out|connection (was )?(closed|reset|refused)|broken pipe|remote peer|nccl|network is unreachable|no route",
    re.I,
)


@contextmanager
def name_lost_ranks(timeout: timedelta) -> Iterator[None]:
    """Turns the errors that collectives raise when ranks are lost into LostRanks, with one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's exceptions derive from it
        reason = " ".join(str(error).split())
        if not LOST.search(reason):
            raise
        number = os.environ.get("RANK", "0")
        host = socket.gethostname()
        raise LostRanks(
            f"rank {number} on {host} lost the other ranks ({reason[:160]}); a rank or a host has died, or the network "
            f"between them. It waited {timeout.total_seconds() / 60:g} minutes at most (timeout_minutes)"
        ) from error


def shutdown() -> None:
    """Waits for the other ranks, then destroys the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's global rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_of_host() -> int:
    """Ranks on this host, as the launcher says (deepspeed: LOCAL_SIZE, torchrun: LOCAL_WORLD_SIZE); else all."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else world_size()


def is_rank0() -> bool:
    """True on the one rank that prints and writes: global rank 0, not the first of each host."""
    return rank() == 0


def is_local_rank0() -> bool:
    """True on one rank of each host: the one that fetches files to a disk that its neighbours share."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def barrier() -> None:
    """Waits until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # some containers forbid it; the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes this rank has held since `reset_peak_memory`: on its GPU, or resident in the process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux reports VmHWM for every process")


def progress(items: Iterable[Item], label: str, total: int | None = None, done: int = 0) -> tqdm[Item]:
    """A progress bar with the time left, on rank 0 only; `done` of the total were done before."""
    return _bar(label, items, total=total, initial=done, smoothing=0.05)


def byte_progress(label: str, total: int) -> tqdm[NoReturn]:
    """A progress bar of bytes with their rate, on rank 0 only, which its caller updates; not shown for what is quick."""
    return _bar(label, total=total, unit="B", unit_scale=True, delay=1)


def _bar(label: str, items: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    return tqdm(items, desc=label, disable=not is_rank0(), dynamic_ncols=True, file=sys.stderr, **settings)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the SIGTERM and SIGUSR1 that arrive in the block instead of ending the process.

    When the block ends without an exception, the first one is raised again and has its usual effect.
    """
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. For small Python objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduces in place over all ranks and returns the tensor."""
    if world_size() > 1 and tensor.numel():
        dist.all_reduce(tensor, op=op)
    return tensor


def raise_if_any_rank(message: str | None) -> None:
    """Raises a UserError on every rank when any rank passes a message: the first one by rank."""
    messages = [text for text in gather_objects(message) if text is not None]
    if messages:
        raise UserError(messages[0])


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises a UserError or OSError of any rank as a UserError on all ranks, so that none waits for one that has left.

    The block must not communicate: a rank that fails in it would leave the others waiting inside.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    raise_if_any_rank(message)


def run_on_rank0(make: Callable[[], Item]) -> Item:
    """The result of `make` on rank 0, on every rank; its UserError is raised on all. `make` must not communicate."""
    value: Any = None
    with raise_on_all_ranks():
        if is_rank0():
            value = make()
    return broadcast_from_rank0(value)
