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


def test_every_ticket_is_tried_on_every_direction(directions):
    """Stopped in the midst, continued, and complete: 1 rank and 2 ranks would draw the same tickets (see above)."""
    words = [*WORDS, "multilingual.seeds=[0]", "embed_tuning.max_steps=4", "partial_tuning.max_steps=4", "draw.top_k=5"]
    command = ("--module", "ksl_ds", "multilingual", "recipe.yaml", *words)
    done = succeeds(launch(2, *command, cwd=directions))
    home = directions / "run"
    results = json.loads((home / "results.json").read_text())
    tickets = results["tickets"]["0"]
    assert list(tickets) == [*DIRECTIONS, "joint"] and all(len(ids) == 5 for ids in tickets.values())
    found = {(of["kind"], of["source"], of["direction"]): of["scores"] for of in results["scores"]}
    for source in (*DIRECTIONS, "joint", "union", "intersection", "random"):
        for direction in DIRECTIONS:
            empty = source == "intersection" and not set(tickets["en-fr"]) & set(tickets["fr-en"])
            assert (("trained", source, direction) in found) is not empty
    assert sum(kind == "applied" for kind, _, _ in found) == 3 * 2

    # Each number is that of its own run; the rows are those that it says.
    for direction, other in (DIRECTIONS, DIRECTIONS[::-1]):
        run_dir = home / f"runs/{other}-for-{direction}-seed0"
        assert json.loads((run_dir / "ticket/ticket.json").read_text())["token_ids"] == tickets[other]
        stage = json.loads((run_dir / "results.json").read_text())["stages"]["partial_tuning"]
        assert found["trained", other, direction] == stage["directions"][direction]
        union = json.loads((home / f"runs/union-for-{direction}-seed0/ticket/ticket.json").read_text())["token_ids"]
        assert union == sorted({*tickets["en-fr"], *tickets["fr-en"]})
        applied = found["applied", direction, direction]["test_loss"]
        assert applied == pytest.approx(found["trained", direction, direction]["test_loss"], rel=1e-5)
    for text in (
        "What the tickets share",
        "Test loss on the test text",
        "rows of union",
        "The joint ticket's rows, trained, gain",
    ):
        assert text in " ".join(done.stdout.split())
    assert (home / "report.html").read_text().count("<svg") == 3

    # A part that is gone is run again, and nothing else.
    times = {path: path.stat().st_mtime_ns for path in home.glob("runs/*/results.json")}
    gone = home / "runs/random-for-fr-en-seed0/results.json"
    gone.unlink()
    again = succeeds(launch(2, *command, cwd=directions))
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {gone}
    assert json.loads((home / "results.json").read_text())["scores"] == results["scores"]
    assert again.stderr.count("found in") == len(times) - 1

    other = launch(2, *command, "partial_tuning.max_steps=5", cwd=directions)
    assert other.returncode != 0 and "Traceback" not in other.stderr
    assert "holds a run of another recipe: partial_tuning.max_steps is 4 there and 5 here" in other.stderr
    one = launch(1, *command, "text.directions=[en-fr]", "run_dir=one", cwd=directions)
    assert "text.directions is ['en-fr']; name at least two" in one.stderr
