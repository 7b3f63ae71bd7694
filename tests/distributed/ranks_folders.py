"""Run by test_folders.py on several ranks, under ZeRO-3 and 2: model folders are loaded, trained and saved."""

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import run_cases
from helpers.runs import losses
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.model.folder import open_model
from ksl_ds.model.load import load_model
from ksl_ds.model.safetensors_io import Shards, ShardWriter
from ksl_ds.sharding.engine import deepspeed_config
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.run import open_run
from ksl_ds.training.saving import save_embedding, save_model

COMMON = ["text.max_test_pairs=2", "evaluation.max_new_tokens=2", "text.valid=[]"]


def experts() -> None:
    """Fused experts, fully tuned, are written as they were."""
    if distributed.is_rank0():
        make_model_folder(Path("mixtral"), "mixtral", num_local_experts=4, num_experts_per_tok=2)
    distributed.barrier()
    full = ["method=full", "full_tuning.max_steps=2", "full_tuning.learning_rate=0.01", "model.path=mixtral"]
    tune.main(load_recipe(Recipe, "recipe.yaml", [*COMMON, *full, "run_dir=experts", "deepspeed=zero3.json"]))
    if distributed.is_rank0():
        model, info = AutoModelForCausalLM.from_pretrained("experts/checkpoints/full_tuning", output_loading_info=True)
        assert not any(info.values()), info
        before = AutoModelForCausalLM.from_pretrained("mixtral").state_dict()
        experts = [name for name in before if "experts" in name]
        assert experts and all(not torch.equal(model.state_dict()[name], before[name]) for name in experts)


def untied_head() -> None:
    """A head of its own despite a configuration that ties it, under ZeRO-3 and 2."""
    if distributed.is_rank0():
        make_model_folder(Path("two"), tied=True)
        stored = load_file("two/model.safetensors")
        stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])
        save_file(stored, "two/model.safetensors", metadata={"format": "pt"})
    distributed.barrier()
    losses_of = {}
    for stage in ("zero2", "zero3"):
        words = ["method=embed", "embed_tuning.max_steps=2", "model.path=two", "model.embedding_scope=input"]
        words += [*COMMON, f"deepspeed={stage}.json"]
        with open_run(load_recipe(Recipe, "recipe.yaml", [*words, f"run_dir=opened-{stage}"])) as run:
            head = run.model.get_output_embeddings().weight
            assert head is not run.model.get_input_embeddings().weight
            save_model(run, Path("saved", stage))
        tune.main(load_recipe(Recipe, "recipe.yaml", [*words, f"run_dir={stage}"]))
        losses_of[stage] = torch.tensor(losses(Path(stage), "embed_tuning"))
        written = load_file(Path("saved", stage, "model.safetensors"))
        stored = load_file("two/model.safetensors")
        assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)
    assert len(losses_of["zero2"]) and torch.allclose(losses_of["zero2"], losses_of["zero3"], atol=1e-4), losses_of


def loaded(*words: str) -> SimpleNamespace:
    """As much of a run as saving needs."""
    recipe = load_recipe(Recipe, "recipe.yaml", [*words])
    folder = open_model(recipe.model.path)
    return SimpleNamespace(recipe=recipe, folder=folder, model=load_model(recipe, folder, deepspeed_config(recipe)))


