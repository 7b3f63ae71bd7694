"""The shipped DeepSpeed configurations train: two steps of embed tuning on two ranks with each."""

from __future__ import annotations

from functools import partial

import pytest
import ranks_configs
from helpers.cases import job_of_cases
from helpers.runs import prepare_inputs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 2}
training: {batch_size: 4, micro_batch_size: 2}
embed_tuning: {learning_rate: 0.01, max_steps: 2}
evaluation: {max_new_tokens: 2}
tracking: {wandb: "off"}
"""


configurations = job_of_cases(ranks_configs, ranks=[2], prepare=partial(prepare_inputs, recipe=RECIPE))


@pytest.mark.parametrize("case", ranks_configs.CASES)
def test_every_configuration_trains(case, configurations):
    configurations(case)
