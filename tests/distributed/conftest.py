"""The job that most distributed tests start."""

from __future__ import annotations

import json

import pytest
from helpers.tiny import make_model_folder, write_pairs

# Rows of 32 coordinates shift visibly only at learning rates that no real model would take.
RECIPE = """
run_dir: run
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, valid: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 6}
training: {batch_size: 8, micro_batch_size: 2, precision: fp32, eval_every: 3}
embed_tuning: {learning_rate: 0.1, max_steps: 6}
draw: {alpha: 0.5}
partial_tuning: {learning_rate: 0.1, max_steps: 6, weight_decay: 0.1}
evaluation: {batch_size: 4, max_new_tokens: 8}
tracking: {wandb: "off"}
"""
# No persistent parameters: tiny ones would otherwise stay whole on every rank.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture
def job(tmp_path):
    """A folder with a tied model, text, a DeepSpeed JSON and a recipe."""
    make_model_folder(tmp_path / "model", tied=True)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path
