"""`ksl-ds scan` as a user types it, its folder and its report; `scan: true` in a run of its own."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.html_requests import Page
from helpers.processes import run, succeeds
from helpers.tiny import make_model_folder, write_pairs
from safetensors.torch import load_file, save_file

from ksl_ds.lottery.ks import ks_2samp

RECIPE = """
run_dir: run
scan: true
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 12, micro_batch_size: 12, precision: fp32}
embed_tuning: {learning_rate: 0.1, max_steps: 2}
partial_tuning: {learning_rate: 0.1, max_steps: 2}
full_tuning: {learning_rate: 0.01, max_steps: 2}
lora: {learning_rate: 0.01, max_steps: 2, target_modules: [q_proj, down_proj]}
draw: {alpha: 0.5}
evaluation: {batch_size: 12, max_new_tokens: 3}
tracking: {wandb: "off"}
"""


@pytest.fixture
def job(tmp_path):
    make_model_folder(tmp_path / "model", tied=True)
    write_pairs(tmp_path / "pairs.jsonl", repeat=2)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_the_command_and_its_folder(tmp_path):
    before = make_model_folder(tmp_path / "before")
    after = make_model_folder(tmp_path / "after", seed=1)
    tensors = load_file(after / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(3)}, after / "model.safetensors", metadata={"format": "pt"})
    done = succeeds(run("ksl-ds", "scan", "before=before", "after=after", "out=out/deep", cwd=tmp_path))
    table = re.search(r"^ +self_attn\.q_proj +64 +100\.0 % .*$", done.stdout, re.MULTILINE)
    assert table and "Not compared: 1 only in after (extra)." in done.stdout and "out/deep/report.html" in done.stdout
    out = tmp_path / "out" / "deep"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "scan.safetensors"]

    counts, results = load_file(out / "scan.safetensors"), json.loads((out / "results.json").read_text())
    base = load_file(before / "model.safetensors")
    assert counts.keys() == base.keys() == results["tensors"].keys()
    expected = ks_2samp(base["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(counts["lm_head.weight"].long(), expected.count)
    head = results["tensors"]["lm_head.weight"]
    assert head["share"]["nominal"] == (expected.pvalue < 0.05).double().mean()
    assert head["largest_statistic"] == expected.statistic.max()
    assert results["only_after"] == ["extra"] and results["kinds"]["lm_head"]["rows"] == 134
    assert {cell["layer"] for cell in results["cells"]} == {None, 0, 1}

    page = Page((out / "report.html").read_text())
    text = (out / "report.html").read_text()
    assert page.requests == [] and page.tags.count("svg") == 4
    for title in (
        "Module kinds",
        "Profile of the layers",
        "Rows of largest D",
        "Embedding and head as tickets",
        "Not compared",
    ):
        assert f">{title}</h2>" in text
    # The heat map's values are text: a share for each of the 21 matrices and vectors.
    heat_map = text[text.index("<svg") : text.index("</svg>")]
    shares = [100 * cell["share"]["nominal"] for cell in results["cells"]]
    printed = re.findall(r">([\d.e+-]+)</text>", heat_map)
    assert len(shares) == 21 and all(f"{share:.3g}" in printed for share in shares)
    words = [row["token"] for row in results["tickets"]["model.embed_tokens.weight"]["largest"]]
    assert words[0] and f">{words[0]}</td>" in text


def test_a_folder_without_a_tokenizer_is_scanned_by_ids(tmp_path):
    for name, seed in (("before", 0), ("after", 1)):
        folder = make_model_folder(tmp_path / name, seed=seed)
        for path in folder.glob("token*"):
            path.unlink()
    done = succeeds(run("ksl-ds", "scan", "before=before", "after=after", "out=out", cwd=tmp_path))
    assert "the tokenizer does not load" in done.stderr and "without their tokens" in done.stderr
    assert (
        json.loads((tmp_path / "out/results.json").read_text())["tickets"]["lm_head.weight"]["largest"][0]["token"]
        == ""
    )


@pytest.mark.parametrize("method", ["full", "lora", "embed"])
def test_tune_scans_its_own_result(job, method):
    done = succeeds(run("ksl-ds", "tune", "recipe.yaml", f"method={method}", cwd=job))
    results = json.loads((job / "run/results.json").read_text())
    kinds = json.loads((job / "run/scan/results.json").read_text())["kinds"]
    assert results["scan"]["kinds"] == kinds and results["scan"]["alpha"] == 0.5
    moved = {kind for kind, found in kinds.items() if found["moved"]}
    assert "run/scan: " in done.stdout
    if method == "embed":
        assert moved == {"embed_tokens"} and results["scan"]["stage"] == "embed_tuning"
    elif method == "lora":
        assert moved == {"self_attn.q_proj", "mlp.down_proj"}
    else:
        assert moved == set(kinds) and "lm_head" in kinds  # which full tuning untied

    # Again: what is there is not scanned again.
    again = succeeds(run("ksl-ds", "tune", "recipe.yaml", f"method={method}", "resume=auto", cwd=job))
    assert "scanning" not in again.stderr


def test_lottery_and_compare_scan_too(job):
    words = ["recipe.yaml", "compare.methods=[untuned,embed,ticket,lora]", "compare.alphas=.5", "compare.seeds=0"]
    succeeds(run("ksl-ds", "compare", *words, cwd=job))
    scanned = sorted(path.parent.parent.name for path in job.glob("run/runs/*/scan/report.html"))
    assert scanned == ["embed_tuning-seed0", "lora-seed0"]
    succeeds(run("ksl-ds", "lottery", "recipe.yaml", "run_dir=whole", cwd=job))
    assert (job / "whole/scan/report.html").is_file()