def anonymous_memory() -> int:
    """Bytes of this process that no file backs, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


write = ShardWriter.write


def memory() -> None:
    """While 109 MB are saved, rank 0 grows by one shard of 40 MB and one tensor of 17 MB at most."""
    if distributed.is_rank0():
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 16384}
        make_model_folder(Path("large"), **sizes, max_shard_size="40MB")
    distributed.barrier()
    run = loaded("model.path=large")
    held = []

    def watched(*values) -> None:
        held.append(anonymous_memory())
        write(*values)

    largest = 16384 * 256 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", watched)
        for save in (save_model, lambda *where: save_embedding(where[0], RowShard(run.model.lm_head.weight), where[1])):
            before = anonymous_memory()
            save(run, Path("saved", "large"))
            assert not held or max(held) - before < 40e6 + largest, (before, held)
            distributed.barrier()
            written = open_model("saved/large")
            assert len(set(written.shard_of.values())) > 2
            for name in run.folder.tensor_names:
                stored, saved = (torch.cat(list(folder.blocks(name))) for folder in (run.folder, written))
                if save is not save_model and name == run.folder.embedding_name:
                    stored = torch.cat(list(run.folder.blocks("lm_head.weight")))
                assert torch.equal(stored, saved), name
            distributed.barrier()
    assert len(held) > 100 or not distributed.is_rank0()


def full_disk() -> None:
    """No room on rank 0 in the midst: one sentence on every rank, the earlier folder stays, and the next try goes well."""
    run = loaded("model.embedding_scope=shared")
    weight = run.model.get_input_embeddings().weight
    out = Path("saved", "full")
    calls = []

    def runs_out(*values) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowShard, "rows_of_a_block", lambda shard: 20)
        for save in (lambda: save_model(run, out), lambda: save_embedding(run, RowShard(weight), out)):
            calls.clear()
            save()
            before = load_file(out / "model.safetensors")
            distributed.barrier()
            shard = RowShard(weight)
            shard.write(shard.read() + 1)
            patch.setattr(ShardWriter, "write", runs_out)
            with pytest.raises(UserError, match="full could not be written: No space left on device$"):
                save()
            distributed.barrier()
            assert len(calls) == (3 if distributed.is_rank0() else 0)
            assert [path.name for path in Path("saved").glob("*full*")] == ["full"]
            left = load_file(out / "model.safetensors")
            assert all(torch.equal(left[name], before[name]) for name in before)
            distributed.barrier()
            patch.setattr(ShardWriter, "write", write)
            save()
            distributed.barrier()
            changed = load_file(out / "model.safetensors")
            assert [name for name in before if not torch.equal(changed[name], before[name])] == [
                "model.embed_tokens.weight"
            ]
            distributed.barrier()


def reading() -> None:
    """All ranks together read every element once, each rank its part; transformers gets only what it fuses."""
    if distributed.is_rank0():
        make_model_folder(Path("moe"), "mixtral", num_local_experts=4, num_experts_per_tok=2)
    distributed.barrier()
    read_flat = Shards.read_flat
    load_whole = modeling_utils._load_state_dict_into_zero3_model
    spans: list[tuple[str, int, int]] = []
    given: list[str] = []

    def reads(folder: Shards, name: str, start: int, stop: int) -> torch.Tensor:
        spans.append((name, start, stop))
        return read_flat(folder, name, start, stop)

    def loads(model, state_dict, load_config):
        given.extend(state_dict)
        return load_whole(model, state_dict, load_config)

    for path in ("model", "moe"):
        spans.clear()
        given.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shards, "read_flat", reads)
            patch.setattr(modeling_utils, "_load_state_dict_into_zero3_model", loads)
            run = loaded(f"model.path={path}", "deepspeed=ds.json")
        fused = [name for name in run.folder.tensor_names if ".experts." in name]
        assert sorted(given) == fused and bool(fused) == (path == "moe")
        everything = sorted(span for of_rank in distributed.gather_objects(spans) for span in of_rank)
        for name in set(run.folder.tensor_names) - set(fused):
            position = 0
            for _, start, stop in (span for span in everything if span[0] == name):
                assert start == position, (name, everything)
                position = stop
            assert position == torch.Size(run.folder.shape(name)).numel(), name
        assert {name for name, _, _ in everything} == set(run.folder.tensor_names) - set(fused)


def damaged() -> None:
    """NaN in one rank's part of a file, and a library that changes a weight after it was read, end on every rank."""
    name = "model.layers.1.mlp.up_proj.weight"
    if distributed.is_rank0():
        make_model_folder(Path("nan"))
        stored = load_file("nan/model.safetensors")
        stored[name][-1, -1] = torch.nan
        save_file(stored, "nan/model.safetensors", metadata={"format": "pt"})
    distributed.barrier()
    with pytest.raises(UserError, match=f"^nan: {name} contains NaN in the files; give a model without NaN$"):
        loaded("model.path=nan", "deepspeed=ds.json")
    finish = PreTrainedModel._finalize_model_loading

    def changes(model, *others):
        if distributed.rank() == 1:
            model.get_parameter(name).ds_tensor.data[0] += 1e-3
        return finish(model, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(changes))
        with pytest.raises(UserError, match=f"{name} differs from the checkpoint after loading"):
            loaded("deepspeed=ds.json")


CASES = {
    "reading": reading,
    "damaged": damaged,
    "fused experts": experts,
    "untied head": untied_head,
    "memory": memory,
    "full disk": full_disk,
}
if __name__ == "__main__":
    run_cases(CASES)
