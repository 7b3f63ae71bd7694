"""`ksl-ds certify` as a real job, on models of which it is known by construction how far they agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.html_requests import Page
from helpers.processes import launch, run, succeeds
from helpers.tiny import SENTENCES, make_model_folder, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksl_ds.certificate.criterion import clopper_pearson
from ksl_ds.certificate.risk import risk_pvalue
from ksl_ds.lottery.pvalues import critical_count
from ksl_ds.lottery.ticket import Ticket, draw_ticket
from ksl_ds.model.folder import ModelFolder, write_model, write_model_with_rows
from ksl_ds.text.corpus import Pair
from ksl_ds.text.prompt import Prompt

HERE = Path(__file__).parent
RECIPE = """
run_dir: run
deepspeed: ds.json
model: {path: base}
text: {train: pairs.jsonl, test: test.jsonl}
training: {batch_size: 8, micro_batch_size: 2, precision: fp32}
evaluation: {batch_size: 4}
tracking: {wandb: "off"}
"""
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MOVED = [96, 97, 98, 99]  # rows whose distribution shifts: the ticket at every alpha; they stand in every prompt
PERMUTED = list(range(44, 96))  # rows with D = 0 that mean something else: what no KS test sees


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def joined_pairs(first: int, last: int) -> list[dict[str, str]]:
    """Each sentence joined with those that stand `first` to `last` places behind it."""
    return [
        {"source": f"{one[0]} {other[0]}", "target": f"{one[1]} {other[1]}"}
        for number, one in enumerate(SENTENCES)
        for other in SENTENCES[number + first : number + last + 1]
    ]


def write_test_text(path: Path) -> None:
    """35 pairs of joined sentences, and one pair of the training text."""
    joined = joined_pairs(1, 4)
    trained = {"source": SENTENCES[3][0], "target": SENTENCES[3][1]}
    path.write_text("".join(json.dumps(pair) + "\n" for pair in [*joined[:35], trained]))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A base whose predictions are sharp, references made from it by hand, tickets, text, and every mistake."""
    folder = tmp_path_factory.mktemp("certify")
    make_model_folder(folder / "random")
    random = ModelFolder(folder / "random")
    write_model(random, folder / "base", {HEAD: weights(folder / "random")[HEAD] * 40})
    base, rows_VD = ModelFolder(folder / "base"), weights(folder / "base")[EMBEDDING]
    moved_VD = rows_VD.clone()
    moved_VD[MOVED] += 0.1
    permuted_VD = moved_VD.clone()
    permuted_VD[PERMUTED] = permuted_VD[PERMUTED][:, torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    everything = list(range(len(rows_VD)))
    for name, after_VD in {"moved": moved_VD, "permuted": permuted_VD}.items():
        write_model_with_rows(base, folder / name, everything, after_VD, "input")

    drawn = draw_ticket(rows_VD, permuted_VD, alpha=0.5)
    assert drawn.token_ids == MOVED
    drawn.with_rows(drawn.rows_KD * -3, stage="partial_tuning").save(folder / "tuned", "model.embed_tokens")
    top = draw_ticket(rows_VD, permuted_VD, selection="top_k", top_k=2)
    top.save(folder / "top", "model.embed_tokens")
    draw_ticket(moved_VD + 1, permuted_VD, alpha=0.5).save(folder / "other", "model.embed_tokens")

    make_model_folder(folder / "vocabulary", vocab_size=len(rows_VD) + 1)
    shutil.copytree(folder / "moved", folder / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["chat"], vocabulary["chien"] = vocabulary["chien"], vocabulary["chat"]
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    name = "model.layers.1.mlp.up_proj.weight"
    write_model(base, folder / "full", {EMBEDDING: moved_VD, name: weights(folder / "base")[name] + 0.01})
    make_model_folder(folder / "tied", tied=True)
    tied = ModelFolder(folder / "tied")
    write_model_with_rows(tied, folder / "tied_moved", MOVED, moved_VD[MOVED], "shared")
    tied_VD = weights(folder / "tied")[EMBEDDING]
    draw_ticket(tied_VD, tied_VD + 1, selection="top_k").save(folder / "of_tied", "model.embed_tokens")

    write_pairs(folder / "pairs.jsonl")
    write_test_text(folder / "test.jsonl")
    # The calibration text: 28 pairs of its own, and one that is tested too.
    calibration = [*joined_pairs(5, 11), joined_pairs(1, 4)[0]]
    (folder / "valid.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in calibration))
    (folder / "ds.json").write_text(json.dumps(ZERO3))
    (folder / "recipe.yaml").write_text(RECIPE)
    succeeds(launch(2, HERE / "ranks_certify.py", cwd=folder))
    return folder


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "results.json").read_text())


def counterexamples(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "counterexamples.jsonl").read_text().splitlines()]


