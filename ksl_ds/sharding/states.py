"""The state of a training run in a checkpoint, for a bit-identical resume: trained weights, moments, schedule, loss scale.

ZeRO cuts these differently for every stage and number of ranks. So each rank writes what it holds as pieces whose names say
where they belong, `KIND/START/PARAMETER` with KIND one of values, exp_avg, exp_avg_sq, step, and each rank of a later run
reads the pieces that it needs from all files: any number of ranks can load a checkpoint.

Choices and what they cost: own safetensors files instead of DeepSpeed's, which are pickles and need the same number of ranks
(its universal checkpoints are made of them by another program). A rank copies about 3 GB to host memory at a time. All ranks
need a shared file system.

Legend: `flat` is a part of a flattened parameter, a span the elements of the parameter that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.errors import UserError, reason_of
from ksl_ds.files import Count, Number, Record, read_json, record_of, write_text
from ksl_ds.sharding.geometry import Span, blocks_of, zero3_parts
from ksl_ds.sharding.masters import holder_of
from ksl_ds.sharding.partition import full_numel
from ksl_ds.sharding.rows import copies_of, cut, drop_gathered, is_stepped_by_zero, master_part, store

SCHEDULE_FILE = "schedule.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
ELEMENTS_OF_A_PIECE = 1 << 26
ELEMENTS_OF_A_FILE = 1 << 28


class _Schedule(Record):
    """schedule.json."""

    label: list[Count] | None
    last_epoch: Count
    last_lr: list[Number]
    loss_scale: dict[str, Number | bool]


class _Piece(NamedTuple):
    """A span of a parameter in a file; the file has the same span of its moments if the optimizer has stepped it."""

    file: str
    span: Span
    stepped: bool


@dataclass
class _Part:
    """What this rank's optimizer steps of one parameter."""

    flat: Tensor  # fp32 masters, or the weights if there are none: a view
    span: Span
    written: Span  # by this rank
    tensor: Tensor  # contains the part; a key of the optimizer's states
    offset: int  # of the part in it

    def moment(self, states: Any, name: str) -> Tensor:
        """The same part of one of AdamW's moments: a view."""
        return states[self.tensor][name].view(-1)[self.offset : self.offset + self.span.size]


