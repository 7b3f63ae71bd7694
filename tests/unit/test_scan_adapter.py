"""A LoRA adapter as the later checkpoint: merged on the fly as PEFT merges it, and refused where it is something else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.tiny import make_model_folder
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ksl_ds.cli import main
from ksl_ds.errors import UserError
from ksl_ds.model.folder import ModelFolder
from ksl_ds.scan.checkpoints import ADAPTER_FILE, open_checkpoints
from ksl_ds.scan.runner import make_plan, run_scan


def make_adapter(folder, base, **settings):
    """An adapter of PEFT with random tensors, saved as PEFT saves it."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        assert parameter.requires_grad or "lora_" not in name
    model.save_pretrained(folder)
    return folder


def merged_by_peft(folder, base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = {
    "plain": ("llama", LLAMA),
    "rslora": ("llama", {**LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {**LLAMA, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "modules to save": ("llama", {**LLAMA, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "inputs first": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_scanned_is_what_peft_merges(tmp_path, case, dtype):
    architecture, settings = CASES[case]
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if architecture == "gpt2" else {}
    base = make_model_folder(tmp_path / "base", architecture, dtype=dtype, tied=architecture == "gpt2", **sizes)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    whole = merged_by_peft(tmp_path / "merged", base, adapter)
    before, ours = open_checkpoints(ModelFolder(base), adapter)
    _, theirs = open_checkpoints(ModelFolder(base), whole)
    assert ours.names == theirs.names
    changed = 0
    for name in ours.names:
        everything = (slice(None),) * len(ours.shape(name))
        one, other = (side.read(name, everything) for side in (ours, theirs))
        assert one.dtype == other.dtype == dtype and one.shape == other.shape == ours.shape(name)
        # Products of other shapes are summed in another order: the last bit of float32 at most.
        differing = (one != other).float().mean()
        assert torch.allclose(one.float(), other.float(), rtol=0 if differing == 0 else 8e-3, atol=1e-6)
        assert differing <= (1 if dtype == torch.float32 else 0.01), name
        changed += not torch.equal(one, before.read(name, everything))
        for part in ((slice(3, 11),), (slice(None), slice(2, 7))):
            if one.ndim == 2:
                assert torch.allclose(ours.read(name, part).float(), one[part].float(), rtol=8e-3, atol=1e-6)
    assert changed >= (3 if case == "embedding" else 2)
    for rows in ("output", "input"):
        found = [run_scan(*sides, make_plan(*sides, rows)).count_T for sides in ((before, ours), (before, theirs))]
        assert all((one - other).abs().max() <= 1 for one, other in zip(*found, strict=True))
        assert sum(int(count_T.sum()) for count_T in found[0]) > 100


def test_tied_head_that_is_saved_is_compared_with_the_embedding(tmp_path):
    base = make_model_folder(tmp_path / "base", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = adapter / ADAPTER_FILE
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(file), "base_model.model.lm_head.weight": embedding + 1}, file)
    before, after = open_checkpoints(ModelFolder(base), adapter)
    plan = make_plan(before, after, "output")
    found = run_scan(before, after, plan)
    counts = dict(zip([tensor.name for tensor in plan.tested], found.count_T, strict=True))
    assert (counts["lm_head.weight"] == 32).all() and not counts["model.embed_tokens.weight"].any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LoRA"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "is a ticket or another adapter of single tokens, .* ksl-ds transfer"),
        ({"use_dora": True}, "use_dora is set"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"lora_alpha": "much"}, "adapter_config.json: lora_alpha"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, changes, sentence):
    base = make_model_folder(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **LLAMA)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=sentence):
        open_checkpoints(ModelFolder(base), adapter)


def test_dora_and_prefixes_of_peft_and_adapters_of_other_models_are_one_sentence(tmp_path, capsys):
    base = make_model_folder(tmp_path / "base")
    adapters = {
        "dora": (make_adapter(tmp_path / "dora", base, use_dora=True, **LLAMA), "use_dora is set"),
        "missing": (make_adapter(tmp_path / "missing", base, **LLAMA), "an adapter without adapter_model.safetensors"),
        "odd": (make_adapter(tmp_path / "odd", base, **LLAMA), "lora_magnitude_vector is not a part of plain LoRA"),
    }
    (tmp_path / "missing" / ADAPTER_FILE).unlink()
    odd = tmp_path / "odd" / ADAPTER_FILE
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**load_file(odd), key: torch.ones(3)}, odd)
    prefix = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prefix.save_pretrained(tmp_path / "prefix")
    adapters["prefix"] = (tmp_path / "prefix", "peft_type is PREFIX_TUNING; only LoRA")
    wide = make_model_folder(tmp_path / "wide", hidden_size=64)
    adapters["wide"] = (make_adapter(tmp_path / "of-wide", wide, **LLAMA), "do not fit model.layers")
    deep = make_model_folder(tmp_path / "deep", num_hidden_layers=3)
    adapters["deep"] = (
        make_adapter(tmp_path / "of-deep", deep, **LLAMA),
        "model.layers.2.*does not hold as one tensor",
    )
    for adapter, sentence in adapters.values():
        with pytest.raises(UserError, match=sentence):
            open_checkpoints(ModelFolder(base), adapter)
        assert main(["scan", f"before={base}", f"after={adapter}", f"out={tmp_path / 'out'}"]) == 2
        assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out").exists()
