"""Run by test_hpz.py on four ranks, in groups of two: hierarchical partitioning gives plain ZeRO-3's numbers to the bit."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import run_cases
from helpers.runs import ZERO3, losses, prepare_job
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file

from ksl_ds import distributed
from ksl_ds.commands import certify, evaluate, lottery, tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import Interrupted, UserError
from ksl_ds.model.folder import open_model
from ksl_ds.model.load import differing_weight, load_model
from ksl_ds.model.methods import prepare_method
from ksl_ds.report.tracking import Tracker
from ksl_ds.sharding import engine
from ksl_ds.sharding.engine import deepspeed_config, gathered_weights
from ksl_ds.sharding.partition import host_part, is_rounded
from ksl_ds.sharding.rounding import round_frozen
from ksl_ds.sharding.rows import RowShard

PLAIN, HPZ = "ds.json", "hpz.json"
ROUNDED, ROUNDED_HPZ = "rounded.json", "rounded_hpz.json"
# Attention matrices divide into groups on 4 ranks, those of the MLP do not. Cards name their base, so names are as long.
WIDE, FLAT = "wider", "flat8"
SIZES = {"hidden_size": 64, "intermediate_size": 120}
MEASURED = ("seconds", "evaluation_seconds", "peak_memory_bytes", "optimizer_bytes")
SMALL = ["training.batch_size=8", "text.max_test_pairs=4", "evaluation.max_new_tokens=4"]
log = Tracker.log


def prepare(folder: Path) -> None:
    """The job's folder with a DeepSpeed JSON of hpZ."""
    prepare_job(folder)
    zero = {**ZERO3["zero_optimization"], "zero_hpz_partition_size": 2}
    make_model_folder(folder / WIDE, tied=True, **SIZES)
    rounded = {"zero_quantized_nontrainable_weights": True}
    for name, settings in {
        HPZ: zero,
        ROUNDED: {**ZERO3["zero_optimization"], **rounded},
        ROUNDED_HPZ: {**zero, **rounded},
    }.items():
        (folder / name).write_text(json.dumps({**ZERO3, "zero_optimization": settings}))


def recipe(*words: str) -> Recipe:
    return load_recipe(Recipe, "recipe.yaml", [*SMALL, *words])


def results(run_dir: str) -> dict[str, Any]:
    """What a run has found, without what depends on the clock and the memory."""
    stages = json.loads((Path(run_dir) / "results.json").read_text())["stages"]
    return {name: {key: value for key, value in stage.items() if key not in MEASURED} for name, stage in stages.items()}


def same(command: Any, case: str, *words: str) -> list[Path]:
    """Runs a command both ways; the numbers must be equal. Returns the run folders."""
    folders = [Path(f"{case} {name}") for name in (PLAIN, HPZ)]
    for name, folder in zip((PLAIN, HPZ), folders, strict=True):
        command.main(recipe(*words, f"deepspeed={name}", f"run_dir={folder}"))
        distributed.barrier()
    plain, hpz = map(results, map(str, folders))
    assert plain == hpz, (plain, hpz)
    for stage in plain:
        curves = [losses(folder, stage) for folder in folders]
        assert curves[0] == curves[1], (stage, curves)
    return folders


def whole_lottery() -> None:
    """All stages; then the ticket's scores with weights gathered layer by layer, and its certificate."""
    folders = same(lottery, "lottery")
    assert len(losses(folders[1], "partial_tuning")) == 6
    for pattern in ("ticket/adapter_model.safetensors", "checkpoints/embed_tuning/*.safetensors"):
        contents = [[path.read_bytes() for path in sorted(folder.glob(pattern))] for folder in folders]
        assert contents[0] == contents[1] != [], pattern
    tickets = [json.loads((folder / "ticket/ticket.json").read_text())["token_ids"] for folder in folders]
    assert tickets[0] == tickets[1] != []
    same(evaluate, "evaluate", f"ticket={folders[1]}/ticket", "evaluation.gather_weights=false")
    words = [f"reference={folders[1]}/checkpoints/embed_tuning", "text.train=[]", "text.valid=[]"]
    runs = same(certify, "certify", *words, "certify.alphas=[.5]")
    found = [json.loads((folder / "results.json").read_text())["certificate"] for folder in runs]
    assert found[0] == found[1]


