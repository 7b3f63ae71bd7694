"""Training a few rows under ZeRO: all others stay bit-identical, masters included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks_accelerate
import ranks_rows
import torch
from helpers.cases import job_of_cases
from helpers.processes import launch, run, succeeds
from helpers.tiny import make_model_folder, write_pairs

from ksl_ds import draw_ticket
from ksl_ds.model.folder import ModelFolder

RECIPE = """
run_dir: tuned
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 4, micro_batch_size: 2, precision: bf16}
partial_tuning: {learning_rate: 0.1, max_steps: 5, weight_decay: 0.1, mode: hooks}
evaluation: {max_new_tokens: 4}
tracking: {wandb: "off"}
"""


rows = job_of_cases(ranks_rows, ranks=[1, 2])


@pytest.mark.parametrize("case", ranks_rows.CASES)
def test_other_rows_stay(case, rows):
    """5 to 50 steps of AdamW with weight decay .1, momentum, clipping and accumulation, stages 0 to 3, tied and untied."""
    rows(case)


accelerated = job_of_cases(ranks_accelerate, ranks=[2])


@pytest.mark.parametrize("case", ranks_accelerate.CASES)
def test_other_rows_stay_under_accelerate(case, accelerated):
    """Rows of an embedding and of its head, under DDP and DeepSpeed as accelerate sets them up."""
    accelerated(case)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_other_rows_stay_within_the_trainer_of_transformers(stage, tmp_path):
    succeeds(launch(1, Path(__file__).parent / "ranks_trainer.py", stage, cwd=tmp_path))


def test_the_scores_of_a_ticket_tuned_in_stage_0_are_those_of_the_ticket_that_is_written(tmp_path):
    """In 16 bits DeepSpeed steps hidden fp32 masters there, and all rows would move with them."""
    folder = ModelFolder(make_model_folder(tmp_path / "model", dtype=torch.bfloat16))
    rows_VD = folder.read_rows(folder.embedding_name, 0, folder.shape(folder.embedding_name)[0])
    ticket = draw_ticket(rows_VD, rows_VD + torch.eye(*rows_VD.shape, dtype=rows_VD.dtype), selection="top_k", top_k=4)
    ticket.save(tmp_path / "ticket", folder.embedding_module)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    succeeds(run("ksl-ds", "tune", "recipe.yaml", "method=ticket", "ticket=ticket", cwd=tmp_path))
    succeeds(run("ksl-ds", "evaluate", "recipe.yaml", "ticket=tuned/ticket", "run_dir=written", cwd=tmp_path))
    tuned = json.loads((tmp_path / "tuned/results.json").read_text())["stages"]["partial_tuning"]
    written = json.loads((tmp_path / "written/results.json").read_text())["stages"]["ticket"]
    assert tuned["test_loss"] == written["test_loss"] and tuned["bleu"] == written["bleu"]
    succeeds(run("ksl-ds", "evaluate", "recipe.yaml", "run_dir=untuned", cwd=tmp_path))
    untuned = json.loads((tmp_path / "untuned/results.json").read_text())["stages"]["untuned"]
    assert tuned["test_loss"] < untuned["test_loss"]
