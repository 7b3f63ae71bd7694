"""One run of several directions: a joint ticket, and scores of every direction."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from helpers.processes import launch, run, succeeds
from helpers.tiny import SENTENCES

DIRECTIONS = ("en-fr", "fr-en")
WORDS = [
    "text.directions=[en-fr, fr-en]", "text.train=data/{direction}.train.jsonl", "text.test=data/{direction}.test.jsonl",
    "text.valid=[]", "text.mixing=uniform", "draw.selection=top_k", "draw.top_k=9", "draw.alpha=.5",
]  # fmt: skip
SCORES = ("test_loss", "bleu", "chrf", "first_line_bleu", "stop_rate", "output_length")


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"translation": {"en": en, "fr": fr}}) + "\n" for en, fr in rows))


@pytest.fixture
def directions(job: Path) -> Path:
    """WMT's rows for two directions of different size; one of the test sentences is trained on."""
    (job / "data").mkdir()
    for name, trained in {"en-fr": SENTENCES[:8], "fr-en": SENTENCES[:3]}.items():
        write(job / f"data/{name}.train.jsonl", trained)
        write(job / f"data/{name}.test.jsonl", SENTENCES[7:])
    return job


def test_a_joint_run_scores_every_direction_and_draws_one_ticket(directions):
    command = ("--module", "ksl_ds", "lottery", "recipe.yaml", *WORDS)
    done = succeeds(launch(2, *command, cwd=directions))
    results = json.loads((directions / "run/results.json").read_text())
    assert results["text"]["train"]["directions"] == {"en-fr": 8, "fr-en": 8}
    assert results["text"]["test"]["directions"] == {"en-fr": 4, "fr-en": 5}
    assert results["text"]["test"]["dropped"] == {"whose source is in the training text": 1}
    for scores in [*results["stages"].values(), *results["baselines"].values()]:
        assert list(scores["directions"]) == list(DIRECTIONS)
        for score in SCORES:
            values = [of[score] for of in scores["directions"].values()]
            assert scores[score] == (None if None in values else pytest.approx(fmean(values)))
    losses = [of["test_loss"] for of in results["stages"]["untuned"]["directions"].values()]
    assert losses[0] != losses[1]
    logged = [json.loads(line) for line in (directions / "run/metrics.jsonl").read_text().splitlines()]
    assert any("fr-en/bleu" in line for line in logged)
    assert "Scores by direction" in done.stdout and "fr-en" in done.stdout
    page = (directions / "run/report.html").read_text()
    assert "Test loss and BLEU by direction" in page and "2 directions (en-fr, fr-en)" in page

    # One rank draws the same ticket, and a run of one direction scores it as this one did.
    succeeds(launch(1, *command, "run_dir=alone", cwd=directions))
    tickets = [json.loads((directions / name / "ticket/ticket.json").read_text()) for name in ("run", "alone")]
    assert tickets[0]["token_ids"] == tickets[1]["token_ids"]
    words = [*WORDS, "ticket=run/ticket", "text.directions=[fr-en]", "run_dir=one", "text.train=[]"]
    succeeds(run("ksl-ds", "evaluate", "recipe.yaml", *words, cwd=directions))
    one = json.loads((directions / "one/results.json").read_text())["stages"]["ticket"]
    of_both = results["stages"]["partial_tuning"]["directions"]["fr-en"]
    assert one["directions"]["fr-en"]["test_loss"] == pytest.approx(of_both["test_loss"], rel=1e-5)
    assert one["bleu"] == pytest.approx(of_both["bleu"])


def test_a_mistake_in_one_direction_is_one_sentence_on_all_ranks(directions):
    (directions / "data/fr-en.train.jsonl").unlink()
    done = launch(2, "--module", "ksl_ds", "lottery", "recipe.yaml", *WORDS, cwd=directions)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.count("ksl-ds: fr-en: text.train: no file data/fr-en.train.jsonl") == 1
    assert not (directions / "run").exists()