def by_hand(job: Path, reference: str, rows: dict[int, torch.Tensor], count: int) -> dict:
    """The measurement without batches, ranks or ksl_ds: transformers' models, a sentence at a time."""
    models = [AutoModelForCausalLM.from_pretrained(job / name).eval() for name in (reference, "base")]
    with torch.no_grad():
        for number, row_D in rows.items():
            models[1].get_input_embeddings().weight[number] = row_D
    prompt = Prompt("plain", "English", "French", AutoTokenizer.from_pretrained(job / "base"))
    pairs = [json.loads(line) for line in (job / "test.jsonl").read_text().splitlines()][:35]
    tokens = certified = certified_agree = by_union = agree = whole = 0
    for example in prompt.encode([Pair(**pair) for pair in pairs]):
        ids, same = example.prompt_ids + example.response_ids, []
        with torch.no_grad():
            left, right = (model(torch.tensor([ids])).logits[0].softmax(-1) for model in models)
        for at in range(len(example.prompt_ids), len(ids)):
            p_A, p_B = left[at - 1].sort(descending=True).values[:2].tolist()
            same.append(int(left[at - 1].argmax()) == int(right[at - 1].argmax()))
            holds = (p_A - p_B) / 2 > count / 32
            certified += holds
            certified_agree += holds and same[-1]
            by_union += (p_A - p_B) / 2 > sum(token not in rows for token in ids[:at]) * count / 32
        tokens, agree, whole = tokens + len(same), agree + sum(same), whole + all(same)
    return {"tokens": tokens, "certified": certified, "certified_agree": certified_agree} | {
        "by_union": by_union,
        "agree": agree,
        "whole": whole,
    }


def test_a_candidate_that_is_the_reference_agrees_throughout(job):
    """Rows outside the ticket are the reference's too: the same model, so every token agrees, to the bit."""
    found = results(job / "run_same")["certificate"]
    assert found["sentences_left_out_as_trained"] == 1 and found["num_samples"] == 32
    assert [row["alpha"] for row in found["candidates"]] == [0.05, 0.25, 0.5, 0.75, 0.95]
    for row in found["candidates"]:
        assert row["ticket_rows"] == len(MOVED)
        assert row["tau"] == critical_count(32, row["alpha"]) / 32
        assert row["overall"]["agreement"] == 1 and row["overall"]["agreeing_sentences"] == 35
        assert row["overall"]["interval"] == pytest.approx(clopper_pearson(35, 35))
    shares = [row["reconstructed"]["share"] for row in found["candidates"]]
    assert 0 < shares[0] < shares[-1] < 1 and shares == sorted(shares)
    assert counterexamples(job / "run_same") == []


