"""`compare` as a job of the deepspeed launcher on a tiny model: stopped, resumed, with an entry that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.processes import ENVIRONMENT, HANG_SECONDS, free_port, launch, run, succeeds
from helpers.tiny import make_model_folder, write_pairs

RECIPE = """
run_dir: run
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 12, micro_batch_size: 6, precision: fp32}
embed_tuning: {learning_rate: 0.1, max_steps: 3}
partial_tuning: {learning_rate: 0.1, max_steps: 3}
lora: {learning_rate: 0.01, max_steps: 3}
draw: {alpha: 0.5}
compare:
  methods: [untuned, embed, transfer, ticket, frequency, newline, lora]
  alphas: [1e-15, 0.5]
  seeds: 0
evaluation: {batch_size: 18, max_new_tokens: 6}
tracking: {wandb: "off"}
"""


@pytest.fixture
def job(tmp_path):
    make_model_folder(tmp_path / "model", tied=True)
    write_pairs(tmp_path / "pairs.jsonl", repeat=3)
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "ds.json").write_text(json.dumps(zero3))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def stop_when(done, *words: object, cwd: Path) -> None:
    """Starts a job on two ranks and kills all of it as soon as `done()` says so."""
    command = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), *words]
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + HANG_SECONDS
        while process.poll() is None and not done():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # The launcher puts each rank into a session of its own.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [
            rank for child in children for rank in Path(f"/proc/{child}/task/{child}/children").read_text().split()
        ]
        for number in [*ranks, *children, process.pid]:
            os.kill(int(number), signal.SIGKILL)


def test_a_stopped_comparison_goes_on_where_it_was_and_one_failure_stops_nothing_else(job):
    embed = job / "run/runs/embed_tuning-seed0"

    def embed_is_scored() -> bool:
        file = embed / "results.json"
        return file.exists() and "embed_tuning" in json.loads(file.read_text())["stages"]

    stop_when(embed_is_scored, "--module", "ksl_ds", "compare", "recipe.yaml", cwd=job)
    before = {path: path.read_bytes() for path in embed.rglob("*.json*")}

    # Another learning rate for LoRA does not touch what is there; this one makes its loss infinite.
    done = launch(2, "--module", "ksl_ds", "compare", "recipe.yaml", "lora.learning_rate=1e39", cwd=job)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.count("ksl-ds: 1 of 9 entries failed: lora (seed 0); the same command tries these again") == 1
    assert "embed tuning, seed 0: found in run/runs/embed_tuning-seed0" in done.stderr
    assert {path: path.read_bytes() for path in embed.rglob("*.json*")} == before
    assert "entry 9 of 9: lora, seed 0" in done.stderr

    results = json.loads((job / "run/results.json").read_text())
    assert results["comparison"]["order"] == [
        "untuned",
        "embed_tuning",
        "partial_transfer_alpha_1e-15",
        "partial_transfer_alpha_0.5",
        "partial_tuning_alpha_1e-15",
        "partial_tuning_alpha_0.5",
        "rows_by_frequency",
        "one_row_newline",
        "lora",
    ]
    stages = results["stages"]
    assert set(stages) == set(results["comparison"]["order"]) - {
        "partial_transfer_alpha_1e-15",
        "partial_tuning_alpha_1e-15",
        "lora",
    }
    assert "the ticket is empty" in results["comparison"]["runs"]["partial_tuning_alpha_1e-15"]["0"]["missing"]
    assert "learning_rate" in results["comparison"]["runs"]["lora"]["0"]["missing"]
    trained = {key: stage["trained_parameters"] for key, stage in stages.items()}
    assert trained["rows_by_frequency"] == trained["partial_tuning_alpha_0.5"] == trained["partial_transfer_alpha_0.5"]
    assert trained["one_row_newline"] == 32 < trained["partial_tuning_alpha_0.5"] < trained["embed_tuning"]
    losses = {key: stage["test_loss"] for key, stage in stages.items()}
    assert losses["embed_tuning"] < losses["partial_tuning_alpha_0.5"] + 1e-6 < losses["untuned"]
    tests = results["comparison"]["tests"]
    assert set(tests) == {"embed_tuning", "untuned"} and "p" in tests["untuned"]["embed_tuning"]["0"]["whole"]["chrf"]

    # A ticket that a run left is the one that transfers: the embed-tuned rows of the same ids.
    rows = json.loads((job / "run/runs/partial_tuning_alpha_0.5-seed0/ticket/ticket.json").read_text())
    assert len(rows["token_ids"]) * 32 == trained["partial_tuning_alpha_0.5"] and rows["selection"] == "alpha"

    # The table again, without a launcher; it is what the run printed.
    again = succeeds(run("ksl-ds", "compare", "--from", "run/results.json", cwd=job)).stdout
    assert again in done.stdout and "against embed tuning" in " ".join(again.split())
    assert (job / "run/report.html").stat().st_size > 10_000


def test_a_comparison_takes_over_what_a_lottery_has_found(job):
    words = ["recipe.yaml", "compare.methods=[untuned,embed,transfer,ticket]", "compare.alphas=.5"]
    succeeds(launch(2, "--module", "ksl_ds", "lottery", words[0], cwd=job))
    done = succeeds(launch(2, "--module", "ksl_ds", "compare", *words, cwd=job))
    assert done.stderr.count("found in run") == 4 and "loading" not in done.stderr
    stages = json.loads((job / "run/compare/results.json").read_text())["stages"]
    lottery = json.loads((job / "run/results.json").read_text())["stages"]
    assert stages["partial_tuning_alpha_0.5"]["test_loss"] == lottery["partial_tuning"]["test_loss"]
    assert stages["embed_tuning"]["bleu"] == pytest.approx(lottery["embed_tuning"]["bleu"])
    # Another recipe in the same folder is not mixed with it.
    refused = launch(
        2, "--module", "ksl_ds", "compare", *words, "training.max_grad_norm=.5", "compare.methods=untuned", cwd=job
    )
    assert refused.returncode == 0 and "loading" in refused.stderr
