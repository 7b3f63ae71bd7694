"""Makes parallel text out of LibreOffice's help, which Debian and Ubuntu carry in many languages.

    python launch/libreoffice_corpus.py --data-out data/libreoffice-en-fr --language fr

`libreoffice-help-en-us` and `libreoffice-help-LANGUAGE` hold the same HTML files with the same paragraph ids (MPL-2.0). A pair
is a paragraph that is one sentence of 5 to 40 words in both. Whole files go to train, valid or test, by a hash of their
path: the same for every language, and no page is in two of them. The text is templated ("Returns the ...", "Opens a dialog
..."), which flatters scores, so a sentence that occurs in test again, but for case and punctuation, is taken out of train.

Security updates replace the packages, so none is required by version; origin.json beside the text records which was read,
with its sha256. Needs apt-get and dpkg-deb, and no administrator. Existing files are not made again, and what is made
appears complete or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

from quickstart_inputs import folded, is_made, write_splits

from ksl_ds.text.corpus import Pair, one_line

LICENCE = "MPL-2.0, the LibreOffice contributors"
MIN_WORDS, MAX_WORDS = 5, 40
# Hundredths of the files. Files are of very different lengths, so shares of sentences differ a little from these.
SHARES = {"test": 5, "valid": 2}
SENTENCE_END = re.compile(r"[.!?:…][\"'»”’)]*$")
# The end of one sentence and the begin of another within a paragraph.
SENTENCE_BREAK = re.compile(r"[.!?:…][\"'»”’)]*\s+[\"'«“‘(¿¡]*\s*[A-ZÀ-ÖØ-Þ0-9]")
MENU_PATH = re.compile(r"\s[-–—▸>]\s")
Paragraphs = dict[tuple[str, str], str]  # (file, id): text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-out", type=Path, required=True, help="folder for train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument(
        "--language", default="fr", help="target language, as Debian names it: ca, da, de, es, fr, pt, ..."
    )
    arguments = parser.parse_args()
    if is_made(arguments.data_out, "train.jsonl"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        packages = [f"libreoffice-help-{language}" for language in ("en-us", arguments.language)]
        debs = [fetch(package, Path(scratch)) for package in packages]
        trees = [unpack(deb, Path(scratch) / package) for deb, package in zip(debs, packages, strict=True)]
        dropped: Counter[str] = Counter()
        # What cannot be a sentence in one language cannot be one in the other: counted once.
        english = read_help(trees[0], dropped)
        other = read_help(trees[1], Counter())
        pairs = align(english, other, dropped)
        splits = split(pairs, dropped)
        if not all(splits.values()):
            sys.exit(f"{packages[1]} shares only {len(pairs)} sentences with {packages[0]}: too few to split")
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        print(f"left out: {left_out}", flush=True)
        origin = {
            "licence": LICENCE,
            "packages": [described(deb) for deb in debs],
            "pairs": {name: len(part) for name, part in splits.items()},
            "left_out": dict(dropped),
        }
        write_splits(splits, arguments.data_out, f"LibreOffice's help, {LICENCE}", origin)


def fetch(package: str, scratch: Path) -> Path:
    """Downloads a Debian package; apt checks its signature."""
    print(f"fetching {package}", flush=True)
    found = command(["apt-get", "download", "-q", package], scratch)
    debs = list(scratch.glob(f"{package}_*.deb"))
    if found.returncode != 0 or not debs:
        reason = next((line for line in found.stderr.splitlines() if line.startswith("E:")), "no reason given")
        sys.exit(f"apt-get could not download {package} ({reason}); `apt-get update` may help, or another --language")
    return debs[0]


def unpack(deb: Path, folder: Path) -> Path:
    """Unpacks a package and returns the folder of its help pages."""
    found = command(["dpkg-deb", "-x", str(deb), str(folder)], deb.parent)
    pages = [path for path in folder.glob("usr/share/libreoffice/help/*/text") if path.is_dir()]
    if found.returncode != 0 or len(pages) != 1:
        sys.exit(f"{deb.name} holds no help pages of LibreOffice: {one_line(found.stderr) or 'other folders in it'}")
    return pages[0]


def described(deb: Path) -> dict[str, str]:
    """A package's name, version and checksum."""
    name, version = (
        command(["dpkg-deb", "-f", str(deb), field], deb.parent).stdout.strip() for field in ("Package", "Version")
    )
    return {"package": name, "version": version, "sha256": hashlib.sha256(deb.read_bytes()).hexdigest()}


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"there is no {words[0]} here: this script needs Debian, Ubuntu or another system with apt and dpkg")


