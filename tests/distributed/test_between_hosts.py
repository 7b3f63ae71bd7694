"""What travels between two hosts in a training step, by the counters of the cable."""

from __future__ import annotations

import json
import time

import torch
from helpers.hosts import said
from helpers.processes import HANG_SECONDS
from helpers.tiny import make_model_folder, write_pairs

from ksl_ds import draw_ticket
from ksl_ds.model.folder import ModelFolder

RECIPE = """
run_dir: run
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 2}
training: {batch_size: 8, micro_batch_size: 2, precision: fp32, gradient_checkpointing: true}
partial_tuning: {learning_rate: 0.1, max_steps: 14}
evaluation: {max_new_tokens: 1}
tracking: {wandb: "off"}
"""
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
CONSTANT = 100_000  # bytes a step between hosts that no ticket causes: losses, norms, agreement of the ranks, headers


def test_between_hosts_only_the_ticket_travels(hosts, tmp_path):
    """Counters of the cable, steps of mode rows, two hosts of two ranks: hpZ sends at most 1 % of what plain ZeRO-3 sends."""
    make_model_folder(tmp_path / "model", **SIZES)
    write_pairs(tmp_path / "pairs.jsonl", repeat=4)
    folder = ModelFolder(tmp_path / "model")
    rows_VD = folder.read_rows(folder.embedding_name, 0, folder.shape(folder.embedding_name)[0])
    ticket = draw_ticket(rows_VD, rows_VD + torch.eye(*rows_VD.shape), selection="top_k", top_k=8)
    ticket.save(tmp_path / "ticket", folder.embedding_module)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["tune", "recipe.yaml", "method=ticket", "ticket=ticket"]
    sent = {}
    losses = []
    for name, zero in {"plain": {}, "hpz": {"zero_hpz_partition_size": "auto"}}.items():
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}}
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        launchers = hosts.start(tmp_path, 2, *words, f"run_dir={name}")
        metrics = tmp_path / name / "metrics.jsonl"
        marks = []
        deadline = time.monotonic() + HANG_SECONDS
        for steps in (3, 13):
            while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
                assert time.monotonic() < deadline and launchers[0].poll() is None, said(tmp_path)
                time.sleep(0.002)
            marks.append((hosts.bytes_between(), len(metrics.read_text().splitlines())))
        for launcher in launchers:
            assert launcher.wait(timeout=HANG_SECONDS) == 0, said(tmp_path)
        losses.append([json.loads(line).get("loss") for line in metrics.read_text().splitlines()])
        sent[name] = (marks[1][0] - marks[0][0]) / (marks[1][1] - marks[0][1])
    assert losses[0] == losses[1]
    assert sent["hpz"] <= 0.01 * sent["plain"], sent
    assert sent["hpz"] <= 4 * ticket.rows_KD.nbytes + CONSTANT, sent
    print(f"bytes between hosts a step: {sent}")
