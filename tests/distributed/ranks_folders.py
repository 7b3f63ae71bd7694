"""Run by test_folders.py on several ranks, under ZeRO-3 and 2: fused experts, and an untied head despite the config."""

from pathlib import Path

import torch
from helpers.cases import run_cases
from helpers.runs import losses
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.training.run import open_run
from ksl_ds.training.stages import save_model

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


CASES = {"fused experts": experts, "untied head": untied_head}
if __name__ == "__main__":
    run_cases(CASES)
