"""The state of a training run in a checkpoint, for a bit-identical resume: trained weights, moments, schedule, loss scale.

`EngineState` is DeepSpeed's own checkpoint without frozen weights, for every method; it needs the same number of ranks.
`MatrixState` is for one small matrix that trains alone, a ticket's rows: three whole (K, D) matrices, kilobytes, which any
number of ranks can load.
DeepSpeed's files are pickles. torch's restricted unpickler reads them: it allows tensors, plain values and the three classes
below, and runs no code.

Legend: K rows, D elements of a row; `flat` is this rank's part of the flattened matrix.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from torch import Tensor, nn

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.sharding.partition import is_partitioned
from ksl_ds.sharding.rows import RowShard

ENGINE_FOLDER, MATRIX_FILE = "deepspeed", "rows.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Reads an engine's files without running pickled code, and writes them without leaving other ranks in a barrier.

    A write error is kept in `failure` until all ranks have written.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.failure: OSError | None = None
        self.written: list[Path] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file. Keeps an OSError in `failure` instead of raising it."""
        try:
            super().save(_without_enums(state_dict), path)
            self.written.append(Path(path))
        except OSError as error:
            self.failure = error
        except RuntimeError as error:  # what torch makes of a full disk
            self.failure = OSError(str(error))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file by torch's restricted unpickler."""
        with torch.serialization.safe_globals(_deepspeed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _deepspeed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, fragment_address]


def _without_enums(value: Any) -> Any:
    """`value` with the enums in its dicts replaced by their values: Python 3.11.0 to 3.11.3 pickle them as getattr calls."""
    if isinstance(value, Enum):
        return value.value
    return {name: _without_enums(item) for name, item in value.items()} if type(value) is dict else value


def _refuse_code(folder: Path) -> None:
    """Raises UserError on every rank if a pickle in `folder` would run code; the files are divided over the ranks."""
    allowed = {f"{known.__module__}.{known.__qualname__}" for known in _deepspeed_classes()}
    message = None
    for path in sorted(folder.rglob("*.pt"))[distributed.rank() :: distributed.world_size()]:
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed
        except ValueError:  # a bare pickle
            named = {"unknown code"}
        if named:
            message = f"{path} was not written by ksl_ds: loading it would run {min(named)}; delete {folder}"
    distributed.raise_if_any_rank(message)


