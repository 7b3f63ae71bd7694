"""Checkpoints during training: atomic, verified on loading, without pickles.

A checkpoint is a folder `step-00000120` with `state.json` (step, draws so far), one `rank-*.safetensors` per rank (random
number generators), the training state (states.py), and `manifest.json` with the size and SHA-256 of each file. It is
written under a temporary name and renamed when all ranks have finished and the manifest is on disk. Frozen weights are not
in it; they come from the base model.

Choices and what they cost: every rank hashes what it wrote, which reads the file again from the page cache; all ranks need a
shared file system. The data order is a function of seed and step, so no position within an epoch is saved.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.files import Count, Record, checked, file_sha256, read_json, sync, write_text

logger = logging.getLogger(__name__)

STATE, MANIFEST = "state.json", "manifest.json"


class TrainingState(Protocol):
    """What trains: see states.py. `load` is collective, the others do not communicate."""

    def bytes_of_rank(self) -> int:
        """About how many bytes this rank will write."""

    def save(self, folder: Path) -> list[Path]:
        """Writes to `folder` and returns this rank's files. Raises OSError."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Raises UserError on every rank if it does not fit."""


class _State(Record):
    """state.json."""

    step: Count
    world_size: Count
    outcome: dict[str, Any]
    monitor: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training run, in a folder on a shared file system.

    Parameters
    ----------
    folder
        Is created by the first save.
    keep_last
        Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder = Path(folder)
        self._keep_last = keep_last

    def save(self, step: int, training: TrainingState, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step` and deletes those beyond `keep_last`. Collective.

        Parameters
        ----------
        step
            Optimizer steps done.
        training
            Weights, moments, schedule.
        state
            More to save, as JSON.

        Raises
        ------
        UserError
            On every rank, if it cannot be written; earlier checkpoints are kept.
        """
        draft = self.folder / f".draft-{step:08d}"
        failure = None
        self._on_rank0(step, lambda: self._make_draft(draft))
        self._check_space(step, training)
        digests: dict[str, Any] = {}
        try:
            written = training.save(draft)
            written.append(draft / f"rank-{distributed.rank():05d}.safetensors")
            safetensors.torch.save_file(_generators(), written[-1])
            for path in written:
                digests[str(path.relative_to(draft))] = [path.stat().st_size, file_sha256(path)]
                sync(path)
        except (OSError, SafetensorError) as error:
            failure = self._cannot(step, error)
        distributed.raise_if_any_rank(failure)
        digests_of_ranks = distributed.gather_objects(digests)
        state = {**state, "step": step, "world_size": distributed.world_size()}
        self._on_rank0(step, lambda: self._publish(draft, step, state, digests_of_ranks))

    def load(self, training: TrainingState) -> dict[str, Any] | None:
        """Loads the newest valid checkpoint into `training` and returns its state; None if there is none. Collective.

        Damaged checkpoints are skipped with a warning.

        Raises
        ------
        UserError
            On every rank, if it is of another training run.
        """
        for folder in distributed.broadcast_from_rank0(self._newest_first()):
            damage = self._damage(folder)
            if damage is not None:
                logger.warning(f"checkpoint {folder} is damaged ({damage}); trying the previous one")
                continue
            state = read_json(folder / STATE)
            training.load(folder)
            if state["world_size"] == distributed.world_size():
                _set_generators(safetensors.torch.load_file(folder / f"rank-{distributed.rank():05d}.safetensors"))
            return state
        return None

    def remove(self) -> None:
        """Deletes all checkpoints, after the stage's result is saved. Collective."""
        if distributed.is_rank0():
            shutil.rmtree(self.folder, ignore_errors=True)
        distributed.barrier()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _on_rank0(self, step: int, work: Callable[[], None]) -> None:
        """Calls `work` on rank 0; its OSError becomes a UserError on all ranks that names the step."""

        def guarded() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(self._cannot(step, error)) from None

        distributed.run_on_rank0(guarded)

    def _make_draft(self, draft: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".draft-*"):
            shutil.rmtree(leftover)
        draft.mkdir()

    def _check_space(self, step: int, training: TrainingState) -> None:
        """Raises UserError on every rank if the disk is too full, before anything is written."""
        needed = sum(distributed.gather_objects(training.bytes_of_rank()))
        with distributed.raise_on_all_ranks():
            if not self.folder.is_dir():
                raise UserError(f"{self.folder} does not exist on every host; run_dir must be on a shared file system")
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise UserError(
                    f"{self._cannot(step)}: it needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
                )

    def _publish(self, draft: Path, step: int, state: dict[str, Any], digests_of_ranks: list[dict[str, Any]]) -> None:
        state_file = draft / STATE
        write_text(state_file, json.dumps(state) + "\n")
        digests: dict[str, Any] = {STATE: [state_file.stat().st_size, file_sha256(state_file)]}
        for digests_of_rank in digests_of_ranks:
            digests |= digests_of_rank
        write_text(draft / MANIFEST, json.dumps(digests, indent=1) + "\n")
        final = self.folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of this step
        sync(draft)
        os.rename(draft, final)
        sync(self.folder)
        for old in self._newest_first()[self._keep_last :]:
            shutil.rmtree(old)

    def _cannot(self, step: int, error: Exception | None = None) -> str:
        reason = f" ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})" if error else ""
        kept = self._newest_first()
        last = (
            f"the last one, {kept[0]}, is complete: free disk space and resume with resume=auto"
            if kept
            else "there is no earlier one"
        )
        return f"the checkpoint of step {step} cannot be written to {self.folder}{reason}; {last}"

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; the files are divided over the ranks."""
        found = None
        try:
            digests = read_json(folder / MANIFEST)
            for name in sorted(digests)[distributed.rank() :: distributed.world_size()]:
                size, digest = digests[name]
                if (folder / name).stat().st_size != size:
                    found = f"{name} is truncated"
                elif file_sha256(folder / name) != digest:
                    found = f"{name} was changed"
            if found is None:
                state = checked(read_json(folder / STATE), _State, STATE)
                ranks = sum(name.startswith("rank-") for name in digests)
                if STATE not in digests or ranks != state["world_size"]:
                    found = f"{MANIFEST} does not list {STATE} and a file for each of {state['world_size']} ranks"
        except OSError as error:
            found = f"{Path(error.filename or folder).name}: {error.strerror}"
        except UserError as error:
            found = str(error)
        except (ValueError, TypeError, AttributeError):
            found = f"{MANIFEST} is not a manifest"
        return next(filter(None, distributed.gather_objects(found)), None)


def _generators() -> dict[str, torch.Tensor]:
    """The states of the random number generators that dropout uses."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
