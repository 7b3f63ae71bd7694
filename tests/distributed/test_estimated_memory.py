"""Estimates against what the real engine holds and sends."""

from __future__ import annotations

from functools import partial

import pytest
import ranks_estimate
from helpers.cases import job_of_cases
from helpers.runs import prepare_inputs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 8, micro_batch_size: 4}
tracking: {wandb: "off"}
"""


SIZES = {"vocab_size": 1001, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
measured = job_of_cases(ranks_estimate, ranks=[2], prepare=partial(prepare_inputs, recipe=RECIPE, **SIZES))


@pytest.mark.parametrize("case", ranks_estimate.CASES)
def test_estimates_lie_within_a_tenth_of_what_is_measured(case, measured):
    """Weights, gradients, optimizer states, all tensors, peaks of passes and steps, bytes received: by method."""
    measured(case)
