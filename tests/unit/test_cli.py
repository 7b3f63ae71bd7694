"""The grammar of the command line: what is accepted, what is refused, and with which sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ksl_ds import cli


@pytest.fixture
def called(monkeypatch):
    """What `_on_ranks` was called with; no process group is made."""
    calls: list[tuple] = []
    monkeypatch.setattr(cli, "_on_ranks", lambda *arguments: calls.append(arguments))
    return calls


def test_a_recipe_and_keys(called, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: run\nmodel: {path: model}\ntext: {train: a.jsonl, test: b.jsonl}\n")
    assert cli.main(["--local_rank=1", "lottery", str(recipe), "draw.alpha=.25", "--local_rank=0", "seed=3"]) == 0
    ((command, loaded, file),) = called
    assert (command, loaded.draw.alpha, loaded.seed, file) == ("lottery", 0.25, 3, str(recipe))


def test_keys_without_a_recipe(called):
    assert cli.main(["draw", "before=a", "after=b", "out=c"]) == 0
    ((command, loaded, file),) = called
    assert (command, loaded.before, loaded.after, loaded.out, file) == ("draw", "a", "b", "c", None)


def test_the_first_word_of_estimate_is_a_model(called):
    assert cli.main(["estimate", "llama-3-70b", "gpus=64"]) == 0
    assert cli.main(["estimate", "gpus=64", "model=llama-3-70b"]) == 0
    assert [(loaded.model, loaded.gpus, file) for _, loaded, file in called] == [("llama-3-70b", 64, None)] * 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lotery"], "invalid choice: 'lotery'"),
        (["draw", "--before", "a"], "unrecognized arguments: --before; see ksl-ds --help"),
        (["draw", "before=a", "b"], "'b' is not of the form key=value"),
        (["lottery"], "must be given"),
        (["inspect"], "the following arguments are required: TICKET; see ksl-ds inspect --help"),
        (["inspect", "a", "--limit", "few"], "argument --limit: invalid int value: 'few'"),
        (["inspect", "a", "--lim", "3"], "unrecognized arguments: --lim 3"),
        (["compare", "--from", "a.json", "b.json"], "takes the results.json of one comparison"),
        (["tune", "--from", "a.json"], "unrecognized arguments: --from"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, sentence, capsys, called):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ksl-ds: ") and err.count("\n") == 1 and sentence in err
    assert called == []


def test_another_rank_prints_no_mistake(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["tune", "--help"], ["--version"]])
def test_help_loads_neither_torch_nor_deepspeed(words):
    check = f"import sys; from ksl_ds import cli; code = cli.main({words}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False" and done.stderr == ""
    assert len(done.stdout.splitlines()) > 1


def test_completion_knows_the_commands(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli.COMMANDS) and "--published" in script