class EngineState:
    """The state of a DeepSpeed engine in DeepSpeed's own format: one or two files per rank."""

    any_world_size = False

    def __init__(self, engine: Any):
        self._engine = engine

    def bytes_of_rank(self) -> int:
        """About how many bytes this rank will write."""
        moments = sum(moment.nbytes for moment in optimizer_tensors(self._engine))
        weights = 0
        if distributed.is_rank0():  # only rank 0 writes unpartitioned weights
            trained = [weight for weight in self._engine.module.parameters() if weight.requires_grad]
            weights = sum(weight.nbytes for weight in trained if not is_partitioned(weight))
        return moments * 3 // 2 + weights + (1 << 20)  # two moments, and the masters

    def save(self, folder: Path) -> list[Path]:
        """Raises OSError on the ranks that could not write; all ranks return from DeepSpeed first."""
        writer = SafeCheckpointEngine(self._engine._config)
        self._engine.checkpoint_engine = writer
        # DeepSpeed copies a script from rank 0 without the writer: useless here, and a failure would hang the other ranks.
        self._engine._copy_recovery_script = lambda folder: None
        self._engine.save_checkpoint(str(folder), tag=ENGINE_FOLDER, exclude_frozen_parameters=True, save_latest=False)
        if writer.failure is not None:
            raise writer.failure
        return writer.written

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Raises UserError on every rank for a file that would run code."""
        _refuse_code(folder)
        self._engine.checkpoint_engine = SafeCheckpointEngine(self._engine._config)
        # Not strict: the frozen weights are not there.
        self._engine.load_checkpoint(str(folder), tag=ENGINE_FOLDER, load_module_strict=False)


class MatrixState:
    """The state of AdamW on one small matrix, gathered from any ZeRO stage.

    Parameters
    ----------
    engine
        A DeepSpeed engine that trains nothing else.
    matrix
        The (K, D) parameter.
    label
        int64 (K,): the token ids of its rows. A checkpoint of other rows is refused.
    """

    any_world_size = True

    def __init__(self, engine: Any, matrix: nn.Parameter, label: Tensor):
        self._engine = engine
        self._matrix = matrix
        self._label = label.cpu()
        self._shard = RowShard(matrix)
        self._shape = (self._shard.num_rows, self._shard.row_length)

    def bytes_of_rank(self) -> int:
        """About how many bytes this rank will write."""
        return 3 * 4 * self._shape[0] * self._shape[1] + (1 << 20) if distributed.is_rank0() else 0

    def save(self, folder: Path) -> list[Path]:
        """Writes the matrix, its moments and the schedule, on rank 0. Collective."""
        scheduler = self._engine.lr_scheduler.state_dict()
        numbers = {
            "scheduler_epoch": scheduler["last_epoch"],
            "learning_rate": scheduler["_last_lr"][0],
            "steps": float(_states(self._engine)[self._stepped()]["step"]),
            **{f"loss_scaler.{name}": value for name, value in _numbers(self._loss_scaler()).items()},
        }
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        tensors |= {"label": self._label, "values": self._shard.read_rows(torch.arange(self._shape[0]))}
        for name in MOMENTS:
            tensors[name] = self._whole(_states(self._engine)[self._stepped()][name])
        if not distributed.is_rank0():
            return []
        safetensors.torch.save_file(tensors, folder / MATRIX_FILE)
        return [folder / MATRIX_FILE]

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Raises UserError on every rank for a checkpoint of other rows."""
        with distributed.raise_on_all_ranks():
            try:
                tensors = safetensors.torch.load_file(folder / MATRIX_FILE)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / MATRIX_FILE} cannot be read: {error}") from None
            if not torch.equal(tensors["label"], self._label) or tuple(tensors["values"].shape) != self._shape:
                raise UserError(f"{folder} is a checkpoint of another ticket's rows; choose another run_dir")
        self._shard.write_rows(torch.arange(self._shape[0]), tensors["values"])
        stepped = self._stepped()
        moments = {name: torch.zeros_like(stepped) for name in MOMENTS}
        held = self._shard.held()
        for name, moment in moments.items():
            moment.view(-1)[: held.size].copy_(tensors[name].flatten()[held.start : held.stop])
        steps = tensors["steps"].float().to(stepped.device)
        _states(self._engine)[stepped] = {"step": steps, **moments}
        learning_rate = float(tensors["learning_rate"])
        self._engine.lr_scheduler.load_state_dict(
            {
                **self._engine.lr_scheduler.state_dict(),
                "last_epoch": int(tensors["scheduler_epoch"]),
                "_last_lr": [learning_rate],
            }
        )
        for group in _inner(self._engine).param_groups:
            group["lr"] = learning_rate
        scaler = self._loss_scaler()
        for name, value in _numbers(scaler).items():
            setattr(scaler, name, type(value)(tensors[f"loss_scaler.{name}"]))

    def _stepped(self) -> nn.Parameter | Tensor:
        """The fp32 tensor that the optimizer steps on this rank: flat under ZeRO, perhaps padded."""
        if hasattr(self._engine.optimizer, "fp32_partitioned_groups_flat"):  # stage 3 lends it to the step only
            return self._engine.optimizer.fp32_partitioned_groups_flat[0]
        return _inner(self._engine).param_groups[0]["params"][0]

    def _whole(self, moment: Tensor) -> Tensor:
        """Gathers a moment on every rank, float32 (K, D) on the CPU."""
        held = self._shard.held()
        whole_KD = torch.zeros(self._shape, dtype=torch.float32, device=distributed.device())
        if distributed.is_rank0() or self._engine.zero_optimization_stage() > 0:  # without ZeRO every rank has all
            whole_KD.view(-1)[held.start : held.stop] = moment.view(-1)[: held.size]
        # Summed as integers, all but one of them 0: the sum of floats would turn -0.0 into 0.0.
        return distributed.all_reduce(whole_KD.view(torch.int32)).view(torch.float32).cpu()

    def _loss_scaler(self) -> Any:
        return getattr(self._engine.optimizer, "loss_scaler", None)


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


def _numbers(scaler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scaler).items() if isinstance(value, (int, float))} if scaler else {}
