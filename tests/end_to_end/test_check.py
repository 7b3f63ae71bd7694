"""`ksl-ds check`: every line from a mistake made on purpose, and the recipes that ship with their own code path."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from deepspeed.accelerator import get_accelerator
from helpers.processes import REPOSITORY, launch, succeeds
from helpers.tiny import make_model_folder, write_pairs
from helpers.wandb_records import records, summary_of

from ksl_ds.commands import check
from ksl_ds.config.load import load_recipe, save_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import write_json
from ksl_ds.model.folder import ModelFolder
from ksl_ds.preflight import checks
from ksl_ds.preflight.checks import Checklist
from ksl_ds.report import tracking
from ksl_ds.sharding.engine import deepspeed_config
from ksl_ds.training.inputs import inputs_of, record_inputs

RECIPE = """
run_dir: run
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl}
training: {batch_size: 8, micro_batch_size: 2, precision: fp32}
tracking: {wandb: "off"}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    make_model_folder(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(capsys, *words: str) -> list[str]:
    """What `check` prints in this process, a cluster of one."""
    try:
        check.main(load_recipe(Recipe, "recipe.yaml", list(words)))
        outcome = "passed"
    except UserError as error:
        outcome = str(error)
    return [*capsys.readouterr().out.splitlines(), outcome]


def failed(shown: list[str]) -> list[str]:
    return [line.split()[1] for line in shown if line.startswith("failed")]


def test_all_is_well(job, capsys):
    shown = lines(capsys, "num_ranks=1")
    assert shown[-2:] == ["all checks passed", "passed"] and failed(shown) == []
    for what in (
        "ranks",
        "hosts",
        "versions",
        "deepspeed",
        "device",
        "model",
        "method",
        "text",
        "scores",
        "wandb",
        "memory",
        "run_dir",
        "disk",
    ):
        assert any(line.startswith(f"ok       {what} ") for line in shown), what
    assert not any(line[9:].startswith(("network", "traffic")) for line in shown)  # a single rank
    assert not (job / "run").exists()


@pytest.mark.parametrize(
    ("words", "what", "said"),
    [
        (["num_ranks=16"], "ranks", "num_ranks=16; check the hostfile"),
        (["model.path=nowhere/x/y"], "model", "nowhere/x/y"),
        (["text.train=nowhere.jsonl"], "text", "nowhere.jsonl"),
        (["deepspeed=nowhere.json"], "deepspeed", "nowhere.json"),
        (["evaluation.tokenize=13b"], "scores", "13b"),
        (["training.precision=fp16"], "device", "this CPU does not support fp16"),
        (["deepspeed=stage_5.json"], "deepspeed", "zero_optimization.stage is 5"),
        (["deepspeed=nvme.json"], "deepspeed", "zero_optimization.offload_param.device = nvme"),
        (["deepspeed=list.json"], "deepspeed", "list.json holds []"),
    ],
)
def test_what_is_missing_is_named(job, capsys, monkeypatch, words, what, said):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # some CPUs have it
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    for name, content in {"stage_5": {"zero_optimization": {"stage": 5}}, "nvme": nvme, "list": []}.items():
        (job / f"{name}.json").write_text(json.dumps(content))
    shown = lines(capsys, *words)
    assert what in failed(shown) and any(said in line for line in shown)
    assert "failed; see the list" in shown[-1]


def test_a_full_disk_and_too_little_memory(job, capsys, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(checks, "_device_memory", lambda: 10_000)
    shown = lines(capsys)
    assert failed(shown) == ["memory", "memory", "disk"]  # the training, and the whole model while translating
    assert any("gradient_checkpointing=true" in line for line in shown)
    assert any("gather_weights=false" in line for line in shown)


def test_a_run_folder_that_is_in_use_fails(job, capsys):
    (job / "run").mkdir()
    (job / "run" / "results.json").write_text("{}")
    shown = lines(capsys, "num_ranks=1")
    assert any(line.startswith("failed") and "already holds a run" in line for line in shown)
    assert shown[-1] == "1 check failed; see the list"


def test_what_resume_would_fail_on_is_named(job, capsys):
    """A run of two ranks was started and cut off; one of its inputs changes after the other."""
    words = ["run_dir=run", "resume=auto", "num_ranks=1"]
    recipe = load_recipe(Recipe, "recipe.yaml", words)
    (job / "run").mkdir()
    save_recipe(recipe, job / "run/recipe.yaml")
    scores = dict.fromkeys(("trained_parameters", "test_loss", "bleu", "chrf", "first_line_bleu"), 0)
    results = {
        "stages": {"untuned": scores | {"steps": 0, "planned_steps": 0}},
        "baselines": {},
        "text": {},
        "environment": hardware_and_versions(),
        "recipe": recipe,
    }
    write_json(job / "run/results.json", results)
    found = inputs_of(recipe, ModelFolder(job / "model"), deepspeed_config(recipe)) | {"weights": {}}
    record_inputs(job / "run", found, resumes=False)
    shown = lines(capsys, *words)
    assert failed(shown) == [] and any(
        line.startswith("ok       resume     run can be resumed, untuned complete") for line in shown
    )

    def fails(said: str, *more: str) -> None:
        shown = lines(capsys, *words, *more)
        assert failed(shown) == ["resume"] and any(said in line for line in shown), shown

    fails("training.max_grad_norm=1.0, and now it is 2.0", "training.max_grad_norm=2")
    (job / "run/inputs.json").write_text(json.dumps(found | {"deepspeed": {}}))
    fails("zero3.json has changed since the run in run was started (bf16.enabled was None and is False)")
    (job / "run/inputs.json").write_text(json.dumps(found))
    (job / "model/generation_config.json").unlink()
    fails("the model model has changed since the run in run was started (generation_config.json differs)")


def test_wandb_out_of_reach_is_a_warning(job, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(tracking, "_why_offline", lambda probe: "api.wandb.ai does not answer")
    shown = lines(capsys, "tracking.wandb=online", "num_ranks=1")
    warnings = [line for line in shown if line.startswith("warning")]
    assert len(warnings) == 1 and "does not answer" in warnings[0]
    assert shown[-1] == "passed"


def test_hosts_that_differ_are_named(capsys):
    checks = Checklist(hosts=["alpha", "alpha", "beta", "beta"])
    checks.same("versions", [1, 1, 2, 2], "other versions")
    assert capsys.readouterr().out.split("\n")[0].endswith("beta: other versions than on alpha")
    checks.same("versions", [1, 1, 1, 1], "other versions")
    assert checks.failed == 1


def test_under_the_launcher(job):
    """Two ranks; a bad recipe ends with a code that is not 0, one line of reason and no traceback."""
    done = launch(2, "--module", "ksl_ds", "check", "recipe.yaml", "num_ranks=3", "text.test=nowhere.jsonl", cwd=job)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "2 respond" in done.stdout and "num_ranks=3" in done.stdout and "nowhere.jsonl" in done.stdout
    assert done.stderr.count("ksl-ds: 2 checks failed") == 1
    # One host: no word about others, nor about copies of the weights on each.
    (network,) = [line for line in done.stdout.splitlines() if line.startswith("ok       network")]
    assert "within the host" in network and "between" not in network
    traffic = [line for line in done.stdout.splitlines() if line.startswith("ok       traffic")]
    assert len(traffic) == 2 and not any("hosts" in line or "hpZ" in line for line in traffic)


def test_the_papers_recipe_runs_on_a_tiny_model(job):
    """Its own code path, all of it, but for what a CPU and 12 sentences cannot: size, fp16, steps, spBLEU's tokenizer."""
    words = [
        "model.path=model", "text.train=pairs.jsonl", "text.test=pairs.jsonl", "text.max_test_pairs=4", "run_dir=paper",
        "num_ranks=1", "training.precision=fp32", "training.batch_size=8", "evaluation.tokenize=13a", "draw.alpha=.5",
        "embed_tuning.max_steps=4", "embed_tuning.learning_rate=.1", "draw.every=2", "partial_tuning.max_steps=2",
        "partial_tuning.learning_rate=.1", "evaluation.max_new_tokens=4", "tracking.wandb=offline", "verbose=true",
    ]  # fmt: skip
    recipe = REPOSITORY / "launch" / "recipes" / "paper_llama_7b.yaml"
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_ThisIsASecretToo"}
    done = succeeds(launch(1, "--module", "ksl_ds", "lottery", recipe, *words, cwd=job, **secrets))
    results = json.loads((job / "paper" / "results.json").read_text())
    assert set(results["stages"]) == {"untuned", "embed_tuning", "partial_transfer", "partial_tuning"}
    assert results["draw"]["method"] == "asymp" and results["draw"]["rows"] > 0
    # wandb's file has the ticket and the final scores of every stage.
    (path,) = (job / "paper" / "wandb").glob("offline-run-*/*.wandb")
    found = list(records(path))
    summary = summary_of(found)
    for stage, scores in (results["baselines"] | results["stages"]).items():
        assert summary[f"{stage}/bleu"] == scores["bleu"] and summary[f"{stage}/chrf"] == scores["chrf"]
    (ticket,) = [record.artifact for record in found if record.artifact.type == "ticket"]
    metadata = json.loads(ticket.metadata)
    assert metadata["base"] == "model" and metadata["direction"] == "English to Catalan"
    assert metadata["rows"] == results["draw"]["rows"] and metadata["alpha"] == 0.5
    assert sorted(metadata["files"]) == sorted(os.listdir(job / "paper" / "ticket"))
    # Tokens that the environment holds are nowhere: not on the screen at its most talkative, not in any file of the run.
    files = [path for path in (job / "paper").rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    contents = [path.read_bytes() for path in files] + [(done.stdout + done.stderr).encode()]
    assert [name for name, secret in secrets.items() if any(secret.encode() in content for content in contents)] == []