class OptimizerState:
    """The trained parameters of a DeepSpeed engine, their AdamW moments, the schedule and the loss scale.

    Parameters
    ----------
    engine
        An engine of any ZeRO stage, with AdamW and a scheduler of torch.
    label
        Token ids of the rows that train, where names and shapes do not tell. A checkpoint of other rows is refused.
    """

    def __init__(self, engine: Any, label: list[int] | None = None):
        self._engine = engine
        self._label = label
        self._trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}

    def bytes_of_rank(self) -> int:
        """About how many bytes this rank will write."""
        return 3 * 4 * sum(part.written.size for part in self._parts().values()) + (1 << 20)

    def save(self, folder: Path) -> list[Path]:
        """Writes this rank's pieces, and on rank 0 the schedule. Returns the files; raises OSError. No communication."""
        states = _states(self._engine)
        written: list[Path] = []
        tensors: dict[str, Tensor] = {}
        pieces = [
            (name, part, span)
            for name, part in self._parts().items()
            for span in blocks_of(part.written, ELEMENTS_OF_A_PIECE)
        ]
        elements = 0
        for number, (name, part, span) in enumerate(pieces, start=1):
            sources = {"values": part.flat}
            if part.tensor in states:
                sources |= {moment: part.moment(states, moment) for moment in MOMENTS}
                tensors[f"step/{span.start}/{name}"] = states[part.tensor]["step"].to("cpu", copy=True)
            for kind, flat in sources.items():
                tensors[f"{kind}/{span.start}/{name}"] = cut(flat, part.span, span).to("cpu", copy=True)
            elements += span.size
            if elements >= ELEMENTS_OF_A_FILE or number == len(pieces):
                written.append(folder / f"state-{distributed.rank():05d}-{len(written):05d}.safetensors")
                safetensors.torch.save_file(tensors, written[-1])
                tensors = {}
                elements = 0
        if distributed.is_rank0():
            scheduler = self._engine.lr_scheduler.state_dict()
            content = {
                "label": self._label,
                "last_epoch": scheduler["last_epoch"],
                "last_lr": scheduler["_last_lr"],
                "loss_scale": _numbers(_loss_scale(self._engine)),
            }
            written.append(folder / SCHEDULE_FILE)
            write_text(written[-1], json.dumps(content) + "\n")
        return written

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote on any number of ranks. Collective.

        Raises
        ------
        UserError
            On every rank, if files cannot be read or hold the state of other parameters.
        """
        with distributed.raise_on_all_ranks(), _reading(folder):
            if not (folder / SCHEDULE_FILE).exists():
                raise UserError(
                    f"{folder} was written by an earlier version of ksl_ds; finish the run with it, or choose another run_dir"
                )
            schedule = record_of(read_json(folder / SCHEDULE_FILE), _Schedule, str(folder / SCHEDULE_FILE))
            found = list(_pieces(folder))
        pieces: dict[str, list[_Piece]] = {}
        for name, piece in (entry for of_rank in distributed.gather_objects(found) for entry in of_rank):
            pieces.setdefault(name, []).append(piece)
        with distributed.raise_on_all_ranks(), _reading(folder):
            if schedule.label != self._label:
                raise UserError(f"{folder} is a checkpoint of another ticket's rows; choose another run_dir")
            sizes = {name: sum(piece.span.size for piece in of_name) for name, of_name in pieces.items()}
            if sizes != {name: full_numel(weight) for name, weight in self._trained.items()}:
                raise UserError(f"{folder} is a checkpoint of other parameters; choose another run_dir")
            self._read(folder, pieces)
        for weight in self._trained.values():
            drop_gathered(weight)
        scheduler = self._engine.lr_scheduler
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": schedule.last_epoch, "_last_lr": schedule.last_lr}
        )
        for group, learning_rate in zip(_inner(self._engine).param_groups, schedule.last_lr, strict=True):
            group["lr"] = learning_rate
        for name, value in schedule.loss_scale.items():
            setattr(_loss_scale(self._engine), name, value)

    def _read(self, folder: Path, pieces: dict[str, list[_Piece]]) -> None:
        """Copies what this rank holds of every parameter and of its moments from the files."""
        states = _states(self._engine)
        parts = self._parts()
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for name, weight in self._trained.items():
                held = {"values": copies_of(weight)}
                part = parts.get(name)
                if part is not None and any(piece.stepped for piece in pieces[name]):
                    state = states[part.tensor]
                    for moment in MOMENTS:
                        state.setdefault(moment, torch.zeros_like(part.tensor, requires_grad=False))
                        held[moment] = [(part.moment(states, moment), part.span)]
                for file, span, stepped in pieces[name]:
                    wanted = {kind: span & _reach(copies) for kind, copies in held.items()}
                    if not any(needed.size for needed in wanted.values()):
                        continue
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                    for kind, copies in held.items():
                        first, last = wanted[kind]
                        stored = opened[file].get_slice(f"{kind}/{span.start}/{name}")
                        store(stored[first - span.start : last - span.start], wanted[kind], copies)
                    if part is not None and stepped:
                        step = opened[file].get_tensor(f"step/{span.start}/{name}")
                        states[part.tensor]["step"] = step.to(part.tensor.device)

    def _parts(self) -> dict[str, _Part]:
        """By name: what this rank's optimizer steps of the parameters, without those of which it steps nothing."""
        tensors = _stepped_tensors(self._engine)
        parts = {}
        for name, weight in self._trained.items():
            if getattr(weight, "_hp_mapping", weight) is None:  # stages 1 and 2: all of it is stepped by other ranks
                continue
            flat, start = master_part(weight)
            place = holder_of(flat, tensors)
            if place is None:
                continue
            span = Span(start, start + flat.numel())
            written = span
            if not is_stepped_by_zero(weight):  # every rank has all of it
                size = -(-span.size // distributed.world_size())
                written = zero3_parts(span.size, size, distributed.world_size())[distributed.rank()]
            parts[name] = _Part(flat, span, written, *place)
        return parts


def _pieces(folder: Path) -> Iterator[tuple[str, _Piece]]:
    """The pieces in the files, by parameter; the files are divided over the ranks."""
    for path in sorted(folder.glob("state-*.safetensors"))[distributed.rank() :: distributed.world_size()]:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for key in keys:
                kind, start, name = key.split("/", 2)
                if kind == "values":
                    (size,) = file.get_slice(key).get_shape()
                    yield name, _Piece(path.name, Span(int(start), int(start) + size), f"step/{start}/{name}" in keys)


def _reach(copies: list[tuple[Tensor, Span]]) -> Span:
    """The elements that any of the copies holds."""
    return Span(min(held.start for _, held in copies), max(held.stop for _, held in copies))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Makes a file that is not ours a UserError: its digest was right, so it was edited together with the manifest."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder} was not written by ksl_ds ({reason_of(error)}); delete it") from None


def _stepped_tensors(engine: Any) -> list[Tensor]:
    """The tensors that the optimizer steps on this rank, the keys of its states: flat under ZeRO, perhaps padded."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):  # stage 3 lends them to the step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in _inner(engine).param_groups for tensor in group["params"]]


def optimizer_tensors(engine: Any) -> list[Tensor]:
    """The optimizer's states on this rank: AdamW's two moments of what this rank steps."""
    return [
        value
        for state in _states(engine).values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]


def _inner(engine: Any) -> Any:
    """The torch optimizer within DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _states(engine: Any) -> Any:
    return _inner(engine).state


def _loss_scale(engine: Any) -> Any:
    """The object with fp16's loss scale, which stage 0 calls otherwise; None without one."""
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))


def _numbers(scale: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scale).items() if isinstance(value, (int, float))} if scale else {}
