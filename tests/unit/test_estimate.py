"""Estimates without processes: parameter counts of built-in shapes, the dry run, the arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from helpers.processes import REPOSITORY, run, succeeds
from helpers.tiny import make_model_folder
from torch import nn

from ksl_ds.commands import estimate
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import EstimateCommand, Recipe
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import MethodCost, ModelDims, Zero, first_true, min_ranks, rank_needs
from ksl_ds.estimate.plan import Estimated, Plan, plan_of, recipe_of
from ksl_ds.estimate.tables import tables
from ksl_ds.model import dry_run
from ksl_ds.model.dry_run import SHAPES_FILE, LiveBytes, meta_model, model_config, step_bytes
from ksl_ds.report.tables import size

# Of the published checkpoints, tied heads counted once.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}


def plan(model: str, *words: str, **settings) -> Plan:
    words = ["run_dir=x", f"model.path={model}", "text.max_length=64", "training.micro_batch_size=2", *words]
    return plan_of(load_recipe(Recipe, None, ["method=lora", *words]), **settings)


@pytest.mark.parametrize("name", json.loads(SHAPES_FILE.read_text()))
def test_built_in_shapes_have_the_published_number_of_parameters(name):
    model = meta_model(model_config(name), torch.bfloat16, untied=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_folder_its_config_and_the_built_in_shape_of_it_agree(tmp_path):
    folder = make_model_folder(tmp_path / "model", tied=True)
    counts = set()
    for path in (folder, folder / "config.json"):
        model = meta_model(model_config(str(path)), torch.float32, untied=False)
        counts.add(tuple((name, value.shape) for name, value in model.named_parameters()))
    assert len(counts) == 1
    untied = meta_model(model_config(str(folder)), torch.float32, untied=True)
    extra = sum(p.numel() for p in untied.parameters()) - sum(shape.numel() for _, shape in counts.pop())
    assert extra == untied.get_input_embeddings().weight.numel()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nowhere/model/x", "llama-4-7000b"])
def test_an_unknown_model_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=name):
        model_config(name)


def test_live_bytes_counts_storages_while_they_live():
    before = torch.ones(1000)
    with LiveBytes() as live:
        kept = before + 1
        view = kept.view(10, 100)[3:]
        assert live.now == 4000
        twice = torch.cat([before, kept])
        assert live.now == 12000
        del kept, twice
        assert live.now == 4000 and view is not None  # the view keeps its storage
        del view
        assert (live.now, live.peak) == (0, 12000)
        before.add_(1)
        assert live.now == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", list(Estimated))
@pytest.mark.parametrize("length", [8, 96])
def test_a_few_layers_tell_what_all_would(tmp_path, monkeypatch, method, checkpointing, length):
    """At both ends: with short text the embedding's gradient is the peak, with long text the layers are."""
    if method == "prefix" and checkpointing:
        pytest.skip("PEFT has no prefix tuning under gradient checkpointing")
    folder = make_model_folder(tmp_path / "model", vocab_size=2000, num_hidden_layers=11)
    seen = plan(str(folder), f"text.max_length={length}", response_length=length // 2, ticket_rows=5)
    quick = seen.method(method, checkpointing=checkpointing)
    monkeypatch.setattr(dry_run, "_equal_layers", lambda model: None)
    assert quick == seen.method(method, checkpointing=checkpointing)


def test_the_dry_run_of_one_linear_layer_by_hand():
    """What the tools say where everything can be counted: softmax, logits and the embedding's gradient."""
    config = model_config("smollm2-135m")
    config.num_hidden_layers = 0
    model = meta_model(config, torch.float32, untied=False)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    vocab, width, tokens = 49152, 576, 32
    peak = step_bytes(model, 1, tokens, tokens - 1, checkpointing=False)
    gradient = 4 * vocab * width  # dense: of the tied head, of the lookup, and their sum
    assert 3 * gradient < peak < 3.1 * gradient


def test_needs_by_hand():
    """A 7-row embedding of width 10 and a norm of 10 that stays whole, on 2 and 4 ranks of ZeRO-3 in bf16."""
    zero = Zero(stage=3, reduce_bucket_size=100, prefetch_bucket_size=0, persistence_threshold=10, max_reuse_distance=0)
    training = ModelDims(weight_bytes=2, vocab_size=7, width=10)
    method = MethodCost("embed", trained=[70], frozen=[10, 200], working=1000, snapshots=True)
    needs = rank_needs(method, training, zero, 4)
    assert needs.weights == 2 * (18 + 3 + 50 + 10)
    assert needs.gradients == 2 * 18 and needs.optimizer == 12 * 18 and needs.step == 8 * 18
    assert needs.buffers == 200 and needs.gathered == 2 * 200 and needs.snapshot == 4 * 2 * 10
    assert needs.device == needs.weights + needs.gradients + needs.optimizer + 200 + 400 + 1000
    # Weights but the norm twice, gradients once, the norm after the optimizer's step; the draw's integers and one row.
    assert needs.wire_step == round(0.75 * (2 * 2 * 270 + 2 * 70 + 2 * 10))
    assert needs.wire_draw == round(0.75 * 2 * 4 * 7 + 4 * 10)
    assert rank_needs(method, training, zero, 1).wire_step == 0
    # Copies on hosts of two ranks: half of the weights more, and between hosts only what trains.
    copied = rank_needs(method, training, replace(zero, host_ranks=2), 4)
    assert copied.weights == needs.weights + 2 * sum(-(-numel // 2) for numel in [*method.trained, *method.frozen])
    assert needs.wire_between == needs.wire_step and needs.wire_within == 0
    assert needs.wire_gradients == copied.wire_gradients == round(0.75 * 2 * 70)
    assert copied.wire_between == round(0.75 * 2 * (3 * 70 + 10))
    assert (
        copied.wire_within == 0.5 * 2 * 2 * 200
    )  # frozen weights but the norm, twice, half of them from the neighbour
    assert copied.wire_step == copied.wire_between + copied.wire_within
    # In 8 bits: the matrix of 2048, not the embedding, the norm, or what does not divide into groups of 256 on 4 ranks.
    rounding = MethodCost("rows", trained=[30], frozen=[70, 10, 200, 2048], working=0, gathered_again=2048)
    spared = 2 - 1 - 4 / 256
    for ranks_of_host, parts in ((1, 1 / 4), (2, 1 / 4 + 1 / 2)):
        of_host = replace(zero, host_ranks=ranks_of_host)
        before = rank_needs(rounding, training, of_host, 4)
        after = rank_needs(rounding, training, replace(of_host, rounds_frozen=True), 4)
        assert before.weights - after.weights == round(spared * 2048 * parts)
        from_others = 0.75 if ranks_of_host == 1 else 0.5
        assert before.wire_step - after.wire_step == round(spared * 3 * 2048 * from_others)
        assert (before.wire_between == after.wire_between) == (ranks_of_host == 2)
    one_host = rank_needs(method, training, replace(zero, host_ranks=4), 4)
    assert one_host.weights == needs.weights
    offloaded = rank_needs(method, training, Zero(stage=3, offload_optimizer=True, persistence_threshold=0), 4)
    assert offloaded.host == offloaded.snapshot + offloaded.optimizer + offloaded.gradients + offloaded.step
    assert offloaded.device < needs.device + offloaded.buffers + offloaded.gathered


def test_estimate_shows_traffic_between_hosts_plain_and_with_copies(tmp_path):
    """What the table says is what `rank_needs` says of both ways, for every method; one host has no such table."""
    make_model_folder(tmp_path / "model")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    words = [f"model={tmp_path / 'model'}", "gpus=4", "length=32", f"deepspeed={tmp_path / 'ds.json'}"]
    command = load_recipe(EstimateCommand, None, [*words, "gpus_per_host=2"])
    plan = plan_of(recipe_of(command))
    *_, hosts = tables(plan, command)
    assert hosts.title == "What hosts of 2 GPUs receive"
    assert [row[0] for row in hosts.rows] == list(Estimated)
    training = plan.training()
    for row in hosts.rows:
        method = plan.method(Estimated(row[0]), checkpointing=False)
        plain = rank_needs(method, training, plan.zero, 4)
        copied = rank_needs(method, training, replace(plan.zero, host_ranks=2), 4)
        needs = [plain.wire_between, copied.wire_between, copied.wire_within, copied.weights - plain.weights]
        assert row[1:] == [size(number) for number in needs]
        assert copied.wire_between < plain.wire_between or row[0] == "full"
    assert len(tables(plan, load_recipe(EstimateCommand, None, [*words, "gpus_per_host=4"]))) == 2


def test_fewest_ranks_is_the_first_that_fits():
    zero, training = Zero(stage=3, reduce_bucket_size=0), ModelDims(2, 1000, 64)
    method = MethodCost("full", trained=[10**9] * 8, frozen=[], working=10**9)
    for memory in (5 * 10**9, 20 * 10**9, 200 * 10**9):
        fewest = min_ranks(method, training, zero, memory)
        by_trying = next((n for n in range(1, 2000) if rank_needs(method, training, zero, n).device <= memory), None)
        assert fewest == by_trying
    assert min_ranks(method, training, zero, 10**9) is None
    assert first_true(lambda n: n >= 1, 9) == 1 and first_true(lambda n: n >= 9, 9) == 9


def deepspeeds_estimate(parameters: int, gpus: int) -> int:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    return estimate_zero3_model_states_mem_needs(
        parameters, 0, num_gpus_per_node=gpus, cpu_offload=False, cpu_offload_params=False
    )[1]


def test_deepspeeds_own_estimator_agrees_where_everything_trains_and_nowhere_else():
    """It has 18 bytes for every parameter: 16 are held all the time, 20 while the optimizer steps; frozen ones need 2."""
    zero, total = Zero(stage=3, persistence_threshold=0), PARAMETERS["llama-3-70b"]
    training = ModelDims(2, 128_256, 8_192)
    theirs = deepspeeds_estimate(total, gpus=8)
    full = rank_needs(MethodCost("full", [total], [], 0), training, zero, 8)
    held = full.weights + full.gradients + full.optimizer
    assert held == pytest.approx(theirs, rel=0.12) and held + 4 * total / 8 == pytest.approx(theirs, rel=0.12)
    assert theirs == pytest.approx(158.7e9, rel=0.01)
    rows = rank_needs(MethodCost("ticket, rows", [18 * 8_192], [total], 0), training, zero, 8)
    assert rows.weights + rows.gradients + rows.optimizer == pytest.approx(17.6e9, rel=0.01)
    # Of a model that zero.Init has partitioned it sees nothing at all.
    from deepspeed.runtime.zero.stage3 import model_to_params

    partitioned = nn.Linear(4, 4)
    for parameter in partitioned.parameters():
        parameter.data = torch.empty(0)  # as DeepSpeed leaves it
    assert model_to_params(partitioned) == (0, 0)


@pytest.mark.slow
def test_the_command_as_typed(tmp_path):
    make_model_folder(tmp_path / "model", tied=True)
    words = ["estimate", "model", "gpus=4", "gpu_memory=2", "length=64", "network=100", "rows=3"]
    shown = succeeds(run("ksl-ds", *words, cwd=tmp_path)).stdout
    for word in (*Estimated, "each of 4 GPUs of 2 GiB", "ticket of 3 rows", "Gbit/s", "A draw:", "checkpointed"):
        assert word in shown


def test_a_recipe_says_what_the_command_line_does_not(tmp_path, capsys):
    make_model_folder(tmp_path / "model", tied=True)
    recipe = (REPOSITORY / "launch" / "recipes" / "quickstart.yaml").read_text()
    recipe = recipe.replace("models/smollm2-135m-instruct", str(tmp_path / "model"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    estimate.main(load_recipe(EstimateCommand, None, [f"model={tmp_path / 'recipe.yaml'}", "gpus=2", "length=32"]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "zero3.json, fp32" in shown and "8 pairs of 32 tokens" in shown
    parameters = sum(p.numel() for p in plan(str(tmp_path / "model")).meta_model().parameters())
    assert f"{parameters:,} parameters" in shown  # with the head that embedding_scope=input gives it


@pytest.mark.parametrize(
    "word", ["gpus=0", "gpu_memory=-1", "length=0", "length=1", "response_length=2000", "rows=0", "rows=1000000"]
)
def test_values_without_meaning_are_one_sentence(word):
    with pytest.raises(UserError, match=word.partition("=")[0]):
        estimate.main(load_recipe(EstimateCommand, None, ["model=smollm2-135m", word]))


def test_positions_are_counted_as_packed_where_prompts_share_a_beginning(tmp_path):
    folder = str(make_model_folder(tmp_path / "model"))
    words = ("text.max_length=60", "training.micro_batch_size=8", "training.packing=prefix")
    packed = plan(folder, *words, response_length=20, shared_length=30)
    positions = packed.packed_positions(packed.meta_model())
    assert positions == 30 + 8 * (60 - 30)
    of_packed, of_padded = (
        one.method(Estimated.FULL, checkpointing=False).working
        for one in (packed, plan(folder, *words, response_length=20))
    )
    assert of_packed < of_padded
    # Padding: nothing shared, asked for, prefix tuning, or less work than a long row's attention.
    for settings, more in (({}, ()), ({"shared_length": 30}, ("training.packing=off",))):
        padded = plan(folder, *words, *more, response_length=20, **settings)
        assert padded.packed_positions(padded.meta_model()) == 0
    long = plan(folder, "text.max_length=3000", "training.micro_batch_size=8", response_length=1500, shared_length=2)
    assert long.packed_positions(long.meta_model()) == 0
    mamba = plan(str(make_model_folder(tmp_path / "mamba", "mamba")), *words, response_length=20, shared_length=30)
    assert mamba.packed_positions(mamba.meta_model()) == 0
    with pytest.raises(UserError, match="shared_length is 40; it lies below the length of a prompt, 40"):
        plan(folder, *words, response_length=20, shared_length=40)
