"""The training commands as real jobs of the deepspeed launcher, on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import ranks_methods
import ranks_mistakes
import torch
from helpers.cases import job_of_cases
from helpers.processes import launch, run, succeeds
from helpers.runs import losses, prepare_job
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksl_ds.text.corpus import Pair
from ksl_ds.text.prompt import Prompt
from ksl_ds.training.loss import corpus_loss

HERE = Path(__file__).parent


def test_lottery_leaves_a_whole_run_folder(job):
    done = succeeds(launch(2, "--module", "ksl_ds", "lottery", "recipe.yaml", cwd=job))
    results = json.loads((job / "run/results.json").read_text())
    assert set(results["stages"]) == {"untuned", "embed_tuning", "partial_transfer", "partial_tuning"}
    for stage in results["stages"].values():
        for number in ("test_loss", "bleu", "chrf", "first_line_bleu", "stop_rate", "output_length", "seconds"):
            assert math.isfinite(stage[number])
        assert stage["peak_memory_bytes"] > 0
    test_loss = {name: stage["test_loss"] for name, stage in results["stages"].items()}
    assert test_loss["embed_tuning"] < test_loss["untuned"]
    assert test_loss["partial_tuning"] < test_loss["untuned"]
    assert results["baselines"]["copying_source"]["stop_rate"] == 1

    ticket = json.loads((job / "run/ticket/ticket.json").read_text())
    rows = len(ticket["token_ids"])
    assert 0 < rows < ticket["vocab_size"]
    assert results["stages"]["partial_tuning"]["trained_parameters"] == rows * 32
    for folder in ("ticket", "checkpoints/partial_transfer"):
        config = json.loads((job / "run" / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "model"  # AutoPeftModelForCausalLM loads the base model by it
    for name in ("recipe.yaml", "metrics.jsonl", "report.html"):
        assert (job / "run" / name).stat().st_size > 0
    assert len(losses(job / "run", "partial_tuning")) == 6
    assert "partial tuning" in done.stdout and str(ticket["token_ids"][0]) in done.stdout

    card = (job / "run/ticket/README.md").read_text()
    assert "English to French" in card and "| partial tuning |" in card and "| untuned |" in card
    largest = max(ticket["count"])
    for number, count in zip(ticket["token_ids"], ticket["count"], strict=True):
        assert f"\n| {number} | " in card or count < largest

    # The same ticket from the files, and models written from it: only the ticket's rows differ from the base.
    succeeds(
        run("ksl-ds", "draw", "before=model", "after=run/checkpoints/embed_tuning", "out=again", "alpha=.5", cwd=job)
    )
    assert json.loads((job / "again/ticket.json").read_text())["count"] == ticket["count"]
    succeeds(run("ksl-ds", "transfer", "base=model", "ticket=run/ticket", "out=merged", cwd=job))
    base = load_file(job / "model/model.safetensors")["model.embed_tokens.weight"]
    merged = {}
    for shard in (job / "merged").glob("*.safetensors"):
        merged |= load_file(shard)
    moved = (merged["model.embed_tokens.weight"] != base).any(dim=1).nonzero().flatten().tolist()
    assert moved == ticket["token_ids"]
    assert torch.equal(merged["lm_head.weight"], base)

    # A stage on its own, on what the run left: the same rows, the same losses to the bit, and the same scores, though the
    # weights stay partitioned while translating.
    succeeds(
        launch(
            2, "--module", "ksl_ds", "tune", "recipe.yaml", "method=ticket", "run_dir=tuned",
            "ticket=run/checkpoints/partial_transfer", cwd=job,
        )
    )  # fmt: skip
    assert losses(job / "tuned", "partial_tuning") == losses(job / "run", "partial_tuning")
    evaluated = succeeds(
        launch(
            2, "--module", "ksl_ds", "evaluate", "recipe.yaml", "run_dir=scored", "ticket=run/ticket",
            "evaluation.gather_weights=false", cwd=job,
        )
    )  # fmt: skip
    scored = json.loads((job / "scored/results.json").read_text())["stages"]["ticket"]
    assert scored["test_loss"] == pytest.approx(test_loss["partial_tuning"], rel=1e-5)
    assert scored["bleu"] == results["stages"]["partial_tuning"]["bleu"]
    assert "BLEU" in evaluated.stdout

    # Scores are those of the files by hand.
    folder = job / "run/translations/partial_tuning"
    by_hand = succeeds(
        run(
            "sacrebleu",
            folder / "references.txt",
            "-i",
            folder / "hypotheses.txt",
            "-m",
            "bleu",
            "-b",
            "-w",
            4,
            cwd=job,
        )
    )
    assert float(by_hand.stdout) == pytest.approx(results["stages"]["partial_tuning"]["bleu"], abs=1e-4)

    # A second run into the same folder is refused, and the first one stays.
    refused = launch(2, "--module", "ksl_ds", "lottery", "recipe.yaml", cwd=job)
    assert refused.returncode != 0 and refused.stderr.count("already holds a run") == 1
    assert json.loads((job / "run/results.json").read_text()) == results


def test_losses_do_not_depend_on_the_number_of_ranks(job):
    """Batches of 12 on 1, 2 and 3 ranks with 2 pairs at once: 6, 3 and 2 accumulation steps; the last batch is short."""
    curves = {}
    for ranks in (1, 2, 3):
        words = ["tune", "recipe.yaml", f"run_dir=run{ranks}", "training.batch_size=5", "embed_tuning.max_steps=6"]
        succeeds(launch(ranks, "--module", "ksl_ds", *words, cwd=job))
        curves[ranks] = losses(job / f"run{ranks}", "embed_tuning")
    assert len(curves[1]) == 6 and curves[1][-1] < curves[1][0]
    assert curves[2] == pytest.approx(curves[1], rel=1e-5)
    assert curves[3] == pytest.approx(curves[1], rel=1e-5)


def test_ranks_hold_their_part_only(job):
    """While ZeRO-3 trains, a rank holds 1/ranks of the weights and of the optimizer's states."""
    succeeds(launch(2, HERE / "ranks_zero3.py", cwd=job))


