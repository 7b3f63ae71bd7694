"""Writes model folders of what a run has trained: rank 0 writes piece by piece what all ranks gather.

No rank holds more than a block of an embedding, or of a whole model one parameter (of experts that the files store one by
one, one layer's); rank 0 converts and writes it in blocks. If rank 0 cannot write, every rank raises its sentence at once.

Legend: D coordinates of a row, K rows of a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ksl_ds import distributed
from ksl_ds.model.folder import FileGroup, ModelFolder
from ksl_ds.model.write_folder import Changes, Write, folder_writer, row_changes
from ksl_ds.sharding.geometry import Span, blocks_of
from ksl_ds.sharding.partition import full_numel, full_shape, gathered
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.run import RunContext


def save_embedding(run: RunContext, shard: RowShard, out: Path) -> None:
    """Writes the base model with the embedding as `shard` holds it: a whole model folder, untouched files linked.

    An earlier folder of that name is replaced once the new one is complete. Collective.
    """
    changes = row_changes(run.folder, run.recipe.model.embedding_scope, all_rows=True)
    with _writer_on_rank0(run, out, changes) as write:
        for rows in blocks_of(Span(0, shard.num_rows), shard.rows_of_a_block()):
            rows_KD = shard.read_rows(torch.arange(rows.start, rows.stop))
            with distributed.raise_on_all_ranks():
                if write:
                    for name in changes.rewritten:
                        write(name, rows.start * shard.row_length, rows_KD)


def save_model(run: RunContext, out: Path) -> None:
    """Writes the model as it stands, parameter by parameter.

    An earlier folder of that name is replaced once the new one is complete. Collective.
    """
    parameters = dict(run.model.named_parameters())
    groups = run.folder.file_groups(parameters)
    untied = run.folder.tied and not run.model.config.tie_word_embeddings
    names = {name: parameters[group.parameters[0]] for group in groups for name in group.stored}
    changes = Changes(
        rewritten=[name for name in names if name in run.folder.shard_of],
        added={
            name: (parameter.dtype, tuple(full_shape(parameter)))
            for name, parameter in names.items()
            if name not in run.folder.shard_of
        },
        config={"tie_word_embeddings": False} if untied else {},
    )
    size = sum(full_numel(parameter) * parameter.itemsize for parameter in parameters.values())
    with _writer_on_rank0(run, out, changes) as write, distributed.byte_progress(f"saving {out.name}", size) as bar:
        for number, group in enumerate(groups, start=1):
            members = [parameters[name] for name in group.parameters]
            with gathered(members), distributed.raise_on_all_ranks():
                if write:
                    _write_group(run.folder, group, dict(zip(group.parameters, members, strict=True)), write)
            bar.set_postfix_str(f"{number}/{len(groups)} tensors", refresh=False)
            bar.update(sum(full_numel(member) * member.itemsize for member in members))


def _write_group(folder: ModelFolder, group: FileGroup, parameters: dict[str, nn.Parameter], write: Write) -> None:
    """Writes gathered parameters; a function of its own, so that no reference outlives it to what was gathered."""
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    if group.is_fused:  # converted in host memory: a GPU may have no room for a layer's experts twice
        values = {name: tensor.cpu() for name, tensor in values.items()}
    tensors = folder.file_tensors(group, values)
    for name in sorted(tensors, key=lambda name: folder.shard_of.get(name, "")):
        write(name, 0, tensors[name])


@contextmanager
def _writer_on_rank0(run: RunContext, out: Path, changes: Changes) -> Iterator[Write | None]:
    """Yields on rank 0 what writes a folder, elsewhere None. What fails on rank 0 at either end is raised on all ranks."""
    with ExitStack() as stack:
        write = None
        with distributed.raise_on_all_ranks():
            if distributed.is_rank0():
                _remove_drafts(out)
                write = stack.enter_context(folder_writer(run.folder, out, changes, replace=True))
        yield write
        with distributed.raise_on_all_ranks():
            stack.close()


def _remove_drafts(out: Path) -> None:
    """Removes what processes that were killed while they wrote a folder have left beside it."""
    for kind in ("draft", "old") if out.exists() else ("draft",):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)
