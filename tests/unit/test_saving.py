"""Whole models and embeddings are written piece by piece: no more than one piece at a time, and nothing lost if one fails."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import small_disk
from helpers.tiny import make_model_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ksl_ds.errors import UserError
from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.safetensors_io import ShardWriter
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training import saving

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def moved_run(folder: ModelFolder, scope: str = "input") -> SimpleNamespace:
    """A run whose model has moved away from its folder."""
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return SimpleNamespace(
        folder=folder, model=model, recipe=SimpleNamespace(model=SimpleNamespace(embedding_scope=scope))
    )


def save_embedding(run: SimpleNamespace, out: Path) -> None:
    saving.save_embedding(run, RowShard(run.model.get_input_embeddings().weight), out)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("architecture", "sizes"), [("llama", {}), ("mixtral", MIXTRAL)])
def test_one_group_is_gathered_at_a_time_and_each_file_is_opened_once(tmp_path, monkeypatch, architecture, sizes):
    """Of a mixture of experts, one layer's matrices that are stored together."""
    base = ModelFolder(make_model_folder(tmp_path / "base", architecture, max_shard_size="20KB", **sizes))
    run = moved_run(base)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups, inside, opened = [], [], []

    @contextmanager
    def gathered(parameters):
        groups.append([names[id(parameter)] for parameter in parameters])
        inside.append(True)
        yield
        inside.pop()

    open_shard, write = ShardWriter._open, ShardWriter.write

    def opening(writer, shard):
        if shard != writer._open_shard:
            opened.append(shard)
        return open_shard(writer, shard)

    def writing(writer, name, start, values):
        assert inside == [True]
        write(writer, name, start, values)

    monkeypatch.setattr(saving, "gathered", gathered)
    monkeypatch.setattr(ShardWriter, "_open", opening)
    monkeypatch.setattr(ShardWriter, "write", writing)
    saving.save_model(run, tmp_path / "out")
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(len(group) == 1 for group in groups)
    assert len(set(opened)) > 3
    if architecture == "llama":
        assert len(opened) == len(set(opened))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(written[name], value) for name, value in run.model.state_dict().items())


def test_blocks_make_the_matrix(tmp_path, monkeypatch):
    """However many rows travel at once, and whatever the dtype of the file."""
    base = ModelFolder(make_model_folder(tmp_path / "base", tied=True, dtype=torch.bfloat16, max_shard_size="20KB"))
    run = moved_run(base)
    for rows in (134, 60, 7):
        monkeypatch.setattr(RowShard, "rows_of_a_block", lambda shard, rows=rows: rows)
        save_embedding(run, tmp_path / f"out-{rows}")
        assert contents(tmp_path / f"out-{rows}") == contents(tmp_path / "out-134")
    written = load_file(tmp_path / "out-7" / ModelFolder(tmp_path / "out-7").shard_of["model.embed_tokens.weight"])
    assert torch.equal(written["model.embed_tokens.weight"], run.model.get_input_embeddings().weight.bfloat16())


@pytest.mark.parametrize("save", [saving.save_model, save_embedding])
def test_a_full_disk(tmp_path, save):
    """With room for one folder and a part of the next the first one stays to the byte; with more it is replaced."""
    base = ModelFolder(make_model_folder(tmp_path / "base"))
    first, second = moved_run(base), moved_run(base)
    for pages in (30, 36, 44, 120):
        with small_disk(tmp_path / f"disk-{save.__name__}-{pages}", f"{4 * pages}k") as disk:
            out = disk / "out"
            save(first, out)
            before = contents(out)
            (disk / ".out.draft-1").mkdir()  # of a process that was killed
            if pages == 120:
                save(second, out)
                assert contents(out) != before and contents(out).keys() == before.keys()
            else:
                with pytest.raises(UserError, match="out could not be written: No space left on device$"):
                    save(second, out)
                assert contents(out) == before
            assert [path.name for path in disk.iterdir()] == ["out"]