def log_and_signal(tracker: Tracker, stage: str, step: int, **numbers: float) -> None:
    log(tracker, stage, step, **numbers)
    if step == 3 and distributed.is_rank0():
        signal.raise_signal(signal.SIGTERM)


def resumed() -> None:
    """A run that is stopped after four of six steps ends with the losses of one that was not."""
    words = ["method=embed", f"deepspeed={HPZ}"]
    tune.main(recipe(*words, "run_dir=whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Tracker, "log", log_and_signal)
        tune.main(recipe(*words, "run_dir=parts"))
    distributed.barrier()
    tune.main(recipe(*words, "run_dir=parts", "resume=auto"))
    assert losses(Path("parts"), "embed_tuning") == losses(Path("whole"), "embed_tuning")


def written_rows() -> None:
    """A frozen weight's host copy follows what RowShard writes, and the proof of the weights reads it."""
    wanted = recipe(f"deepspeed={HPZ}")
    config = deepspeed_config(wanted)
    folder = open_model("model")
    model = load_model(wanted, folder, config)
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    with gathered_weights(model):
        pass
    part = host_part(weight)
    assert part is not None and part[0].numel() == weight.ds_numel // 2  # type: ignore[attr-defined]
    part[0][0] += 1
    assert differing_weight(model, folder) == "model.embed_tokens.weight"
    shard = RowShard(weight)
    shard.write(shard.read() + 1)
    with gathered_weights(model):
        seen_VD = weight.detach().clone()
    expected_VD = folder.read_rows(folder.embedding_name, 0, shard.num_rows) + 1
    assert torch.equal(seen_VD, expected_VD)


def rounded_folder() -> None:
    """A folder of the wide model with rounded matrices: those of whole groups on every rank, but for the embedding."""
    if distributed.is_rank0():
        shutil.copytree(WIDE, FLAT)
        weights = load_file(f"{WIDE}/model.safetensors")
        for name, weight in weights.items():
            if weight.dim() > 1 and weight.numel() % (4 * 256) == 0 and "embed" not in name:
                groups_G256 = weight.view(-1, 256)
                scale_G1 = groups_G256.abs().amax(1, keepdim=True) / 127
                weight.copy_(((groups_G256 / scale_G1).round() * scale_G1).view_as(weight))
        save_file(weights, f"{FLAT}/model.safetensors", {"format": "pt"})
    distributed.barrier()


def rounded_weights() -> None:
    """Frozen weights kept in 8 bits give the numbers of a model whose files hold the rounded values, with hpZ and without."""
    rounded_folder()
    few = ["embed_tuning.max_steps=3", "partial_tuning.max_steps=3", "training.eval_every=null"]
    commands = {
        "lottery": (lottery, few),
        "lora": (tune, ["method=lora", "lora.max_steps=2", "evaluation.gather_weights=false"]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ROUNDS_ON", ("cpu",))
        for name, (command, words) in commands.items():
            command.main(recipe(*words, f"model.path={FLAT}", f"deepspeed={PLAIN}", f"run_dir={name} exact"))
            for json_name in (ROUNDED, ROUNDED_HPZ) if command is lottery else (ROUNDED_HPZ,):
                run_dir = f"{name} {json_name}"
                command.main(recipe(*words, f"model.path={WIDE}", f"deepspeed={json_name}", f"run_dir={run_dir}"))
                distributed.barrier()
                assert results(run_dir) == results(f"{name} exact"), (results(run_dir), results(f"{name} exact"))
                for stage in results(run_dir):
                    assert losses(Path(run_dir), stage) == losses(Path(f"{name} exact"), stage), (json_name, stage)
        # What a lottery saves has the weights of the files; its certificate is about rounded ones, of both models.
        saved = {}
        for path in Path(f"lottery {ROUNDED_HPZ}/checkpoints/embed_tuning").glob("*.safetensors"):
            saved |= load_file(path)
        given = load_file(f"{WIDE}/model.safetensors")
        assert [name for name in given if not torch.equal(saved[name], given[name])] == ["model.embed_tokens.weight"]
        words = ["text.train=[]", "text.valid=[]", "certify.alphas=[.5]"]
        found = []
        for run_dir, *given_words in (
            ("lottery exact", f"model.path={FLAT}", f"deepspeed={PLAIN}"),
            (f"lottery {ROUNDED_HPZ}", f"model.path={WIDE}", f"deepspeed={ROUNDED_HPZ}"),
        ):
            reference = f"reference={run_dir}/checkpoints/embed_tuning"
            certify.main(recipe(*words, reference, *given_words, f"run_dir=certified {run_dir}"))
            distributed.barrier()
            found.append(json.loads(Path(f"certified {run_dir}/results.json").read_text())["certificate"])
        assert found[0] == found[1]


def rounded_parts() -> None:
    """What ranks hold: integers and scales, in parts of the host's copy too, the same as in the proof of the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ROUNDS_ON", ("cpu",))
        wanted = recipe(f"model.path={WIDE}", f"deepspeed={ROUNDED_HPZ}")
        config = deepspeed_config(wanted)
        with pytest.raises(UserError, match="method full trains every weight, but"):
            prepare_method(wanted, open_model(WIDE).config, config, "full")
    folder = open_model(WIDE)
    model = load_model(wanted, folder, config)
    round_frozen(model, config)
    assert differing_weight(model, folder) is None
    rounded = {name: parameter for name, parameter in model.named_parameters() if is_rounded(parameter)}
    assert len(rounded) == 8 and all("self_attn" in name for name in rounded)
    for parameter in rounded.values():
        assert [part.dtype for part in (parameter.ds_tensor, parameter.ds_secondary_tensor)] == [torch.int8] * 2
        assert parameter.ds_tensor.numel() * 2 == parameter.ds_secondary_tensor.numel() == parameter.ds_numel // 2
    name, parameter = next(iter(rounded.items()))
    for part in (parameter.ds_tensor, parameter.ds_secondary_tensor):
        part[1] += 1
        assert differing_weight(model, folder) == name
        part[1] -= 1


def wrong_size() -> None:
    """A copy that would lie on two hosts is one sentence; `auto` takes the ranks of a host."""
    with pytest.MonkeyPatch.context() as patch:
        for ranks_here, size in ((2, 2), (4, 1)):
            patch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
            config = deepspeed_config(recipe("deepspeed=zero3_hpz.json"))
            assert config["zero_optimization"]["zero_hpz_partition_size"] == size
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        with pytest.raises(UserError, match="a host has 1 of the 4 ranks"):
            deepspeed_config(recipe(f"deepspeed={HPZ}"))


FEW = ["text.max_test_pairs=2", "evaluation.max_new_tokens=1", "training.eval_every=null"]
CASES = {
    "lottery": whole_lottery,
    "hooks, bf16": partial(
        same, lottery, "hooks", "partial_tuning.mode=hooks", "training.precision=bf16", "embed_tuning.max_steps=3", *FEW
    ),
    "full": partial(same, tune, "full", "method=full", "full_tuning.max_steps=2", *FEW),
    "lora": partial(same, tune, "lora", "method=lora", "lora.max_steps=2", *FEW),
    "resumed": resumed,
    "written rows": written_rows,
    "rounded weights": rounded_weights,
    "rounded parts": rounded_parts,
    "wrong size": wrong_size,
}
if __name__ == "__main__":
    run_cases(CASES)
