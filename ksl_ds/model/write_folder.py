"""Writes a model folder with other values for some tensors: all else is the base's, to the byte.

Values come piece by piece and in any order, so a writer never holds a whole tensor of its own. Shards without a changed
tensor are hard links to the base's. A folder is written under a temporary name, and takes its own when it is complete on
disk.

V tokens, D coordinates of an embedding row, K ticket rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.files import atomic_folder, reason
from ksl_ds.model.folder import SIDE_FOLDER, ModelFolder
from ksl_ds.model.safetensors_io import INDEX, SINGLE, ShardWriter, copy_shard, link_or_copy, new_shard

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Writes elements from a position on of a tensor, given by name and flattened, in the dtype of its file. Raises UserError.
Write = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Changes:
    """What a written folder has other than its base.

    Attributes
    ----------
    rewritten
        Names of tensors whose every element the caller writes.
    patched
        Names of tensors of which the caller writes some elements.
    added
        Dtype and shape of new tensors that the caller writes, by name.
    copied
        New tensors by name, and the base's tensor whose values they start with.
    config
        Keys of config.json to set, also in a nested text_config.
    """

    rewritten: Collection[str] = ()
    patched: Collection[str] = ()
    added: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def folder_writer(base: ModelFolder, out: Path, changes: Changes, *, replace: bool = False) -> Iterator[Write]:
    """Yields what writes values into a copy of `base`; at the end of the block the folder is complete and named `out`.

    Parameters
    ----------
    base
        The model folder to copy.
    out
        The folder to create.
    changes
        What the caller will write within the block.
    replace
        Whether an existing `out` is replaced, once the new one is complete.

    Raises
    ------
    UserError
        If `out` exists or cannot be written. Nothing is left of it then, and an older folder stays as it was.
    """
    out = Path(out)
    if not replace and (out.exists() or out.is_symlink()):
        raise UserError(f"{out} already exists; choose another folder for the model")
    new = {name: (base.dtype(old), base.shape(old)) for name, old in changes.copied.items()} | dict(changes.added)
    shards = sorted(set(base.shard_of.values()))
    total = len(shards) + len(new)
    numbered = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    new_names = numbered if new else shards
    new_name_of = dict(zip([*shards, *new], new_names, strict=True))
    shard_of = {name: new_name_of[shard] for name, shard in base.shard_of.items()}
    shard_of |= {name: new_name_of[name] for name in new}
    with _named(out), atomic_folder(out) as draft, ShardWriter(draft, shard_of) as files:
        for shard in shards:
            rewritten = {name for name in changes.rewritten if base.shard_of.get(name) == shard}
            target = draft / new_name_of[shard]
            if rewritten:
                copy_shard(base.path / shard, target, leave_out=rewritten)
            else:
                patched = any(base.shard_of.get(name) == shard for name in changes.patched)
                link_or_copy(base.path / shard, target, link=not patched)
        for name, (dtype, shape) in new.items():
            new_shard(draft / new_name_of[name], name, dtype, shape)
        for name, old in changes.copied.items():
            start = 0
            for block in base.blocks(old):
                files.write(name, start, block)
                start += block.numel()
        if new_names != [SINGLE]:
            _write_index(draft / INDEX, base, shard_of, new)
        untied = {"tie_word_embeddings": False} if base.config_ties and not base.tied else {}
        _copy_side_files(base.path, draft, untied | dict(changes.config))
        missing = {name: torch.Size(base.shape(name)).numel() for name in changes.rewritten if name not in new}
        missing |= {name: torch.Size(shape).numel() for name, (_, shape) in changes.added.items()}

        def write(name: str, start: int, values: Tensor) -> None:
            with _named(out):
                files.write(name, start, values)
            if name in missing:
                missing[name] -= values.numel()

        yield write
        assert not any(missing.values()), missing  # what was not written is zeros


@contextmanager
def _named(out: Path) -> Iterator[None]:
    """Turns errors of the file system into a sentence about the folder that is written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} could not be written: {reason(error)}") from None


def row_changes(base: ModelFolder, scope: str, *, all_rows: bool) -> Changes:
    """Where new rows of the embedding go: the names are `rewritten` if they are all rows, else `patched`.

    A tied base with scope "input" becomes an untied model whose head is the old embedding; with "shared" it stays tied.
    """
    names = [base.embedding_name]
    copied = {}
    config = {}
    if base.tied:
        in_model = [f"{module}.weight" for module in (base.embedding_module, base.head_module)]
        in_files = [base.stored_name(parameter) for parameter in in_model]
        if scope == "shared":
            names = [stored for stored in in_files if stored is not None]
        else:
            config = {"tie_word_embeddings": False}
            both = [stored or base.new_name(parameter) for stored, parameter in zip(in_files, in_model, strict=True)]
            names = both[:1]
            # The missing one becomes a copy of the other, in its own shard.
            copied = {lacking: base.embedding_name for lacking in both if lacking not in base.shard_of}
    if all_rows:
        return Changes(rewritten=names, copied=copied, config=config)
    return Changes(patched=names, copied=copied, config=config)


def write_model_with_rows(base: ModelFolder, out: Path, ids: list[int], rows_KD: Tensor, scope: str) -> None:
    """Writes `base` with the embedding rows `ids` replaced by `rows_KD`, cast to the dtype of the file.

    Parameters
    ----------
    base
        The model folder to copy.
    out
        The folder to create.
    ids
        K token ids.
    rows_KD
        Their new rows.
    scope
        The ticket's embedding_scope, "input" or "shared": see `row_changes`.

    Raises
    ------
    UserError
        If `out` exists or cannot be written.
    """
    width = base.shape(base.embedding_name)[1]
    changes = row_changes(base, scope, all_rows=False)
    with folder_writer(base, out, changes) as write:
        for name in changes.patched:
            for number, row_D in zip(ids, rows_KD, strict=True):
                write(name, number * width, row_D)


def _write_index(
    path: Path, base: ModelFolder, shard_of: dict[str, str], new: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    sizes = [(torch.Size(base.shape(name)).numel(), base.dtype(name)) for name in base.shard_of]
    sizes += [(torch.Size(shape).numel(), dtype) for dtype, shape in new.values()]
    metadata = {
        "total_parameters": sum(count for count, _ in sizes),
        "total_size": sum(count * dtype.itemsize for count, dtype in sizes),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(shard_of.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(source: Path, target: Path, config_updates: Mapping[str, Any]) -> None:
    """Copies config, tokenizer, generation config, model card and code: all but weights and hidden files."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
    if (source / SIDE_FOLDER).is_dir():
        shutil.copytree(source / SIDE_FOLDER, target / SIDE_FOLDER)
    if config_updates:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section.update(config_updates)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
