"""The corpus of LibreOffice's help: which paragraphs are taken, how files are split, what is written down about them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.processes import REPOSITORY

from ksl_ds.text.corpus import Pair

SCRIPT = REPOSITORY / "launch" / "libreoffice_corpus.py"
# id: (attributes, English, French)
TAKEN = {
    "a": ("", "Opens the <span class='emph'>Find</span> toolbar&nbsp;again.", "Ouvre à nouveau la barre Rechercher."),
    "b": ("", "Is the file\n <b>really</b> saved?", "Le fichier est-il vraiment enregistré ?"),
}
NOT_TAKEN = {
    "menu": ("", "Choose Tools - Options - Writer now.", "Choisissez Outils - Options - Writer maintenant."),
    "arrow": ("", "Choose Format ▸ Page Style first.", "Choisissez d'abord Format ▸ Style de page."),
    "same": ("", "This was never translated at all.", "This was never translated, at all!"),
    "short": ("", "Saves the file.", "Enregistre le fichier."),
    "long": ("", "word " * 41 + ".", "mots " * 20 + "."),
    "two": ("", "Click the cell. Press Enter then.", "Cliquez sur la cellule. Appuyez sur Entrée."),
    "half": ("", "On the Standard bar, click", "Dans la barre Standard, cliquez sur"),
    "image": ("", "Click the <img src='x.png'> icon to save.", "Cliquez sur l'icône <img src='x.png'> pour finir."),
    "system": (
        "",
        "Choose <span id='s'><span hidden='true'>Options</span></span> to see it.",
        "Choisissez <span id='s'><span hidden='true'>Options</span></span> pour le voir.",
    ),
    "code": ("class='codeintable'", "Dim a As Integer is here.", "Dim a As Integer est ici."),
    "": ("", "Nobody can align this one here.", "Personne ne peut aligner celle-ci."),
}


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is started by name
    try:
        spec = importlib.util.spec_from_file_location("libreoffice_corpus", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPT.parent))


def page(paragraphs: dict, side: int) -> str:
    parts = [
        f"<p {name and f'id={name!r}'} {texts[0]} dir='auto'>{texts[side]}</p>" for name, texts in paragraphs.items()
    ]
    return f"<html><head><title>x</title></head><body><h1 id='h'>A title</h1>{''.join(parts)}</body></html>"


def write_tree(folder: Path, pages: dict[str, str]) -> Path:
    for name, content in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_single_translated_sentences_are_taken_and_others_counted(tmp_path, corpus):
    sides = []
    dropped = Counter()
    for side in (1, 2):
        content = page(TAKEN | NOT_TAKEN, side)
        only = page({"alone": ("", "This is on one side only.", "")}, 1) if side == 1 else ""
        tree = write_tree(tmp_path / str(side), {"text/a.html": content, "text/b.html": only})
        sides.append(corpus.read_help(tree, dropped if side == 1 else Counter()))
    pairs = corpus.align(*sides, dropped)
    assert pairs == {
        ("text/a.html", "a"): Pair("Opens the Find toolbar\u00a0again.", "Ouvre à nouveau la barre Rechercher."),
        ("text/a.html", "b"): Pair("Is the file really saved?", "Le fichier est-il vraiment enregistré ?"),
    }
    assert dropped == {
        "of program code": 1,
        "with an image in the sentence": 1,
        "that differ between systems or programs": 1,
        "untranslated": 1,
        "not of 5 to 40 words": 2,
        "with menu paths or dashes": 2,
        "that are no whole sentence": 1,
        "of several sentences": 1,
    }


def many_pages(count: int) -> dict[tuple[str, str], Pair]:
    return {
        (f"text/{number}.html", name): Pair(f"Sentence {name} of page {number}.", f"Phrase {name}, page {number}.")
        for number in range(count)
        for name in "xy"
    }


def test_files_go_to_one_part_whole_and_the_same_in_every_language(corpus):
    dropped = Counter()
    pairs = many_pages(400)
    splits = corpus.split(pairs, dropped)
    assert sum(map(len, splits.values())) == 800 and not dropped
    assert 15 < len(splits["test"]) < 90 and 4 < len(splits["valid"]) < 40
    for name, part in splits.items():
        assert {pair.source for pair in part} == {
            pair.source for (file, _), pair in pairs.items() if corpus.part_of(file) == name
        }


def test_what_is_in_test_is_not_in_train_but_for_case_and_punctuation(corpus):
    pairs = many_pages(100)
    in_train, others = (
        next(place for place in pairs if corpus.part_of(place[0]) == "train"),
        [place for place in pairs if corpus.part_of(place[0]) == "test"],
    )
    tested = pairs[others[0]]
    pairs["text/train0.html", "u"] = Pair(tested.source.upper() + " !", "Autre chose ici.")
    pairs["text/train0.html", "v"] = Pair("Another sentence is here.", tested.target.lower())
    pairs["text/train0.html", "w"] = Pair(pairs[in_train].source, "Encore une autre traduction.")
    assert corpus.part_of("text/train0.html") == "train"
    dropped = Counter()
    splits = corpus.split(pairs, dropped)
    assert dropped == {"that repeat a sentence": 3}
    assert len(splits["train"]) + len(splits["valid"]) + len(splits["test"]) == 200
    assert tested in splits["test"]


@pytest.fixture
def debian(tmp_path, corpus, monkeypatch):
    """Packages in which 60 pages have a sentence each; `apt-get download` hands them out."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb builds and unpacks the packages of this test")
    for language, side in {"en-us": 1, "fr": 2}.items():
        package = tmp_path / "build" / language
        texts = ("", "Sentence number {} is here now.", "La phrase numéro {} est ici.")
        pages = {f"{n}.html": page({"p": ("", texts[1].format(n), texts[2].format(n))}, side) for n in range(60)}
        write_tree(package / f"usr/share/libreoffice/help/{language}/text", pages)
        (package / "DEBIAN").mkdir()
        (package / "DEBIAN/control").write_text(
            f"Package: libreoffice-help-{language}\nVersion: 4:7.4\nArchitecture: all\nMaintainer: x <x@x.x>\n"
            "Description: x\n"
        )
        deb = tmp_path / f"libreoffice-help-{language}_7.4_all.deb"
        subprocess.run(["dpkg-deb", "-b", "--root-owner-group", package, deb], check=True, capture_output=True)
    real = corpus.command
    asked = []

    def command(words, folder):
        if words[0] != "apt-get":
            return real(words, folder)
        asked.append(words[-1])
        found = list(tmp_path.glob(f"{words[-1]}_*.deb"))
        for deb in found:
            shutil.copy(deb, folder)
        return subprocess.CompletedProcess(
            words, 0 if found else 100, "", "" if found else "N: x\nE: No such package\n"
        )

    monkeypatch.setattr(corpus, "command", command)
    return asked


