"""Estimates against what the real engine holds and sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_estimate
from helpers.cases import job_of_cases
from helpers.tiny import make_model_folder, write_pairs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 8, micro_batch_size: 4}
tracking: {wandb: "off"}
"""


def prepare(folder: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    make_model_folder(folder / "model", vocab_size=1001, **sizes)
    write_pairs(folder / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)


measured = job_of_cases(ranks_estimate, ranks=[2], prepare=prepare)


@pytest.mark.parametrize("case", ranks_estimate.CASES)
def test_estimates_lie_within_a_tenth_of_what_is_measured(case, measured):
    """Weights, gradients, optimizer states, all tensors, peaks of passes and steps, bytes received: by method."""
    measured(case)
