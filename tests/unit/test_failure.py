"""What a command says when something happens that nobody foresaw."""

from __future__ import annotations

import pytest

from ksl_ds import cli, failure, files
from ksl_ds.errors import UserError, one_line, reason_of

DRAW = ["draw", "before=a", "after=b", "out=c"]


@pytest.fixture
def failing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def fail_with(error: BaseException) -> None:
        def on_ranks(*_: object) -> None:
            def train(stage: str) -> None:
                raise error

            train("elsewhere")

        monkeypatch.setattr(cli, "_on_ranks", on_ranks)

    return fail_with


def test_one_line_and_the_traceback_in_a_file(failing, tmp_path, capsys):
    failing(ZeroDivisionError("of two\nlines"))
    assert cli.main(DRAW) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("ksl-ds: draw failed, rank 0 on ")
    assert said.endswith("ZeroDivisionError: of two lines (traceback in ksl-ds-error-rank-0.txt)\n")
    text = (tmp_path / "ksl-ds-error-rank-0.txt").read_text()
    assert "Traceback" in text and "in train" in text and "of two\nlines" in text


def test_verbose_prints_the_traceback(failing, capsys):
    failing(ZeroDivisionError("mine"))
    assert cli.main([*DRAW, "verbose=true"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_has_begun_keeps_the_traceback_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert failure._write("error.txt", "text", tmp_path / "run") is not None
    assert list((tmp_path / "run").iterdir()) == []  # the folder of a new run must stay empty
    (tmp_path / "run/recipe.yaml").touch()
    assert failure._write("error.txt", "text", tmp_path / "run") == tmp_path / "run/error.txt"


def test_where_nothing_can_be_written_the_traceback_is_printed(failing, monkeypatch, capsys):
    def full(path: object, text: str) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(files, "write_text", full)
    failing(ZeroDivisionError())
    assert cli.main(DRAW) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("ZeroDivisionError (traceback above)\n")


def test_a_sentence_is_one_line_of_bearable_length():
    assert one_line("a\n  b") == "a b"
    cut = one_line("x" * 5000 + "; do this")
    assert len(cut) < 2100 and cut.endswith("; do this")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("nothing"), "unknown or missing key 'nothing'"),
        (ValueError("wrong field:\n    TypeError: expected int"), "wrong field: expected int"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("a" * 1000), "a" * 300),
    ],
)
def test_what_a_library_says_becomes_part_of_a_sentence(error, said):
    assert reason_of(error) == said


def test_ctrl_c_is_one_line(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(DRAW) == 130
    assert capsys.readouterr().err == "ksl-ds: interrupted\n"
