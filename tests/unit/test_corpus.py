"""Every kind of text a recipe may name, what is left out of it, its order, and every mistake a user can make with it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pytest

from ksl_ds.config.schema import Text
from ksl_ds.errors import UserError
from ksl_ds.text.corpus import Corpus, Pair, load_corpus, one_line, read_po

PAIRS = [
    ("The cat sees the dog.", "Le chat voit le chien."),
    ('He says "hello", twice.', 'Il dit "bonjour", deux fois.'),
    ("NA", "null"),
    ("12", "12,5"),
    ("Why {source}?", "Pourquoi\u00a0?"),
]
PO = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#. Default: "Save the page"
msgid "label_save"
msgstr "Enregistrer la page"

#. Default: "Hit the \"Save\" button"
#. Used in "the toolbar" only
msgid "label_hit"
msgstr "Cliquez sur « Enregistrer »"

#. Default: "A text over"
#. Note: not a default
msgid "Not a key"
msgstr "Pas une clé"

#. Default: "One wrapped
#. sentence"
msgid "label_wrapped"
msgstr ""
"Une phrase "
"coupée"

#, fuzzy
msgid "Guessed"
msgstr "Deviné"

msgid "Untranslated"
msgstr ""

msgid "One file"
msgid_plural "%d files"
msgstr[0] "Un fichier"
msgstr[1] "%d fichiers"

#~ msgid "Old"
#~ msgstr "Vieux"
"""
PO_PAIRS = [
    ("Save the page", "Enregistrer la page"),
    ('Hit the "Save" button', "Cliquez sur « Enregistrer »"),
    ("A text over", "Pas une clé"),
    ("One wrapped sentence", "Une phrase coupée"),
]
PO_DROPPED = {
    "fuzzy in the .po file": 1,
    "untranslated in the .po file": 1,
    "with plural forms": 1,
    "obsolete in the .po file": 1,
}


def corpus_of(*paths: object, split: str = "train", seed: int = 0, **settings) -> Corpus:
    return load_corpus(Text(**{split: [str(path) for path in paths]}, **settings), split, seed)


def pairs_of(*paths: object, **settings) -> list[tuple[str, str]]:
    """All pairs in alphabetical order: what was read, whatever the shuffle."""
    return sorted((pair.source, pair.target) for pair in corpus_of(*paths, **settings).pairs)


def mistake(*paths: object, **settings) -> str:
    with pytest.raises(UserError) as caught:
        corpus_of(*paths, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(**more) -> list[dict]:
    return [{"source": source, "target": target, **more} for source, target in PAIRS]


def jsonl(path: Path, content: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


# --- sources ---


def test_json_lines(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", rows(id=7))
    assert pairs_of(file) == sorted(PAIRS)


def test_json_lines_with_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", rows()).read_text(encoding="utf-8").replace("\n", "\r\n\r\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert pairs_of(tmp_path / "b.jsonl") == sorted(PAIRS)


def test_json_lines_keep_what_looks_like_a_date_and_unicode_line_ends_within_a_line(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"source": "2020-01-01", "target": "a\u2028b\x85c"}])
    assert pairs_of(file) == [("2020-01-01", "a b c")]


def test_a_json_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows(), indent=1))
    assert pairs_of(tmp_path / "a.json") == sorted(PAIRS)


def test_nested_columns(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"translation": {"en": s, "fr": t}} for s, t in PAIRS])
    assert pairs_of(file, source_column="translation.en", target_column="translation.fr") == sorted(PAIRS)