def test_what_no_ks_test_sees_is_found_and_shown(job):
    """Permuted rows have D = 0: certified, and wrong. The measurement says so, with the text."""
    found = results(job / "run_permuted")["certificate"]["candidates"]
    permuted = weights(job / "permuted")[EMBEDDING]
    last = found[-1]
    assert last["ticket_rows"] == len(MOVED) and last["critical_count"] == last["tau_count"] == critical_count(32, 0.95)
    expected = by_hand(job, "permuted", {number: permuted[number] for number in MOVED}, last["tau_count"])
    assert last["overall"]["tokens"] == expected["tokens"] and last["overall"]["agreeing"] == expected["agree"]
    assert last["overall"]["agreeing_sentences"] == expected["whole"]
    assert last["reconstructed"]["tokens"] == expected["certified"]
    assert last["reconstructed"]["agreeing"] == expected["certified_agree"] < expected["certified"]
    assert last["reconstructed_union_bound"]["tokens"] == expected["by_union"]

    examples = [line for line in counterexamples(job / "run_permuted") if line["candidate"].endswith("0.95")]
    assert len(examples) == expected["certified"] - expected["certified_agree"]
    margins = [line["p_A"] - line["p_B"] for line in examples]
    assert margins == sorted(margins, reverse=True) and margins[-1] > 2 * last["tau"]
    tokenizer = AutoTokenizer.from_pretrained(job / "base")
    targets = {
        pair["source"]: pair["target"] for pair in map(json.loads, (job / "test.jsonl").read_text().splitlines())
    }
    for line in examples:
        assert line["by_reconstructed"] and line["reference_token"] != line["candidate_token"]
        assert targets[line["source"]].startswith(line["prefix"])
        assert tokenizer.decode([line["reference_token_id"]]) == line["reference_token"]
    page = Page((job / "run_permuted/report.html").read_text())
    text = " ".join(word for piece in page.text for word in piece.split())
    assert page.requests == [] and page.tags.count("figure") == 1
    assert "does not hold on this model" in text and examples[0]["source"] in text
    assert "left out, since their source is in text.train" in text


def test_numbers_do_not_depend_on_ranks_nor_on_how_weights_are_held(job):
    words = ["recipe.yaml", "reference=permuted", "run_dir=run_one"]
    done = succeeds(run("ksl-ds", "certify", *words, cwd=job))
    for word in ("reported:", "reconstructed:", "measured:", "run_one/report.html"):
        assert word in done.stdout
    assert "1 test sentences left out" in done.stderr and "left out" not in done.stdout
    one = results(job / "run_one")["certificate"]
    for name in ("permuted", "layerwise"):
        assert results(job / f"run_{name}")["certificate"] == one
        for line, other in zip(counterexamples(job / "run_one"), counterexamples(job / f"run_{name}"), strict=True):
            for key in ("p_A", "p_B", "candidate_p_A"):
                assert line.pop(key) == pytest.approx(other.pop(key), rel=1e-4)
            assert line == other


def test_a_given_ticket_is_compared_with_its_own_rows(job):
    given, *grid = results(job / "run_given")["certificate"]["candidates"]
    assert [row["alpha"] for row in grid] == [0.5, 0.95]  # its own is added
    assert given["given"] and given["candidate"] == "partial_tuning" and given["alpha"] == 0.5
    assert given["ticket_rows"] == len(MOVED) and given["tokens_of_other_count"] == 0
    tuned = dict(zip(MOVED, -3 * weights(job / "permuted")[EMBEDDING][MOVED], strict=True))
    expected = by_hand(job, "permuted", tuned, critical_count(32, 0.5))
    assert given["tau_count"] == critical_count(32, 0.5)
    assert (
        given["overall"]["agreeing"] == expected["agree"] and given["reconstructed"]["tokens"] == expected["certified"]
    )
    assert given["overall"] != grid[0]["overall"]
    assert results(job / "run_stage2")["certificate"] == results(job / "run_given")["certificate"]


def test_a_ticket_that_no_alpha_drew_and_too_few_sentences(job):
    """tau is then the smallest D that no row outside reaches: here the D of the moved rows that it lacks."""
    (row,) = results(job / "run_few")["certificate"]["candidates"]
    outside = [
        number for number in MOVED if number not in json.loads((job / "top/ticket.json").read_text())["token_ids"]
    ]
    assert row["selection"] == "top_k" and row["alpha"] is row["critical_count"] is None and len(outside) == 2
    counts = draw_ticket(weights(job / "base")[EMBEDDING], weights(job / "permuted")[EMBEDDING], alpha=0.5).count_V
    assert row["tau_count"] == max(counts[outside]) + 1
    assert row["overall"]["interval"] is None and row["overall"]["sentences"] == 5
    page = " ".join(" ".join(Page((job / "run_few/report.html").read_text()).text).split())
    assert "No intervals: 5 sentences are too few" in page and "no alpha drew it" in page


