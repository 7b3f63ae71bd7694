"""Every causal language model that transformers has: an estimate of each, and what PEFT can do with some. No weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import EstimateCommand, Recipe
from ksl_ds.errors import UserError
from ksl_ds.estimate import plan as plans
from ksl_ds.estimate import tables
from ksl_ds.estimate.memory import MethodCost
from ksl_ds.estimate.plan import Estimated
from ksl_ds.model import dry_run
from ksl_ds.model.adapters import ALL_LINEAR, adapter_config, with_adapter
from ksl_ds.model.dry_run import TooSlow, Unmeasured, meta_model, step_bytes
from ksl_ds.model.methods import prepare_method

FEW = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # names of a config's depth


def shallow(model_type: str, layers: int = 2) -> object:
    """The default config of a type with few layers, where its other values allow for it."""
    config = AutoConfig.for_model(model_type)
    for name in FEW:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, layers)
    return config


def plan_for(config: object, *words: str) -> plans.Plan:
    words = ("run_dir=x", "model.path=x", "text.max_length=8", "training.micro_batch_size=1", *words)
    recipe = load_recipe(Recipe, None, list(words))
    return plans.Plan(config.model_type, config, recipe, plans.Zero(stage=3), 4, 3)


@pytest.mark.slow
def test_every_architecture_gets_an_estimate_or_a_sentence(monkeypatch):
    monkeypatch.setattr(dry_run, "MAX_SECONDS", 0.1)
    built = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = shallow(model_type)
        except Exception:  # noqa: S112  transformers' own default for some types is no valid config
            continue
        try:
            plan = plan_for(config)
            method = plan.method(Estimated.FULL, checkpointing=False)
        except UserError as error:
            assert str(error).startswith("no causal language model"), (model_type, error)
            continue
        built.append(model_type)
        parameters = plan.meta_model().parameters()
        assert sum(method.trained) + sum(method.frozen) == sum(parameter.numel() for parameter in parameters), (
            model_type
        )
        assert (method.working is None) == bool(method.unknown), model_type
    assert len(built) > 140 and {"falcon", "gptj", "gpt2", "mpt", "gemma3", "mamba", "jamba", "rwkv"} <= set(built)


def tables_of(config: object, monkeypatch) -> list[str]:
    monkeypatch.setattr(tables, "seconds_of_a_row", lambda width: 1.0)
    memory, _ = tables.tables(plan_for(config), load_recipe(EstimateCommand, None, ["model=x", "gpu_memory=80"]))
    return [" ".join(row) for row in memory.rows] + memory.notes


def test_an_unknown_number_is_named_and_the_others_are_there(monkeypatch):
    """MPT's code builds its mask from one that a dry run does not have; PEFT has no prefix for it."""
    shown = tables_of(shallow("mpt"), monkeypatch)
    parameters = sum(p.numel() for p in meta_model(shallow("mpt"), torch.bfloat16, untied=True).parameters())
    assert any(line.startswith("full") and "unknown" in line and "> " in line for line in shown)
    assert any(line.startswith("prefix –") for line in shown)
    assert any(line.startswith(f"{parameters:,} parameters") for line in shown)
    assert any("activations: unknown for this architecture: " in line for line in shown)
    assert any("PEFT's prefix tuning does not support the architecture mpt" in line for line in shown)


def test_a_dry_run_ends_at_its_deadline_and_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(dry_run, "MAX_SECONDS", -1)
    plan = plan_for(shallow("llama"))
    method = plan.method(Estimated.EMBED, checkpointing=False)
    assert method.working is None and "takes more than" in method.unknown and plan.too_slow == method.unknown
    monkeypatch.setattr(plans, "step_bytes", lambda *args, **kwargs: pytest.fail("tried again"))
    assert plan.method(Estimated.FULL, checkpointing=False).unknown == method.unknown
    with pytest.raises(TooSlow):
        step_bytes(plan.meta_model(), 1, 8, 4, checkpointing=False)


def test_architectures_with_attention_of_their_own_are_measured():
    for model_type in ("falcon", "gptj", "gpt_neo"):
        method = plan_for(shallow(model_type)).method(Estimated.EMBED, checkpointing=False)
        assert isinstance(method, MethodCost) and method.working > 0, model_type


def recipe_of(*words: str) -> Recipe:
    return load_recipe(Recipe, None, ["run_dir=x", "model.path=x", "prefix.num_virtual_tokens=3", *words])


def test_lora_takes_pefts_default_and_else_all_linear_layers():
    assert adapter_config(shallow("llama"), recipe_of(), "lora").target_modules is None
    for model_type in ("phi3", "mixtral", "xglm", "cohere2"):
        assert adapter_config(shallow(model_type), recipe_of(), "lora").target_modules == ALL_LINEAR, model_type
    given = adapter_config(shallow("phi3"), recipe_of("lora.target_modules=[o_proj]"), "lora")
    assert given.target_modules == {"o_proj"}
    with pytest.raises(UserError, match="method=lora.*nowhere"):
        adapter_config(shallow("phi3"), recipe_of("lora.target_modules=[nowhere]"), "lora")
    with pytest.raises(UserError, match="mamba"):
        adapter_config(shallow("mamba"), recipe_of(), "lora")


@pytest.mark.parametrize(
    ("model_type", "sizes", "shape"),
    [
        ("falcon", {"num_attention_heads": 4, "multi_query": True}, (2, 1, 8)),
        ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, (2, 4, 32)),
    ],
)
def test_a_prefix_has_the_shape_of_the_keys_that_the_model_caches(model_type, sizes, shape):
    """And changes what the model says: the loss of a real model depends on it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    config = adapter_config(model.config, recipe_of("training.precision=fp32"), "prefix")
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == shape
    adapted = with_adapter(model, config)
    ids = torch.arange(3, 11)[None]
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained] == [(3, 2 * shape[0] * shape[2])]
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "mpt", "rwkv"])
def test_a_prefix_that_does_not_exist_is_one_sentence(model_type):
    with pytest.raises(UserError, match=f"PEFT's prefix tuning does not support the architecture {model_type}"):
        adapter_config(shallow(model_type), recipe_of(), "prefix")


def test_what_cannot_be_trained_is_known_from_the_config():
    zero3 = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="rwkv cannot be loaded under ZeRO stage 3.*zero2.json"):
        prepare_method(recipe_of(), shallow("rwkv"), zero3, "embed")
    assert prepare_method(recipe_of(), shallow("rwkv"), {"zero_optimization": {"stage": 2}}, "embed") is None
    for model_type in ("llama", "gpt2", "opt", "bloom", "mamba", "mixtral"):
        assert prepare_method(recipe_of(), shallow(model_type), zero3, "embed") is None, model_type
    checkpointed = recipe_of("training.gradient_checkpointing=true")
    with pytest.raises(UserError, match=r"gradient_checkpointing=true: .* does not support"):
        prepare_method(checkpointed, shallow("ctrl"), {}, "embed")
    with pytest.raises(UserError, match="method=prefix: .* gradient checkpointing"):
        prepare_method(checkpointed, shallow("llama"), {}, "prefix")


def test_an_error_of_the_dry_run_keeps_its_first_line():
    model = meta_model(shallow("llama"), torch.float32, untied=False)
    model.forward = lambda **kwargs: (_ for _ in ()).throw(KeyError("first\nsecond"))
    with pytest.raises(Unmeasured, match="KeyError"):
        step_bytes(model, 1, 8, 4, checkpointing=False)
