"""The shipped DeepSpeed configurations train: two steps of embed tuning on two ranks with each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.processes import launch, succeeds
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_configuration_trains(precision, tmp_path):
    if precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("DeepSpeed trains in fp16 on GPUs only")
    make_model_folder(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    succeeds(launch(2, Path(__file__).parent / "ranks_configs.py", precision, cwd=tmp_path))