def test_a_column_whose_own_name_has_a_dot(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text.en": s, "target": t} for s, t in PAIRS])
    assert pairs_of(file, source_column="text.en") == sorted(PAIRS)


def test_csv_as_pandas_writes_it(tmp_path):
    pandas.DataFrame(rows()).to_csv(tmp_path / "a.csv", index=False)
    assert pairs_of(tmp_path / "a.csv") == sorted(PAIRS)


def test_csv_of_windows_with_a_sentence_over_two_lines(tmp_path):
    (tmp_path / "a.CSV").write_bytes(b'\xef\xbb\xbfsource,target\r\n"one\r\ntwo","un, deux"\r\nthree,trois\r\n')
    assert pairs_of(tmp_path / "a.CSV") == [("one two", "un, deux"), ("three", "trois")]


def test_tsv_takes_quotation_marks_as_text(tmp_path):
    lines = ["source\ttarget", '"Oh\t« Oh', 'he said "no"\til dit "non"', "last\tfin"]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    assert pairs_of(tmp_path / "a.tsv") == sorted(tuple(line.split("\t")) for line in lines[1:])


def test_parquet_flat_and_nested(tmp_path):
    pandas.DataFrame(rows()).to_parquet(tmp_path / "a.parquet")
    assert pairs_of(tmp_path / "a.parquet") == sorted(PAIRS)
    pandas.DataFrame({"translation": [{"en": s, "fr": t} for s, t in PAIRS]}).to_parquet(tmp_path / "b.parquet")
    nested = {"source_column": "translation.en", "target_column": "translation.fr"}
    assert pairs_of(tmp_path / "b.parquet", **nested) == sorted(PAIRS)


def test_line_aligned_files(tmp_path):
    # A lone carriage return, a form feed and Unicode's separators end no line: wc -l does not count them either.
    (tmp_path / "a.en").write_bytes(b"\xef\xbb\xbfone\rmore\r\ntwo\x0c2\n\nfour\n")
    (tmp_path / "a.fr").write_text("un\u2028plus\ndeux\x852\ntrois\nquatre", encoding="utf-8", newline="\n")
    corpus = corpus_of(tmp_path / "a.en", tmp_path / "a.fr")
    found = sorted((pair.source, pair.target) for pair in corpus.pairs)
    assert found == [("four", "quatre"), ("one more", "un plus"), ("two 2", "deux 2")]
    assert corpus.dropped == {"with an empty source": 1}


def test_two_files_of_a_known_kind_are_one_after_the_other(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", rows()[:2])
    pandas.DataFrame(rows()[2:]).to_csv(tmp_path / "b.csv", index=False)
    assert pairs_of(first, tmp_path / "b.csv") == sorted(PAIRS)


def test_po_file(tmp_path):
    (tmp_path / "a.po").write_text(PO, encoding="utf-8")
    corpus = corpus_of(tmp_path / "a.po")
    assert sorted((pair.source, pair.target) for pair in corpus.pairs) == sorted(PO_PAIRS)
    assert corpus.dropped == PO_DROPPED


def test_po_folder_is_read_in_an_order_of_its_own(tmp_path):
    (tmp_path / "b" / "LC_MESSAGES").mkdir(parents=True)
    (tmp_path / "b" / "LC_MESSAGES" / "plone.po").write_text(PO, encoding="utf-8")
    (tmp_path / "a.po").write_text('msgid "first"\nmsgstr "premier"\n', encoding="utf-8")
    dropped: Counter[str] = Counter()
    found = list(read_po(tmp_path, dropped))
    assert found[0] == ("first", "premier") and found[1:3] == PO_PAIRS[:2]
    assert pairs_of(tmp_path) == sorted([("first", "premier"), *PO_PAIRS])


def test_hub_dataset_by_id_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(path, name=None, split=None, revision=None):
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list([{"id": "1", "translation": {"en": s, "fr": t}} for s, t in PAIRS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    nested = {"source_column": "translation.en", "target_column": "translation.fr"}
    assert pairs_of("Helsinki-NLP/opus_books", hub_config="en-fr", **nested) == sorted(PAIRS)
    assert pairs_of("wmt14", split="test", test_split="validation[:10%]", revision="v1", **nested) == sorted(PAIRS)
    assert asked == [("Helsinki-NLP/opus_books", "en-fr", "train", None), ("wmt14", None, "validation[:10%]", "v1")]


def test_local_files_leave_no_cache_behind(tmp_path):
    pandas.DataFrame(rows()).to_parquet(tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", rows())
    code = (
        "import sys; from ksl_ds.config.schema import Text; from ksl_ds.text.corpus import load_corpus\n"
        "load_corpus(Text(train=['a.parquet', 'a.jsonl']), 'train', 0)\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'datasets') if name in sys.modules])"
    )
    home = tmp_path / "home"
    home.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"HOME": str(home)}, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
    assert list(home.rglob("*")) == [] and len(list(tmp_path.iterdir())) == 3


# --- what is left out, and the order ---


def test_everything_left_out_is_counted(tmp_path):
    content = [{"source": f"word {index}", "target": f"parole {index}"} for index in range(10)]
    content += [{"source": " ", "target": "parole"}, {"source": "word", "target": None}]
    content += [
        {"source": "a b c d", "target": "x"},
        {"source": "x", "target": "a b c d"},
        {"source": "a b c", "target": "x"},
    ]
    corpus = corpus_of(jsonl(tmp_path / "a.jsonl", content), max_words=3, max_train_pairs=4)
    assert len(corpus.pairs) == 4
    assert corpus.dropped == {
        "with an empty source": 1,
        "with an empty target": 1,
        "longer than 3 words": 2,
        "beyond text.max_train_pairs=4": 7,
    }
    assert len(corpus.pairs) + sum(corpus.dropped.values()) == len(content)
    assert (
        "4 pairs; left out: 1 with an empty source, 1 with an empty target, 2 longer than 3 words, 7 beyond"
        in corpus.summary()
    )


def test_a_smaller_corpus_is_the_beginning_of_the_larger_one(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"source": f"s{i}", "target": f"t{i}"} for i in range(50)])
    whole, few = corpus_of(file, seed=3), corpus_of(file, seed=3, max_train_pairs=20)
    assert few.pairs == whole.pairs[:20]
    assert whole.dropped == {} and "left out" not in whole.summary()
    assert corpus_of(file, seed=4).pairs != whole.pairs
    assert all(pair.source[1:] == pair.target[1:] for pair in whole.pairs)


def test_the_order_is_the_same_in_every_process(tmp_path):
    for index in range(12):
        (tmp_path / f"{index}.po").write_text(f'msgid "source {index}"\nmsgstr "target {index}"\n')
    code = (
        "from ksl_ds.config.schema import Text; from ksl_ds.text.corpus import load_corpus\n"
        "print([pair.source for pair in load_corpus(Text(train=['.']), 'train', 5).pairs])"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(orders) == 1
    assert orders == {f"{[pair.source for pair in corpus_of(tmp_path, seed=5).pairs]}\n"}


def test_no_break_spaces_are_spelling_and_other_space_is_not():
    assert one_line(" Vraiment\u202f?\u00a0\t\u2028 oui \r\n") == "Vraiment\u202f?\u00a0 oui"


# --- mistakes ---


def test_nothing_named():
    assert mistake() == "text.train is empty; name a file or a Hub dataset"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.po"])
def test_a_missing_file_is_named(tmp_path, name):
    assert mistake(tmp_path / name, split="valid") == f"text.valid: no file {tmp_path / name}"


def test_missing_line_aligned_files(tmp_path):
    message = mistake(tmp_path / "a.en", tmp_path / "a.fr")
    assert message == f"text.train: {tmp_path / 'a.en'} cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["train.en", "train.txt"])
def test_one_plain_text_file_is_no_hub_dataset(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("a line\n")
    message = mistake(name)
    assert (
        message.startswith(f"text.train: {name} is neither a file of a known kind (.json")
        and "two line-aligned" in message
    )


def test_a_missing_file_of_no_known_kind_is_not_sought_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: pytest.fail("asked the Hub"))
    assert "neither a file" in mistake("some/long/path") and "neither a file" in mistake("../a")


def test_hub_failures_are_one_line(monkeypatch):
    def load_dataset(*words, **more):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    start = "text.train: me/mine cannot be read from the Hub: "
    failure = ValueError("Unknown\n split")
    assert mistake("me/mine") == f"{start}Unknown split"
    failure = ConnectionError("Couldn't reach 'me/mine' on the Hub (LocalEntryNotFoundError)")
    assert mistake("me/mine").startswith(f"{start}no connection to https://")
    failure = ConnectionError("Couldn't reach 'me/mine' on the Hub (OfflineModeIsEnabled)")
    assert mistake("me/mine").startswith(f"{start}it is not complete in the cache, and HF_HUB_OFFLINE")


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"en": "a", "fr": "b"}])
    assert mistake(file) == f"text.train: {file}, row 1 has no column 'source' (text.source_column); there are: en, fr"
    message = mistake(file, source_column="en", target_column="translation.fr")
    assert "'translation.fr' (text.target_column); there are: en, fr" in message


