"""Tables of stages and tickets as people see them: in a file, in a narrow terminal, with hostile tokens."""

from __future__ import annotations

import io
import math
import re

import pytest
from helpers.synthetic_run import STAGES, scores

from ksl_ds import distributed
from ksl_ds.report import tables
from ksl_ds.report.tables import print_table, stage_table, ticket_rows, ticket_table, visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Latin(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def printed(table: tables.Table, file: io.TextIOBase | None = None) -> str:
    file = file or io.StringIO()
    print_table(table, file)
    file.seek(0)
    return file.read()


def cells(table: tables.Table, row: str) -> list[str]:
    return next(line[1:] for line in table.rows if line[0] == row)


def some_tokens(tokens: list[str], **more) -> list[dict]:
    count = [50 - index for index in range(len(tokens))]
    return ticket_rows(
        list(range(len(tokens))),
        tokens,
        count,
        [k / 576 for k in count],
        [1e-9] * len(tokens),
        [0.5] * len(tokens),
        **more,
    )


def test_stage_rows_are_in_the_methods_order_whatever_order_results_json_has():
    table = stage_table(dict(sorted(STAGES.items())) | {"lora": scores(bleu=1.0)})
    assert [row[0] for row in table.rows] == [
        "copying the source",
        "untuned",
        "embed tuning",
        "partial transfer",
        "partial tuning",
        "lora",
    ]


def test_stage_cells_show_numbers_as_people_write_them_and_dashes_for_what_is_missing():
    table = stage_table(STAGES)
    assert cells(table, "embed tuning") == [
        "28,311,552",
        "2.000",
        "8.3",
        "31.7",
        "8.3",
        "0.95",
        "14.2",
        "6 min 43 s",
        "2.42 GiB",
    ]
    assert cells(table, "copying the source") == ["0", "–", "2.2", "26.7", "2.2", "1.00", "11.9", "–", "–"]
    assert cells(stage_table({"untuned": scores(bleu=math.nan, test_loss=math.inf)}), "untuned") == ["–"] * 9


def test_a_file_gets_every_column_in_full_and_no_colour_codes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = printed(stage_table(STAGES))
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if "embed tuning" in line)
    assert " ".join(line.split()) == "embed tuning 28,311,552 2.000 8.3 31.7 8.3 0.95 14.2 6 min 43 s 2.42 GiB"


@pytest.mark.parametrize(("columns", "shown"), [(80, 6), (98, 7), (200, 9)])
def test_a_narrow_terminal_loses_optional_columns_from_the_right_never_digits(monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(stage_table(STAGES), Terminal()))
    assert max(map(len, text.splitlines())) <= columns
    line = next(line for line in text.splitlines() if "embed tuning" in line)
    expected = ["28,311,552", "2.000", "8.3", "31.7", "8.3", "0.95", "14.2", "6 min 43 s", "2.42 GiB"][:shown]
    assert " ".join(line.split()) == " ".join(["embed tuning", *expected])


def test_only_rank_0_prints(monkeypatch):
    monkeypatch.setattr(distributed, "is_rank0", lambda: False)
    assert printed(stage_table(STAGES)) == ""


def test_tokens_show_what_is_invisible_and_are_no_markup():
    tokens = ["Ċ", "Ġthe", "[/INST]", " a\nb\t", "\x1b[31mred", "\u200f", "", ":smile:", "日本"]
    table = ticket_table(some_tokens(tokens))
    assert [row[1] for row in table.rows] == [
        "Ċ",
        "Ġthe",
        "[/INST]",
        "␣a\\nb\\t",
        "\\x1b[31mred",
        "\\u200f",
        "–",
        ":smile:",
        "日本",
    ]
    text = printed(table)
    assert all(row[1] in text for row in table.rows)
    assert "Ġ and ▁ stand for a space, Ċ for a newline, ␣ is a space" in text


def test_signs_that_do_not_occur_are_not_explained():
    assert not any("stand for" in note for note in ticket_table(some_tokens(["the"])).notes)


def test_an_output_that_lacks_the_signs_still_gets_its_table():
    text = printed(ticket_table(some_tokens(["Ġthe", "日本"])), Latin())
    assert "?the" in text and text.isascii()


def test_ticket_rows_come_largest_d_first_and_a_limit_says_what_it_hides():
    rows = some_tokens(list("abcdef"))[::-1]
    table = ticket_table(rows, limit=2)
    assert [row[1] for row in table.rows] == ["a", "b"]
    assert any("ticket.json lists all 6" in note for note in table.notes)
    assert "6 embedding rows" in table.title
    assert not any("ticket.json" in note for note in ticket_table(rows).notes)


def test_ticket_cells():
    row = ticket_rows([13], ["Ċ"], [47], [47 / 576], [0.0493217], [0.81], [12345])
    table = ticket_table(row)
    assert table.rows == [["13", "Ċ", "47", "0.0816", "4.9e-02", "0.810", "12,345"]]
    assert "in training text" not in [column.name for column in ticket_table(some_tokens(["a"])).columns]
    assert table.title == "The ticket: 1 embedding row"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (45.2, "45 s"), (59.7, "1 min 00 s"), (3599.6, "1 h 00 min"), (7391, "2 h 03 min")],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_probabilities_that_underflow_are_not_shown_as_zero():
    assert tables.probability(0.0) == "< 1e-300"
    assert tables.probability(4.2e-17) == "4.2e-17"
    assert tables.probability(None) == "–"


def test_visible_keeps_the_letters_of_every_script():
    assert visible("▁mañana语עברית") == "▁mañana语עברית"
