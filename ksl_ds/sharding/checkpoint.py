"""Checkpoints within a training run: whole or absent, recognised when damaged, and never a pickle that could run code.

A checkpoint is a folder `step-00000120` with `state.json` (step, data position, draws so far), one `rank-*.safetensors` a rank
(random number generators), what the training itself needs (states.py), and `manifest.json` with size and SHA-256 of each
of these. It is written under another name, and renamed when all ranks are done and the manifest is on disk. Frozen weights
are not in it: they are the base model's.

Choices and what they cost: every rank hashes what it wrote, which reads the file once more, from the page cache; all
ranks must see one file system. The data order is a pure function of seed and step, so no position within an epoch is
kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
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
    """The part of a checkpoint that depends on how a training runs; see states.py. Methods are collective."""

    any_world_size: bool  # whether another number of ranks can load it

    def bytes_of_rank(self) -> int:
        """About how much this rank will write."""

    def save(self, folder: Path) -> list[Path]:
        """Writes into `folder` and returns what this rank wrote; raises OSError only after all communication."""

    def load(self, folder: Path) -> None:
        """Puts back what `save` wrote. Raises UserError on every rank where it does not fit."""


class _State(Record):
    """state.json."""

    step: Count
    world_size: Count
    outcome: dict[str, Any]
    monitor: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training run in a folder that all ranks see.

    Parameters
    ----------
    folder : is made when the first one is saved
    keep_last : how many to keep, the newest
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder = Path(folder)
        self._keep_last = keep_last

    def save(self, step: int, training: TrainingState, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, `state` being what JSON can hold, and removes those beyond `keep_last`.

        Raises
        ------
        UserError
            On every rank, where it cannot be written; the checkpoints there were stay.
        """
        draft = self.folder / f".draft-{step:08d}"
        failure = None
        self._on_main(step, lambda: self._make_room(draft))
        self._check_space(step, training)
        digests: dict[str, Any] = {}
        try:
            written = training.save(draft)  # first, since it is collective: whoever fails below leaves nobody waiting
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
        self._on_main(step, lambda: self._publish(draft, step, state, digests_of_ranks))

    def load(self, training: TrainingState) -> dict[str, Any] | None:
        """Puts the newest checkpoint that is whole into `training` and returns its state; None where there is none.

        Damaged ones are passed over, which rank 0 says in a line each.

        Raises
        ------
        UserError
            On every rank, where it was written by another number of ranks and cannot be dealt out anew.
        """
        for folder in distributed.broadcast_from_rank0(self._newest_first()):
            damage = self._damage(folder)
            if damage is not None:
                logger.warning(f"checkpoint {folder} is damaged ({damage}); the one before is taken")
                continue
            state = read_json(folder / STATE)
            check_ranks(folder, state["world_size"], training.any_world_size)
            training.load(folder)
            if state["world_size"] == distributed.world_size():
                _set_generators(safetensors.torch.load_file(folder / f"rank-{distributed.rank():05d}.safetensors"))
            return state
        return None

    def check_newest(self, any_world_size: bool) -> None:
        """Raises UserError where the newest checkpoint needs another number of ranks; damage is for `load` to find."""
        for folder in self._newest_first()[:1]:
            ranks = distributed.world_size()
            with suppress(OSError, ValueError, KeyError, TypeError):
                ranks = read_json(folder / STATE)["world_size"]
            check_ranks(folder, ranks, any_world_size)

    def remove(self) -> None:
        """Removes all of them: the training is over and what it left is saved elsewhere."""
        if distributed.is_rank0():
            shutil.rmtree(self.folder, ignore_errors=True)
        distributed.barrier()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _on_main(self, step: int, work: Callable[[], None]) -> None:
        """Works on rank 0; a failure is everybody's, with the step whose checkpoint is not there for it."""

        def guarded() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(self._cannot(step, error)) from None

        distributed.run_on_rank0(guarded)

    def _make_room(self, draft: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".draft-*"):
            shutil.rmtree(leftover)
        draft.mkdir()

    def _check_space(self, step: int, training: TrainingState) -> None:
        """So that in all but rare cases nobody runs out of disk in the midst of DeepSpeed's own saving."""
        needed = sum(distributed.gather_objects(training.bytes_of_rank()))
        with distributed.raise_on_all_ranks():
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.folder} is not there on every host: run_dir must be on a file system that all see"
                )
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise UserError(
                    f"{self._cannot(step)}: it needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free there"
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
            f"the last one, {kept[0]}, is whole: make room and go on with resume=auto"
            if kept
            else "there is no earlier one"
        )
        return f"the checkpoint of step {step} cannot be written to {self.folder}{reason}; {last}"

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; each hashes its share of the files."""
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
            found = f"{MANIFEST} is broken"
        return next(filter(None, distributed.gather_objects(found)), None)


def check_ranks(folder: Path, ranks: int, any_world_size: bool) -> None:
    """Raises UserError where a checkpoint that so many ranks wrote cannot be loaded by the ranks there are."""
    if ranks != distributed.world_size() and not any_world_size:
        raise UserError(
            f"checkpoint {folder} was written by {ranks} ranks, and DeepSpeed cannot deal it out to "
            f"{distributed.world_size()}; start {ranks} ranks (only partial_tuning.mode=rows can change their number)"
        )


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