def test_a_column_missing_in_a_later_row(tmp_path):
    assert "row 6 has no column 'target'" in mistake(jsonl(tmp_path / "a.jsonl", [*rows(), {"source": "a"}]))


def test_a_nested_column_that_is_not_nested(tmp_path):
    message = mistake(jsonl(tmp_path / "a.jsonl", rows()), source_column="source.en")
    assert "has no column 'source.en' (text.source_column); there are: no columns" in message


def test_values_that_are_no_text(tmp_path):
    assert "row 1: source is 3, not text" in mistake(jsonl(tmp_path / "a.jsonl", [{"source": 3, "target": "a"}]))


def test_rows_without_columns(tmp_path):
    assert "row 1 is 'a', not columns" in mistake(jsonl(tmp_path / "a.jsonl", ["a"]))


def test_broken_json_names_the_line(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", rows())
    file.write_text(file.read_text(encoding="utf-8") + '\n{"source": \n', encoding="utf-8")
    assert f"text.train: {file}, line 7 is not JSON" in mistake(file)


def test_unquoted_commas_are_no_silent_loss(tmp_path):
    (tmp_path / "a.csv").write_text("source,target\nyes,oui\nyes,oui, oui\n")
    assert "line 3 has more columns than the 2 of the first row" in mistake(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.po"])
def test_text_that_is_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'msgid "\xe9t\xe9"\nmsgstr "summer"\n')
    message = mistake(tmp_path / name)
    assert message.startswith(f"text.train: {tmp_path / name}") and "utf-8" in message.lower()


def test_line_aligned_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.en").write_bytes(b"one\n\xe9t\xe9\n")
    assert mistake(tmp_path / "a.en", tmp_path / "a.en") == f"text.train: {tmp_path / 'a.en'}, line 2 is not UTF-8 text"


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_text("source\n")
    assert f"text.train: {tmp_path / 'a.parquet'} cannot be read: " in mistake(tmp_path / "a.parquet")


def test_line_aligned_files_of_unequal_length(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.fr").write_text("un\n")
    message = mistake(tmp_path / "a.en", tmp_path / "a.fr")
    assert "a.en has 2 lines" in message and "a.fr has 1; line-aligned files have equally many" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.po"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_text("")
    assert mistake(tmp_path / name) == f"text.train ({tmp_path / name}) holds no pairs"


def test_empty_line_aligned_files_and_folders(tmp_path):
    (tmp_path / "a.en").write_text("")
    assert "holds no pairs" in mistake(tmp_path / "a.en", tmp_path / "a.en")
    assert mistake(tmp_path) == f"text.train: {tmp_path} is a folder without .po files"


def test_one_sided_and_too_long_text_says_why_nothing_is_left(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"source": "a", "target": ""}, {"source": "a b", "target": "c"}])
    message = mistake(file, max_words=1)
    assert message.endswith(": none of its 2 pairs can be used: 1 with an empty target, 1 longer than 1 words")