def losses_by_hand(job: Path, rows: dict[int, torch.Tensor], pairs: list[dict[str, str]]) -> list[float]:
    """The share of each sentence's tokens on which the base with these rows differs from the reference."""
    models = [AutoModelForCausalLM.from_pretrained(job / name).eval() for name in ("permuted", "base")]
    prompt = Prompt("plain", "English", "French", AutoTokenizer.from_pretrained(job / "base"))
    losses = []
    with torch.no_grad():
        for number, row_D in rows.items():
            models[1].get_input_embeddings().weight[number] = row_D
        for example in prompt.encode([Pair(**pair) for pair in pairs]):
            ids = torch.tensor([example.prompt_ids + example.response_ids])
            at = slice(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            left, right = (model(ids).logits[0, at].argmax(-1) for model in models)
            losses.append(float((left != right).double().mean()))
    return losses


def test_risk_is_certified_on_the_calibration_text(job):
    """Losses are those of sentences by hand, p-values those of the pure functions, the ticket is the reference's rows."""
    found = results(job / "run_risk")["certificate"]["risk"]
    assert found["sentences"] == 28 and found["held_out_sentences"] == 35
    text = results(job / "run_risk")["text"]["valid"]
    assert text["dropped"] == {"since their source is in text.train or text.test": 1}
    (given, transfer) = sorted(found["sequences"], key=lambda sequence: sequence["name"] != "ticket given")
    assert given["confidence"] == transfer["confidence"] == pytest.approx(1 - 0.05 / 2)
    (ticket,) = transfer["tickets"]  # both alphas draw the same rows
    permuted = weights(job / "permuted")[EMBEDDING]
    rows = {number: permuted[number] for number in MOVED}
    losses = losses_by_hand(job, rows, joined_pairs(5, 11))
    assert ticket["rows"] == len(MOVED) and ticket["risk"] == pytest.approx(sum(losses) / 28)
    p, bound = risk_pvalue(np.array(losses), 0.6, binary=False)
    assert (ticket["p"], ticket["bound"]) == (pytest.approx(float(p)), str(bound))
    assert ticket["certified"] == (float(p) <= 0.025)
    held_out = losses_by_hand(job, rows, joined_pairs(1, 4)[:35])
    assert ticket["held_out_risk"] == pytest.approx(sum(held_out) / 35)
    written = json.loads((job / "run_risk/sentence_losses.json").read_text())["valid"][ticket["name"]]
    assert sorted(written) == pytest.approx(sorted(losses))
    certified = [one for sequence in found["sequences"] for one in sequence["tickets"] if one["certified"]]
    assert (found["smallest"] is None) == (certified == [])
    assert (job / "run_risk/certified_ticket").exists() == bool(certified)
    if certified:
        kept = Ticket.load(job / "run_risk/certified_ticket")
        assert kept.token_ids == MOVED and kept.source["certified"]["epsilon"] == 0.6


def test_a_reference_without_other_rows_is_certified_whole(job):
    """No sentence differs: (1 - .2) ** 28 is below .05, and the ticket that is written is the reference's rows."""
    found = results(job / "run_sentence")["certificate"]["risk"]
    (sequence,) = found["sequences"]
    (ticket,) = sequence["tickets"]
    assert ticket["risk"] == 0 and ticket["p"] == pytest.approx(0.8**28) and ticket["bound"] == "binomial"
    assert ticket["certified"] and found["smallest"] == ticket and "With 95% confidence" in found["sentence"]
    kept = Ticket.load(job / "run_sentence/certified_ticket")
    assert kept.token_ids == MOVED and torch.equal(kept.rows_KD, weights(job / "moved")[EMBEDDING][MOVED])
    page = (job / "run_sentence/report.html").read_text()
    assert "Certified risk" in page and "Risk against ticket size" in page
    assert "risk" not in (results(job / "run_same")["certificate"]["risk"] or {})  # without a calibration text
