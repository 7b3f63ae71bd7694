"""The tables and sentences of a comparison of directions, from made-up scores."""

from __future__ import annotations

import json

import pytest
from helpers.tickets import random_matrix

from ksl_ds import draw_ticket
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.lottery.overlap import Overlaps
from ksl_ds.multilingual import tables
from ksl_ds.multilingual.plots import transfer_map
from ksl_ds.multilingual.records import DirectionScore, Kind, MultilingualResults
from ksl_ds.multilingual.runner import rows_to_try
from ksl_ds.report import plots
from ksl_ds.report.records import BootstrapScore, DirectionScores

DIRECTIONS = ["en-ca", "en-es"]


def score(kind: Kind, source: str, direction: str, seed: int, loss: float, bleu: float, p: float | None = None):
    scores = DirectionScores(
        test_loss=loss, bleu=bleu, chrf=20.0, first_line_bleu=bleu, stop_rate=1.0, output_length=9.0
    )
    found = DirectionScore(kind=kind, source=source, direction=direction, seed=seed, scores=scores)
    if p is not None:
        found.test = BootstrapScore(score=bleu, mean=bleu, half_width=1.0, difference=bleu - 5.0, p=p)
    return found


@pytest.fixture
def results() -> MultilingualResults:
    """Two seeds. The other direction's rows gain half of what the own ones do, random rows nothing."""
    scores = []
    for seed in (0, 1):
        for direction, other in (DIRECTIONS, DIRECTIONS[::-1]):
            scores += [
                score(Kind.UNTUNED, "joint", direction, seed, 3.0, 1.0),
                score(Kind.EMBED, direction, direction, seed, 1.5, 8.0),
                score(Kind.TRAINED, direction, direction, seed, 2.0 + seed / 10, 5.0),
                score(
                    Kind.TRAINED, other, direction, seed, 2.5 + seed / 20, 3.0, p=0.01 if direction == "en-ca" else 0.5
                ),
                score(Kind.TRAINED, "random", direction, seed, 3.0, 1.0, p=0.001 if seed else 0.2),
                score(Kind.APPLIED, other, direction, seed, 2.9, 2.0),
            ]
    return MultilingualResults(
        directions=DIRECTIONS,
        seeds=[0, 1],
        tickets={
            "0": {"en-ca": [1, 2, 3], "en-es": [2, 3, 4], "joint": [1]},
            "1": {"en-ca": [1, 2, 9], "en-es": [2, 3, 4], "joint": [1]},
        },
        scores=scores,
        environment=hardware_and_versions(),
        recipe={},
    )


def rows_of(table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.rows}


def test_the_matrices_hold_means_and_stars(results):
    losses = tables.transfer_table(results, "test_loss")
    assert [column.name for column in losses.columns] == ["", *DIRECTIONS]
    assert losses.title == "Test loss on the test text of each direction, mean of 2 seeds"
    rows = rows_of(losses)
    assert rows["untuned"] == ["3.000", "3.000"] and rows["own ticket"] == ["2.050", "2.050"]
    assert rows["rows of en-ca"] == ["2.050", "2.525"] and rows["rows of en-es"] == ["2.525", "2.050"]
    assert rows["tuned on en-ca, as is"] == ["–", "2.900"]
    assert "rows of joint" not in rows and "rows of union" not in rows  # nothing is known of them
    bleu = rows_of(tables.transfer_table(results, "bleu"))
    # A star needs every seed.
    assert bleu["rows of en-es"] == ["3.0*", "5.0"] and bleu["rows of en-ca"] == ["5.0", "3.0"]
    assert bleu["rows of random"] == ["1.0", "1.0"]


def test_the_sentences_say_what_transfers(results):
    overlaps = Overlaps([*DIRECTIONS, "joint"], [frozenset([1, 2, 3]), frozenset([2, 3, 4]), frozenset([1])], 100)
    sentences = tables.readings(results, overlaps)
    assert sentences[0] == (
        "1 of 1 pairs of tickets share more rows than random tickets of their sizes would; 2 rows are in all."
    )
    assert sentences[1:-1] == [
        # (2/4 + 3/3) / 2, and (2/4 + 1/5) / 2
        "Tickets of one direction with two seeds have a Jaccard overlap of 0.750 on average, those of two directions with one "
        "seed 0.350.",
        "Another direction's rows, trained, gain 50 % of what the own ticket gains in test loss (from 50 % to 50 %).",
        "Random rows, trained, gain 0 % of what the own ticket gains in test loss (from 0 % to 0 %).",
        "Another direction's tuned rows, as they are, gain 11 % of what the own ticket gains in test loss (from 11 % to "
        "11 %).",
    ]
    assert sentences[-1] == "BLEU differs significantly from the own ticket's for: en-es on en-ca."


def test_a_heat_map_holds_every_number(results):
    text = plots.svg(transfer_map(results, "test_loss"), "f")
    assert text.count("2.525") == 2 and "tuned on en-ca, as is" in text


def test_results_are_read_as_they_were_written(results):
    text = results.to_json()
    again = MultilingualResults.from_json(text, "results.json")
    assert again.to_json() == text and again.mean(Kind.TRAINED, "en-ca", "en-es", "test_loss") == 2.525
    changed = json.loads(text)
    changed["scores"][0]["kind"] = "unknown"
    with pytest.raises(UserError, match=r"results.json: scores.0.kind: "):
        MultilingualResults.from_json(json.dumps(changed), "results.json")


def test_rows_to_try_are_those_of_the_tickets():
    before_VD = random_matrix()
    tickets = {}
    for name, ids in {"en-ca": [3, 4, 5], "en-es": [4, 5, 6, 7], "joint": [4, 9]}.items():
        after_VD = before_VD.clone()
        after_VD[ids] += 3
        tickets[name] = draw_ticket(before_VD, after_VD)
    rows = rows_to_try(tickets, DIRECTIONS, "en-ca", seed=0)
    assert rows["en-es"] == [4, 5, 6, 7] and rows["joint"] == [4, 9]
    assert rows["union"] == [3, 4, 5, 6, 7] and rows["intersection"] == [4, 5]
    assert len(rows["random"]) == 3 and rows["random"] != rows_to_try(tickets, DIRECTIONS, "en-ca", seed=1)["random"]