# --- quotation marks in CSV ---


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('yes,oui\nno,"non\na,b\nc,d\n', 3, "unexpected end of data"),
        ('yes,oui\nno,"non\na,b\n"c, d",e\n', 3, "expected after"),
        ('yes,"oui\n"two, three",b\n', 2, "expected after"),
        ('"one\ntwo","un"\nyes,"oui\na,b\n', 4, "unexpected end"),
        ('"one\ntwo","un\na,b\n', 3, "unexpected end"),
        # A quotation over three sentences, written without knowing of CSV's quotes: the last mark seems to close the first.
        (
            '"Come here.,Viens ici.\nSit down.,Assieds-toi.\nGo away.",Va-t-en.\n',
            2,
            "the lines that it goes over are rows",
        ),
        ('a,b\nx,"one\ny,two"\n', 3, "the lines that it goes over are rows"),
        ('"Oh" she said,Oh\n', 2, "expected after"),
        ('a,"' + "b, c.\n" * 200_000, 2, "field larger than field limit"),
    ],
)
def test_a_quotation_mark_that_does_not_close_is_found_where_it_opens(tmp_path, content, line, reason):
    (tmp_path / "a.csv").write_text("source,target\n" + content)
    message = mistake(tmp_path / "a.csv")
    assert message.startswith(
        f"text.train: {tmp_path / 'a.csv'}, line {line}: a field begins with a quotation mark and does"
    )
    assert reason in message


