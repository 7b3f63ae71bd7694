"""The shipped DeepSpeed configurations train: two steps of embed tuning on two ranks with each."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_configs
from helpers.cases import job_of_cases
from helpers.tiny import make_model_folder, write_pairs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 2}
training: {batch_size: 4, micro_batch_size: 2}
embed_tuning: {learning_rate: 0.01, max_steps: 2}
evaluation: {max_new_tokens: 2}
tracking: {wandb: "off"}
"""


def prepare(folder: Path) -> None:
    make_model_folder(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)


configurations = job_of_cases(ranks_configs, ranks=[2], prepare=prepare)


@pytest.mark.parametrize("case", ranks_configs.CASES)
def test_every_configuration_trains(case, configurations):
    configurations(case)
