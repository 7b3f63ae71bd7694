"""A small job that most distributed tests start, and what its run folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def prepare_inputs(folder: Path, recipe: str, **settings: Any) -> None:
    """Puts a model (see `make_model_folder` for its settings), text and a recipe into a folder."""
    make_model_folder(folder / "model", **settings)
    write_pairs(folder / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(recipe)


def prepare_job(folder: Path) -> None:
    """Puts a tied model, text, a DeepSpeed JSON and a recipe into a folder."""
    prepare_inputs(folder, RECIPE, tied=True)
    (folder / "ds.json").write_text(json.dumps(ZERO3))


def losses(run_dir: Path, stage: str, name: str = "loss") -> list[float]:
    """A number that is logged with every training step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["stage"] == stage and "loss" in line]