def test_quoted_line_breaks_and_quotation_marks_within_csv_stay(tmp_path):
    (tmp_path / "a.csv").write_text(
        'source,target\n"one,\ntwo","un, ""deux"""\na 5" disk,"un\ndisque"\n\n"three\n\nfour","trois, quatre"\r\na\rb,"c\rd"\n'
    )
    assert pairs_of(tmp_path / "a.csv") == [
        ('a 5" disk', "un disque"), ("a b", "c d"), ("one, two", 'un, "deux"'), ("three four", "trois, quatre"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "proof", ['"source","target"\n{}', 'source,target\n{}"a, b",c\n', 'source,target\n"a, b",c\n{}']
)
def test_lines_that_look_like_rows_stay_in_their_field_where_quotes_are_known(tmp_path, proof):
    (tmp_path / "a.csv").write_text(proof.format('x,"one\ny,two"\n'))
    assert ("x", "one y,two") in pairs_of(tmp_path / "a.csv")


# --- carriage returns, columns ---


def test_a_lone_carriage_return_ends_no_line_of_a_tsv(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"source\ttarget\r\none\rmore\tun\rplus\r\n\ntwo\tdeux\x0c2\nthree\n")
    corpus = corpus_of(tmp_path / "a.tsv")
    assert sorted((pair.source, pair.target) for pair in corpus.pairs) == [("one more", "un plus"), ("two", "deux 2")]
    assert corpus.dropped == {"with an empty target": 1}


def test_a_tab_too_many_is_no_silent_loss(tmp_path):
    (tmp_path / "a.tsv").write_text("source\ttarget\na\tb\nc\td\te\n")
    assert "line 3 has more columns than the 2 of the first row" in mistake(tmp_path / "a.tsv")


# --- compressed text ---


def test_text_compressed_with_gzip(tmp_path):
    content = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows()),
        "a.json": json.dumps(rows(), indent=1),
        "a.csv": pandas.DataFrame(rows()).to_csv(index=False),
        "a.tsv": "".join("\t".join(line) + "\n" for line in [("source", "target"), *PAIRS]),
    }
    for name, text in content.items():
        for ending in (".gz", ".GZ"):
            with gzip.open(tmp_path / (name + ending), "wb") as file:
                file.write(b"\xef\xbb\xbf" + text.encode())
            assert pairs_of(tmp_path / (name + ending)) == sorted(PAIRS)


def test_aligned_text_compressed_with_gzip_on_one_side_or_both(tmp_path):
    sides = ["".join(line + "\n" for line in side) for side in zip(*PAIRS, strict=True)]
    for side, text in zip(("en", "fr"), sides, strict=True):
        (tmp_path / f"a.{side}").write_bytes(text.encode())
        (tmp_path / f"a.{side}.gz").write_bytes(gzip.compress(text.encode()))
    for paths in (("a.en.gz", "a.fr.gz"), ("a.en.gz", "a.fr"), ("a.en", "a.fr.gz")):
        assert pairs_of(*(tmp_path / path for path in paths)) == sorted(PAIRS)


def test_po_compressed_with_gzip_alone_and_in_a_folder(tmp_path):
    text = PO.replace("Une phrase ", "Une\u2028phrase\x85")
    (tmp_path / "a.po.gz").write_bytes(gzip.compress(text.encode()))
    assert pairs_of(tmp_path / "a.po.gz") == sorted(PO_PAIRS) == pairs_of(tmp_path)


