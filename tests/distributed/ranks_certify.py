"""Run by test_certify.py on several ranks: certificates of models made by hand, and users' mistakes."""

import gc
import shutil
from pathlib import Path

import torch
from torch import nn

from ksl_ds import distributed
from ksl_ds.certificate import candidates
from ksl_ds.commands import certify
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.sharding.engine import set_library_verbosity

distributed.initialize()
set_library_verbosity(False)
elements_before_loading = []
load_model = candidates.load_model


def loading_alone(*arguments):
    """Counts the elements of all parameters that this rank holds when the reference is about to be loaded."""
    gc.collect()
    parameters = [thing for thing in gc.get_objects() if isinstance(thing, nn.Parameter) and not thing.is_meta]
    elements_before_loading.append(sum(getattr(weight, "ds_tensor", weight).numel() for weight in parameters))
    return load_model(*arguments)


candidates.load_model = loading_alone
RUNS = {
    "same": ["reference=moved"],
    "permuted": ["reference=permuted"],
    "layerwise": ["reference=permuted", "evaluation.gather_weights=false"],
    "given": ["reference=permuted", "ticket=tuned", "certify.alphas=[.95]"],
    "stage2": ["reference=permuted", "ticket=tuned", "certify.alphas=[.95]", "deepspeed=zero2.json"],
    "risk": [
        "reference=permuted",
        "ticket=tuned",
        "text.valid=valid.jsonl",
        "certify.epsilon=.9",
        "certify.alphas=[.5, .95]",
    ],
    "lost": ["reference=permuted", "text.valid=echo.jsonl", "certify.risk=lost_tokens", "certify.alphas=[.5]"],
    "chrf": [
        "reference=permuted",
        "text.valid=echo.jsonl",
        "certify.risk=chrf",
        "certify.epsilon=.99",
        "certify.alphas=[.5]",
        "evaluation.max_new_tokens=8",
    ],
    "compared": [
        "reference=permuted",
        "text.valid=valid.jsonl",
        "certify.comparison=comparison",
        "certify.alphas=[.5]",
    ],
    "both": [
        "reference=permuted",
        "text.valid=valid.jsonl",
        "certify.comparison=comparison",
        "ticket=tuned",
        "certify.alphas=[.5]",
    ],
    "sentence": ["reference=moved", "text.valid=valid.jsonl", "certify.risk=sentence", "certify.epsilon=.2"],
    "few": ["reference=permuted", "ticket=top", "certify.alphas=[]", "text.max_test_pairs=5"],
}
for name, words in RUNS.items():
    certify.main(load_recipe(Recipe, "recipe.yaml", [f"run_dir=run_{name}", *words]))
assert elements_before_loading == [0] * len(RUNS), elements_before_loading

# overrides: words that the sentence must contain
MISTAKES = {
    (): ["reference="],
    ("reference=nowhere",): ["nowhere"],
    ("reference=moved", "certify.alphas=[]"): ["certify.alphas"],
    ("reference=moved", "certify.alphas=[.5, 1]"): ["certify.alphas", "1"],
    ("reference=vocabulary",): ["embedding of shape"],
    ("reference=tokenizer",): ["tokenizers"],
    ("reference=full",): ["model.layers.1.mlp.up_proj.weight", "input embedding alone"],
    ("reference=tied_moved", "model.path=tied"): ["tied", "model.embedding_scope=shared"],
    ("reference=moved", "ticket=other"): ["another base"],
    ("reference=tied_moved", "model.path=tied", "model.embedding_scope=shared", "ticket=of_tied"): ["scope=input"],
    ("reference=moved", "text.train=test.jsonl"): ["text.train", "trained on"],
    ("reference=moved", "text.valid=test.jsonl"): ["text.valid", "text.train or text.test"],
    ("reference=moved", "certify.comparison=base"): ["certify.comparison=base", "seed 0", "runs/partial_tuning_alpha_"],
    ("reference=moved", "certify.epsilon=0"): ["certify.epsilon", "greater than 0"],
}
for number, (overrides, words) in enumerate(MISTAKES.items()):
    try:
        certify.main(load_recipe(Recipe, "recipe.yaml", [f"run_dir=mistaken{number}", *overrides]))
    except UserError as error:
        message = str(error)
    else:
        message = "no error"
    assert len(set(distributed.gather_objects(message))) == 1, message
    assert "\n" not in message and all(word in message for word in words), (overrides, message)
    distributed.barrier()
    if distributed.is_rank0():
        shutil.rmtree(f"mistaken{number}", ignore_errors=True)
    distributed.barrier()
if distributed.is_rank0():
    Path("alone").write_text(str(torch.distributed.get_world_size()))
distributed.shutdown()
