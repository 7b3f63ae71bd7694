"""What a part of the GPU check is, and what all parts share: sizes, devices, timing in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
Figures = dict[str, Any]  # what a part found: names with units, and numbers or short text


@dataclass(frozen=True)
class Context:
    """Where a part runs.

    Attributes
    ----------
    rehearse : bool
        Small sizes on the CPU, so that every line is executed where there is no GPU.
    scratch : Path
        A folder for files; parts of one group share it.
    """

    rehearse: bool
    scratch: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.rehearse else real


@dataclass(frozen=True)
class Part:
    """One check or one measurement.

    Attributes
    ----------
    name : str
    group : str
        Parts of a group share a process, which is started anew when one of them fails.
    seconds : int
        Its time limit.
    speed : bool
        Whether it measures; else it compares results.
    what : str
        What is checked, in one line.
    run : function
        Returns figures; raises where a result is wrong.
    """

    name: str
    group: str
    seconds: int
    speed: bool
    what: str
    run: Callable[[Context], Figures]


PARTS: dict[str, Part] = {}


class NotSupported(Exception):
    """This device cannot do what the part checks; no fault of ours."""


def part(group: str, *, seconds: int, speed: bool = False) -> Callable[[Callable[[Context], Figures]], Any]:
    """Registers a function as a part; its docstring's first line says what it checks."""

    def register(run: Callable[[Context], Figures]) -> Callable[[Context], Figures]:
        name = run.__name__
        PARTS[name] = Part(name, group, seconds, speed, (run.__doc__ or "").split("\n")[0].rstrip("."), run)
        return run

    return register


def load_parts() -> None:
    """Imports the modules that register parts; those that come last are left out where time is short."""
    from gpu_check import kernel, ranks, commands  # noqa: F401, I001


def times_in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side by round. Sides take turns, after a first round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))