def test_damaged_and_pretended_gzip(tmp_path):
    formats = {
        "tsv": ("source\ttarget\n", "a{0}\tb{0}\n"),
        "csv": ("source,target\n", "a{0},b{0}\n"),
        "jsonl": ("", '{{"source": "a{0}", "target": "b{0}"}}\n'),
        "po": ("", 'msgid "a{0}"\nmsgstr "b{0}"\n\n'),
        "fr": ("", "a{0}\n"),
    }
    for ending, (head, row) in formats.items():
        text = (head + "".join(row.format(number) for number in range(2000))).encode()
        whole = gzip.compress(text)
        (tmp_path / f"whole.{ending}.gz").write_bytes(whole)
        damage = {
            "cut": whole[: len(whole) // 2],
            "wrong_sum": whole[:-6] + b"\0\0" + whole[-4:],
            "garbled": whole[:60] + b"\xff" * 40 + whole[100:],
            "pretended": text,
        }
        for name, content in damage.items():
            file = tmp_path / f"{name}.{ending}.gz"
            file.write_bytes(content)
            message = mistake(*[tmp_path / "whole.fr.gz"] * (ending == "fr"), file)
            assert message.startswith(f"text.train: {file} is damaged or not compressed with gzip: ")
    assert mistake(tmp_path / "none.jsonl.gz") == f"text.train: no file {tmp_path / 'none.jsonl.gz'}"
    assert "neither a file of a known kind" in mistake("train.en.gz")


def test_compressed_aligned_files_of_unequal_length(tmp_path):
    for name, lines in {"a.en": 3, "a.fr": 5}.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"x\n" * lines))
    assert "a.en.gz has 3 lines and" in mistake(tmp_path / "a.en.gz", tmp_path / "a.fr.gz")
    assert "a.fr.gz has 5 lines and" in mistake(tmp_path / "a.fr.gz", tmp_path / "a.en.gz")


# --- lines without end, half characters ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.tsv.gz", "a.en"])
def test_a_line_without_end_costs_an_error_and_not_the_memory(tmp_path, name):
    """A hundred megabytes in the second line; what is held meanwhile is a few times the limit for a line."""
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith(".gz") else (tmp_path / name).open("wb") as file:
        file.write(b'{"source": "a", "target": "b"}\n' if name == "a.jsonl" else b"source,target\tsource\n")
        for _ in range(100):
            file.write(b"a, " * 350_000)
    paths = [tmp_path / name] * (2 if name == "a.en" else 1)
    tracemalloc.start()
    try:
        message = mistake(*paths)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith(f"text.train: {tmp_path / name}, line 2 has more than 1,000,000 bytes")
    assert peak < 16_000_000


def test_the_longest_line_and_sentence(tmp_path):
    (tmp_path / "a.en").write_bytes(b"a" * 1_000_000 + b"\r\n" + b"b\n")
    assert len(pairs_of(tmp_path / "a.en", tmp_path / "a.en")[0][0]) == 1_000_000
    (tmp_path / "a.en").write_bytes(b"a" * 1_000_001 + b"\n")
    assert "a.en, line 1 has more than" in mistake(tmp_path / "a.en", tmp_path / "a.en")
    long = [*rows(), {"source": "a", "target": "b" * 1_000_001}]
    pandas.DataFrame(long).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(long))
    for name in ("a.parquet", "a.json"):
        assert f"{tmp_path / name}, row 6: target has 1,000,001 characters; a sentence has at most" in mistake(
            tmp_path / name
        )
    (tmp_path / "a.po").write_text(f'msgid "a"\nmsgstr "{"b" * 1_000_001}"\n')
    assert f"{tmp_path / 'a.po'}, 'a' or its translation has 1,000,001 characters" in mistake(tmp_path / "a.po")


def test_half_a_surrogate_pair_is_left_out_and_counted(tmp_path):
    content = [*rows(), {"source": "a\ud83d", "target": "b"}, {"source": "a", "target": "\ude00b"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*content, {"source": "\U0001f600", "target": "c"}])
    )
    corpus = corpus_of(tmp_path / "a.jsonl")
    assert sorted((pair.source, pair.target) for pair in corpus.pairs) == sorted([*PAIRS, ("\U0001f600", "c")])
    assert corpus.dropped == {"with half of a surrogate pair": 2}


def test_pairs_compare_by_their_text():
    assert Pair("a", "b") == Pair("a", "b") != Pair("b", "a")


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
def test_a_column_that_comes_twice_is_a_mistake(tmp_path, name):
    separator = "," if name.endswith("csv") else "\t"
    rows = [["source", "source", "target"], ["a cat", "a dog", "un chat"]]
    (tmp_path / name).write_text("".join(separator.join(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"{name} has the column source twice"):
        load_corpus(Text(train=[str(tmp_path / name)]), "train", 0)
