"""The model card of a ticket folder, as people and the Hub's library read it."""

from __future__ import annotations

import pytest
from helpers.synthetic_run import STAGES
from helpers.tickets import IDS, random_matrix, shifted
from huggingface_hub import ModelCard

from ksl_ds import Ticket, draw_ticket
from ksl_ds.environment import hardware_and_versions
from ksl_ds.report.card import licence_of, ticket_card


@pytest.fixture
def ticket() -> Ticket:
    before_VD = random_matrix()
    tokens = [f"Ġtoken{number}" for number in range(len(before_VD))]
    tokens[IDS[0]] = "|"
    tokens[IDS[1]] = "\n"
    return draw_ticket(before_VD, shifted(before_VD), tokens=tokens)


def test_a_card_says_what_how_good_how_to_load_and_how_it_was_made(ticket, tmp_path):
    tuned = ticket.with_rows(ticket.rows_KD, stage="partial_tuning", steps=24)
    text = ticket_card(
        tuned,
        base_model="owner/model",
        licence="apache-2.0",
        translates="English to Catalan",
        languages=["en", "ca"],
        stages={name: STAGES[name] for name in ("copying_source", "untuned", "partial_tuning")},
        seed=7,
        environment=hardware_and_versions(),
    )
    tuned.save(tmp_path / "ticket", "model.embed_tokens", card=text)
    card = ModelCard.load(tmp_path / "ticket" / "README.md")
    assert card.data.base_model == "owner/model" and card.data.license == "apache-2.0"
    assert card.data.language == ["en", "ca"] and card.data.library_name == "peft" and "ks-lottery" in card.data.tags
    assert "# 4 embedding rows of owner/model, English to Catalan" in card.text
    lines = card.text.splitlines()
    assert any(line.startswith("| partial tuning | 10,368 | 2.570 | 3.9 |") for line in lines)
    assert any(line.startswith("| copying the source | 0 | – | 2.2 |") for line in lines)
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith(tuple(f"| {number} " for number in IDS))}
    assert len(rows) == 4
    assert f"| {IDS[0]} | \\| |" in rows[f"| {IDS[0]}"] and f"| {IDS[1]} | \\n |" in rows[f"| {IDS[1]}"]
    assert 'from_pretrained("owner/model")' in card.text and "ksl-ds transfer base=owner/model" in card.text
    assert "partial_tuning of 24 steps, seed 7" in card.text and "torch 2" in card.text
    tuned.save(tmp_path / "ticket", "model.embed_tokens", card=text)  # a ticket with its card is replaced
    # The folder is a ticket as before.
    assert Ticket.load(tmp_path / "ticket").token_ids == IDS


def test_what_is_not_known_is_left_out(ticket, tmp_path):
    """A local base model is no name that the Hub knows, and its licence is not guessed."""
    (tmp_path / "base").mkdir()
    text = ticket_card(ticket, base_model=str(tmp_path / "base"), licence=licence_of(tmp_path / "base"))
    card = ModelCard(text)
    assert card.data.base_model is None and card.data.license is None and card.data.language is None
    assert "see there" in card.text and "## Scores" not in card.text


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", "mit"),
        ("---\ntags: [a]\n---\n", None),
        ("# Model\n", None),
        ("---\nlicense: [a\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
    ],
)
def test_the_licence_is_the_base_models(text, licence, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence
