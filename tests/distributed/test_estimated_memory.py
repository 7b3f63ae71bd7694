"""Estimates against what the real engine holds and sends."""

from __future__ import annotations

from pathlib import Path

from helpers.processes import launch, succeeds
from helpers.tiny import make_model_folder, write_pairs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 8, micro_batch_size: 4}
tracking: {wandb: "off"}
"""


def test_estimates_lie_within_a_tenth_of_what_is_measured(tmp_path):
    """Weights, gradients, optimizer states, all tensors, peaks of passes and steps, bytes received: by method, on 2 ranks."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    make_model_folder(tmp_path / "model", vocab_size=1001, **sizes)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    succeeds(launch(2, Path(__file__).parent / "ranks_estimate.py", cwd=tmp_path))