class Page(HTMLParser):
    """The paragraphs of a help page that have an id: their text, or why it is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.unfit: dict[str, str] = {}
        self._id: str | None = None
        self._parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "p":
            self._id = attributes.get("id")
            self._parts = []
            if self._id and "code" in (attributes.get("class") or ""):
                self.unfit[self._id] = "of program code"
        elif self._id and tag == "img":
            self.unfit[self._id] = "with an image in the sentence"
        elif self._id and "hidden" in attributes:  # "Tools" on one system, "Preferences" on another
            self.unfit[self._id] = "that differ between systems or programs"
        elif tag == "br":
            self._parts.append(" ")

    def handle_data(self, data: str) -> None:
        self._parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self._id:
            self.texts[self._id] = one_line("".join(self._parts))
            self._id = None


def read_help(tree: Path, dropped: Counter[str]) -> Paragraphs:
    """The paragraphs of all pages below a folder that can be plain sentences."""
    paragraphs: Paragraphs = {}
    for file in sorted(tree.rglob("*.html")):
        page = Page()
        page.feed(file.read_text(encoding="utf-8"))
        dropped.update(page.unfit.values())
        name = file.relative_to(tree).as_posix()
        paragraphs |= {(name, number): text for number, text in page.texts.items() if number not in page.unfit}
    return paragraphs


def align(english: Paragraphs, other: Paragraphs, dropped: Counter[str]) -> dict[tuple[str, str], Pair]:
    """Single sentences that are translated, by (file, id); counts the others."""
    pairs = {}
    for place in sorted(english.keys() & other.keys()):
        source, target = english[place], other[place]
        lengths = len(source.split()), len(target.split())
        if folded(source) == folded(target):
            dropped["untranslated"] += 1
        elif min(lengths) < MIN_WORDS or max(lengths) > MAX_WORDS:
            dropped[f"not of {MIN_WORDS} to {MAX_WORDS} words"] += 1
        elif MENU_PATH.search(source) or MENU_PATH.search(target):
            dropped["with menu paths or dashes"] += 1
        elif not SENTENCE_END.search(source) or not SENTENCE_END.search(target):
            dropped["that are no whole sentence"] += 1
        elif SENTENCE_BREAK.search(source) or SENTENCE_BREAK.search(target):
            dropped["of several sentences"] += 1
        else:
            pairs[place] = Pair(source, target)
    return pairs


def part_of(file: str) -> str:
    """train, valid or test, for a page: by its path alone, hence the same for every language and version."""
    hundredth = int(hashlib.sha256(file.encode()).hexdigest(), 16) % 100
    for name, share in SHARES.items():
        if hundredth < share:
            return name
        hundredth -= share
    return "train"


def split(pairs: dict[tuple[str, str], Pair], dropped: Counter[str]) -> dict[str, list[Pair]]:
    """Test, valid and train, no page and no sentence in two of them, a source sentence once in each.

    A sentence that repeats but for case and punctuation stays in test rather than in valid, and there rather than in train;
    the same holds for its translation.
    """
    splits: dict[str, list[Pair]] = {"test": [], "valid": [], "train": []}
    sources: set[str] = set()
    targets_before: set[str] = set()
    for name, part in splits.items():
        targets = set()
        for (file, _), pair in pairs.items():
            if part_of(file) != name:
                continue
            source, target = folded(pair.source), folded(pair.target)
            if source in sources or target in targets_before:
                dropped["that repeat a sentence"] += 1
                continue
            sources.add(source)
            targets.add(target)
            part.append(pair)
        targets_before |= targets
    return splits


if __name__ == "__main__":
    main()