def make(corpus, monkeypatch, out: Path, language: str = "fr") -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--data-out", str(out), "--language", language])
    corpus.main()


def test_packages_become_text_and_a_record_of_its_origin(tmp_path, corpus, debian, monkeypatch, capsys):
    out = tmp_path / "data" / "en-fr"
    make(corpus, monkeypatch, out)
    parts = {name: (out / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 60 and all(parts.values())
    assert json.loads(parts["test"][0]).keys() == {"source", "target"}
    origin = json.loads((out / "origin.json").read_text())
    assert origin["pairs"] == {name: len(lines) for name, lines in parts.items()}
    assert "MPL-2.0" in origin["licence"]
    deb = tmp_path / "libreoffice-help-fr_7.4_all.deb"
    assert origin["packages"][1] == {
        "package": "libreoffice-help-fr",
        "version": "4:7.4",
        "sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
    }
    assert f"{len(parts['train'])} train pairs" in capsys.readouterr().out
    make(corpus, monkeypatch, out)  # what is there is not made again
    assert len(debian) == 2


def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, corpus, debian, monkeypatch):
    with pytest.raises(SystemExit, match=r"could not download libreoffice-help-tlh \(E: No such package\)"):
        make(corpus, monkeypatch, tmp_path / "out", "tlh")
    assert not (tmp_path / "out").exists()


def test_a_system_without_apt_is_told_so(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no apt-get here: this script needs Debian"):
        make(corpus, monkeypatch, tmp_path / "out")