methods = job_of_cases(ranks_methods, ranks=[2], prepare=prepare_job)
STAGES = {"full": ("full_tuning", 24096), "lora": ("lora", 1792), "prefix": ("prefix_tuning", 256)}


@pytest.mark.parametrize("case", STAGES)
def test_other_methods_leave_what_others_load(case, methods):
    """On the same loop; transformers and PEFT load what they leave and see the same loss."""
    methods(case)
    stage, trained_parameters = STAGES[case]
    job = methods.folder
    pairs = [json.loads(line) for line in (job / "pairs.jsonl").read_text().splitlines()]
    prompt = Prompt("plain", "English", "French", AutoTokenizer.from_pretrained(job / "model"))
    examples = prompt.encode([Pair(pair["source"], pair["target"]) for pair in pairs])
    results = json.loads((job / case / "results.json").read_text())["stages"][stage]
    out = job / case / "checkpoints" / stage
    if case == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert not model.config.tie_word_embeddings
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job / "model"), out)
    model.eval()
    assert corpus_loss(model, model, examples, 0, 4) == pytest.approx(results["test_loss"], rel=1e-4)
    curve = losses(job / case, stage)
    assert curve[-1] < curve[0]
    assert results["trained_parameters"] == trained_parameters


@pytest.mark.parametrize("case", ["embed"])
def test_bf16_with_checkpointing_a_linear_schedule_and_beam_search(case, methods):
    methods(case)
    curve = losses(methods.folder / "embed", "embed_tuning")
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("case", ["published"])
def test_a_published_ticket_is_trained(case, methods):
    methods(case)
    published = json.loads((methods.folder / "published/ticket/ticket.json").read_text())
    assert published["token_ids"] == [13, 263, 278, 297, 304, 310, 322, 29871, 29889, 29892, 29896, 29900]
    assert published["selection"] == "published:en-da" and published["tested_dtype"] == "untested"


mistaken = job_of_cases(ranks_mistakes, ranks=[2], prepare=ranks_mistakes.prepare)


@pytest.mark.parametrize("case", ranks_mistakes.CASES)
def test_mistakes_are_one_sentence_on_every_rank(case, mistaken):
    mistaken(case)


def test_a_mistake_ends_the_job(job):
    done = launch(2, "--module", "ksl_ds", "lottery", "recipe.yaml", "draw.alhpa=.1", cwd=job)
    assert done.returncode != 0
    assert done.stderr.count("ksl-ds: unknown key draw.alhpa; did you mean draw.alpha?") == 1
    assert "Traceback" not in done.stderr
    assert not (job / "run").exists()


def test_an_empty_ticket_says_how_far_it_was(job):
    done = launch(2, "--module", "ksl_ds", "lottery", "recipe.yaml", "embed_tuning.learning_rate=1e-6", cwd=job)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for word in ("largest D", "learning rate", "selection=top_k", "run/checkpoints/embed_tuning"):
        assert word in done.stderr
    assert (job / "run/checkpoints/embed_tuning/config.json").exists()
