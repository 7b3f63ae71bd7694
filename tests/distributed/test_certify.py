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
from helpers.runs import prepare_job
from helpers.tiny import SENTENCES, make_model_folder, write_model, write_pairs
from helpers.wandb_records import records, summary_of
from sacrebleu.metrics.chrf import CHRF
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksl_ds.certificate.criterion import clopper_pearson
from ksl_ds.certificate.risk import risk_pvalue
from ksl_ds.lottery.pvalues import critical_count
from ksl_ds.lottery.ticket import Ticket, draw_ticket
from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.write_folder import write_model_with_rows
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


def echoed_pairs(folder: Path) -> list[dict[str, str]]:
    """The calibration text with a model's own translations as targets, so that it predicts many of their tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pairs = joined_pairs(5, 11)
    for pair, example in zip(
        pairs, Prompt("plain", "English", "French", tokenizer).encode([Pair(**p) for p in pairs]), strict=True
    ):
        ids = torch.tensor([example.prompt_ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        pair["target"] = " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split()) or "le"
    return pairs


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
    tuned = drawn.with_rows(drawn.rows_KD * -3, stage="partial_tuning")
    tuned.save(folder / "tuned", "model.embed_tokens")
    tuned.save(folder / "comparison/runs/partial_tuning_alpha_0.5-seed0/ticket", "model.embed_tokens")
    tuned.save(folder / "comparison/runs/partial_tuning_alpha_0.5-seed1/ticket", "model.embed_tokens")
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
    (folder / "echo.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in echoed_pairs(folder / "permuted")))
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
    assert [row["alpha"] for row in found["candidates"]] == [0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999]
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
    last = next(row for row in found if row["alpha"] == 0.95)
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


def reference_and_candidate(job: Path, rows: dict[int, torch.Tensor]) -> list:
    """The reference, and the base with these rows."""
    models = [AutoModelForCausalLM.from_pretrained(job / name).eval() for name in ("permuted", "base")]
    with torch.no_grad():
        for number, row_D in rows.items():
            models[1].get_input_embeddings().weight[number] = row_D
    return models


def losses_by_hand(job: Path, rows: dict[int, torch.Tensor], pairs: list[dict[str, str]], lost=False) -> list[float]:
    """The share of each sentence's tokens on which the candidate differs from the reference, or only where that is right."""
    models = reference_and_candidate(job, rows)
    prompt = Prompt("plain", "English", "French", AutoTokenizer.from_pretrained(job / "base"))
    losses = []
    with torch.no_grad():
        for example in prompt.encode([Pair(**pair) for pair in pairs]):
            ids = torch.tensor([example.prompt_ids + example.response_ids])
            at = slice(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            left, right = (model(ids).logits[0, at].argmax(-1) for model in models)
            counted = left == torch.tensor(example.response_ids) if lost else torch.ones_like(left).bool()
            losses.append(float(((left != right) & counted).double().mean()))
    return losses


def chrf_losses_by_hand(job: Path, rows: dict[int, torch.Tensor], pairs: list[dict[str, str]]) -> list[float]:
    """How far each translation's chrF++ falls below that of the reference model's, over 100: transformers and sacrebleu."""
    models = reference_and_candidate(job, rows)
    tokenizer = AutoTokenizer.from_pretrained(job / "base")
    prompt = Prompt("plain", "English", "French", tokenizer)
    chrf = CHRF(word_order=2)
    losses = []
    for pair, example in zip(pairs, prompt.encode([Pair(**pair) for pair in pairs]), strict=True):
        ids = torch.tensor([example.prompt_ids])
        scores = []
        for model in models:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            scores.append(chrf.sentence_score(" ".join(text.split()), [pair["target"]]).score)
        losses.append(max(0.0, (scores[0] - scores[1]) / 100))
    return losses


def test_quality_risks_are_those_of_sentences_by_hand(job):
    permuted = weights(job / "permuted")[EMBEDDING]
    rows = {number: permuted[number] for number in MOVED}
    pairs = [json.loads(line) for line in (job / "echo.jsonl").read_text().splitlines()]
    by_hand = {
        "lost": losses_by_hand(job, rows, pairs, lost=True),
        "chrf": chrf_losses_by_hand(job, rows, pairs),
    }
    for name, losses in by_hand.items():
        found = results(job / f"run_{name}")["certificate"]["risk"]
        (ticket,) = found["sequences"][0]["tickets"]
        assert 0 < ticket["risk"] < 1 and ticket["risk"] == pytest.approx(sum(losses) / 28)
        written = json.loads((job / f"run_{name}/sentence_losses.json").read_text())["valid"][ticket["name"]]
        assert sorted(written) == pytest.approx(sorted(losses))
    assert by_hand["lost"] != losses_by_hand(job, rows, pairs)
    assert found["smallest"] == ticket and "chrF++" in found["sentence"]


def test_tuned_tickets_of_a_comparison_are_a_sequence_of_their_own(job):
    """The ticket of the recipe's seed, with its own rows, as if it had been given."""
    found = results(job / "run_compared")["certificate"]["risk"]
    sequences = {sequence["name"]: sequence for sequence in found["sequences"]}
    assert set(sequences) == {"partial transfer", "tickets compared"}
    assert [sequence["confidence"] for sequence in found["sequences"]] == pytest.approx([0.975, 0.975])
    (ticket,) = sequences["tickets compared"]["tickets"]
    tuned = dict(zip(MOVED, -3 * weights(job / "permuted")[EMBEDDING][MOVED], strict=True))
    losses = losses_by_hand(job, tuned, joined_pairs(5, 11))
    assert ticket["name"] == "partial tuning, alpha 0.5" and ticket["risk"] == pytest.approx(sum(losses) / 28)


def test_a_ticket_that_is_given_beside_a_comparison_with_the_same_one(job):
    """Three sequences; the ticket is tested in two of them, with the same losses."""
    found = results(job / "run_both")["certificate"]["risk"]
    risks = {sequence["name"]: sequence["tickets"][0]["risk"] for sequence in found["sequences"]}
    assert set(risks) == {"partial transfer", "ticket given", "tickets compared"}
    assert risks["ticket given"] == risks["tickets compared"]
    assert [sequence["confidence"] for sequence in found["sequences"]] == pytest.approx([1 - 0.05 / 3] * 3)


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
    p, bound = risk_pvalue(np.array(losses), 0.9, binary=False)
    assert (ticket["p"], ticket["bound"]) == (pytest.approx(float(p)), str(bound))
    assert ticket["certified"] == (float(p) <= 0.025)
    held_out = losses_by_hand(job, rows, joined_pairs(1, 4)[:35])
    assert ticket["held_out_risk"] == pytest.approx(sum(held_out) / 35)
    written = json.loads((job / "run_risk/sentence_losses.json").read_text())["valid"][ticket["name"]]
    assert sorted(written) == pytest.approx(sorted(losses))
    certified = [one for sequence in found["sequences"] for one in sequence["tickets"] if one["certified"]]
    assert (found["smallest"] is None) == (certified == [])
    assert (job / "run_risk/certified_ticket").exists() == bool(certified)
    assert certified
    kept = Ticket.load(job / "run_risk/certified_ticket")
    assert kept.token_ids == MOVED and kept.source["certified"]["epsilon"] == 0.9


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


# ---- within a lottery

CERTIFIED = ["draw.selection=certified", "text.valid=valid.jsonl", "text.test=test.jsonl", "certify.alphas=[.5,.9,.99]"]


def prepare_lottery(folder: Path) -> None:
    prepare_job(folder)
    texts = {"valid": joined_pairs(5, 11), "test": joined_pairs(1, 4)[:30]}
    for name, pairs in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_a_lottery_trains_the_smallest_certified_ticket(tmp_path):
    """Its certificate is the one that certify gives for the finished run; a resumed run keeps the ticket."""
    prepare_lottery(tmp_path)
    words = ["lottery", "recipe.yaml", *CERTIFIED, "certify.epsilon=.7", "resume=auto", "tracking.wandb=offline"]
    done = succeeds(launch(2, "--module", "ksl_ds", *words, cwd=tmp_path))
    found = results(tmp_path / "run")
    risk = found["certificate"]["risk"]
    assert risk["smallest"] is not None and risk["sentence"].split()[-1] in done.stdout
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert "Certified risk/path" in summary_of(list(records(log))), done.stderr[-4000:]
    kept = Ticket.load(tmp_path / "run/certified_ticket")
    largest = Ticket.load(tmp_path / "run/checkpoints/partial_transfer")
    assert kept.alpha == risk["smallest"]["alpha"] and largest.alpha == 0.99
    counts = dict(zip(largest.token_ids, largest.count, strict=True))
    critical = critical_count(largest.num_samples, kept.alpha)
    assert kept.token_ids == [number for number, count in counts.items() if count >= critical]
    assert found["stages"]["partial_tuning"]["trained_parameters"] == len(kept) * 32
    assert Ticket.load(tmp_path / "run/ticket").token_ids == kept.token_ids
    assert "Risk against ticket size" in (tmp_path / "run/report.html").read_text()

    again = ["certify", "recipe.yaml", *CERTIFIED, "certify.epsilon=.7", "run_dir=again"]
    succeeds(run("ksl-ds", *again, "reference=run/checkpoints/embed_tuning", cwd=tmp_path))
    theirs = results(tmp_path / "again")["certificate"]["risk"]
    for ours, other in zip(risk["sequences"][0]["tickets"], theirs["sequences"][0]["tickets"], strict=True):
        assert (ours["name"], ours["rows"], ours["certified"]) == (other["name"], other["rows"], other["certified"])
        assert ours["risk"] == pytest.approx(other["risk"])

    succeeds(launch(2, "--module", "ksl_ds", *words, cwd=tmp_path))
    assert results(tmp_path / "run")["certificate"] == found["certificate"]

    # What cannot be certified ends in a sentence; embed tuning is kept.
    few = launch(2, "--module", "ksl_ds", *words, "certify.epsilon=.001", "run_dir=few", cwd=tmp_path)
    assert few.returncode != 0 and few.stderr.count("No ticket is certified at epsilon 0.001") == 1
    assert "an epsilon of" in few.stderr and "Traceback" not in few.stderr
    assert (tmp_path / "few/checkpoints/embed_tuning/config.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lottery", *CERTIFIED, "text.valid=[]"], "needs text.valid, the calibration text"),
        (["lottery", *CERTIFIED, "text.valid=pairs.jsonl"], "is in text.train or text.test too"),
        (["tune", *CERTIFIED], "draw.selection=certified is a rule of lottery alone"),
        (["lottery", *CERTIFIED, "certify.alphas=[]"], "levels in certify.alphas"),
    ],
)
def test_what_the_rule_certified_needs(tmp_path, words, said):
    prepare_lottery(tmp_path)
    command, *overrides = words
    done = run("ksl-ds", command, "recipe.yaml", *overrides, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count(said) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()
