"""Several translation directions: what each reads, how they are mixed, what is left out, and users' mistakes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.tiny import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe, Text
from ksl_ds.errors import UserError
from ksl_ds.text.directions import TRAINED, directions_of, language_name, load_texts, mixed
from ksl_ds.text.prompt import Prompt

BASE = ["run_dir=runs/x", "model.path=m"]


def text(*words: str) -> Text:
    return load_recipe(Recipe, None, [*BASE, *(f"text.{word}" for word in words)]).text


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_recipe_without_directions_has_one_that_is_its_own():
    own = text("train=a.jsonl")
    (only,) = directions_of(own)
    assert only.name == "" and only.codes == () and only.text is own


def test_placeholders_are_filled_in_and_languages_named():
    first, second = directions_of(
        text(
            "directions=[en-ca, fra_Latn-zh_Hant]", "train=data/{direction}/train.{source}-{target}.jsonl",
            "test=['t.{source}', 't.{target}']", "hub_config={source}_{target}", "source_column=translation.{source}",
            "prompts={en-ca: alpaca}", "languages={zh_Hant: Traditional Chinese}", "prompt=Say {source} in {target_language}",
        )
    )  # fmt: skip
    assert first.text.train == ["data/en-ca/train.en-ca.jsonl"] and first.text.test == ["t.en", "t.ca"]
    assert (first.text.hub_config, first.text.source_column) == ("en_ca", "translation.en")
    assert (first.text.source_language, first.text.target_language) == ("English", "Catalan")
    assert first.text.prompt == "alpaca" and second.text.prompt == "Say {source} in {target_language}"
    assert (second.text.source_language, second.text.target_language) == ("French", "Traditional Chinese")


@pytest.mark.parametrize(
    ("code", "name"),
    [("ca", "Catalan"), ("pt_BR", "Portuguese (Brazil)"), ("zho_Hans", "Chinese (Simplified)"), ("deu_Latn", "German")],
)
def test_languages_have_their_usual_english_names(code, name):
    assert language_name(code, Text()) == name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["directions=[en-xx]"], "no language has the code xx; correct it, or name the language, such as"),
        (["directions=[en-klingon]"], "no language has the code klingon"),
        (["directions=[en]"], "text.directions has en; a direction is two language codes"),
        (["directions=[en-zh-Hant]"], "write zh_Hant, not zh-Hant"),
        (["directions=[en-en]"], "text.directions has en-en"),
        (
            ["directions=[en-ca]", "prompts={en-es: plain}"],
            "text.prompts has en-es, which is not one of text.directions",
        ),
        (["directions=[en-ca, en-ca]"], "text.directions .* none twice"),
        (["mixing=equal"], "text.mixing is equal"),
        (["mixing_temperature=.5"], "text.mixing_temperature is .5"),
        (["languages=ca"], "text.languages is ca"),
    ],
)
def test_mistakes_in_the_recipe_are_one_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        directions_of(text(*words))
    assert "\n" not in str(error.value)


# --- mixing ---


def shares(sizes: list[int], *words: str) -> list[int]:
    """How often pairs of each direction occur in an epoch."""
    bounds = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    found = Counter(
        next(n for n, bound in enumerate(bounds) if index < bound) for index in mixed(sizes, text(*words), 0)
    )
    return [found[number] for number in range(len(sizes))]


def test_shares_are_those_of_the_definition():
    assert shares([30, 10, 20]) == [30, 10, 20]
    assert shares([30, 10, 20], "mixing=uniform") == [30, 30, 30]
    assert shares([16, 1], "mixing=temperature", "mixing_temperature=2") == [16, 4]
    assert shares([16, 1], "mixing=temperature", "mixing_temperature=1") == [16, 1]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    mixing=st.sampled_from(["proportional", "uniform", "temperature"]),
    temperature=st.floats(1, 10),
    seed=st.integers(0, 9),
)
def test_every_pair_is_in_an_epoch_and_none_much_more_often_than_another_of_its_direction(
    sizes, mixing, temperature, seed
):
    how = Text(mixing=mixing, mixing_temperature=temperature)
    order = mixed(sizes, how, seed)
    assert order == mixed(sizes, how, seed)
    times = Counter(order)
    assert set(times) == set(range(sum(sizes)))
    start = 0
    for size in sizes:
        of = [times[index] for index in range(start, start + size)]
        assert max(of) - min(of) <= 1
        start += size
    if mixing == "proportional" or len(sizes) == 1:
        assert order == list(range(sum(sizes)))


# --- texts ---


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Two directions: WMT's rows for en-ca, columns for en-es; one test sentence of en-es is trained on in en-ca."""
    monkeypatch.chdir(tmp_path)
    words = ["the cat", "a dog", "the sun", "a red house", "my book", "the sea"]
    for split, some in {"train": words[:4], "test": words[3:]}.items():
        write(Path(f"{split}/en-ca.jsonl"), [{"translation": {"en": word, "ca": f"ca {word}"}} for word in some])
    write(Path("train/en-es.jsonl"), [{"source": word, "target": f"es {word}"} for word in words[:2]])
    write(Path("test/en-es.jsonl"), [{"source": word, "target": f"es {word}"} for word in words[2:]])
    return tmp_path


PATHS = ["directions=[en-ca, en-es]", "train=train/{direction}.jsonl", "test=test/{direction}.jsonl"]


def test_texts_are_told_apart_and_what_any_direction_trains_is_not_tested(data):
    tokenizer = make_tokenizer()
    how = text(*PATHS, "languages={ca: French, es: English}")  # words of the tiny tokenizer
    corpora, examples = load_texts(how, ["train", "test"], 0, tokenizer)
    by_direction = corpora["test"].by_direction()
    assert list(by_direction) == ["en-ca", "en-es"]
    tested = {name: {corpora["test"].pairs[place].source for place in some} for name, some in by_direction.items()}
    assert tested == {"en-ca": {"my book", "the sea"}, "en-es": {"my book", "the sea"}}
    assert corpora["test"].dropped == {TRAINED: 3}
    assert corpora["test"].summary() == f"text.test: 4 pairs (2 en-ca, 2 en-es); left out: 3 {TRAINED}"
    assert {name: len(some) for name, some in corpora["train"].by_direction().items()} == {"en-ca": 4, "en-es": 2}
    languages = {"en-ca": "French", "en-es": "English"}
    for pair, example in zip(corpora["train"].pairs, examples["train"], strict=True):
        prompt = Prompt("plain", "English", languages[pair.direction], tokenizer)
        assert [example] == prompt.encode([pair])
    # The test text of an evaluation, which reads no training text, is the same.
    alone, _ = load_texts(text(*PATHS), ["test"], 0, make_tokenizer())
    assert alone["test"].pairs == corpora["test"].pairs


def test_pairs_of_small_directions_are_repeated(data):
    corpora, examples = load_texts(text(*PATHS, "mixing=uniform"), ["train"], 0, make_tokenizer())
    assert {name: len(some) for name, some in corpora["train"].by_direction().items()} == {"en-ca": 4, "en-es": 4}
    assert len(examples["train"]) == 8


def test_limits_count_for_each_direction(data):
    corpora, _ = load_texts(text(*PATHS, "max_train_pairs=2"), ["train"], 0, make_tokenizer())
    assert {name: len(some) for name, some in corpora["train"].by_direction().items()} == {"en-ca": 2, "en-es": 2}
    assert corpora["train"].dropped == {"beyond text.max_train_pairs=2": 2}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train=train/{target}.jsonl"], "en-ca: text.train: no file train/ca.jsonl"),
        (["train=train/en-es.jsonl"], r"text.train gives en-ca and en-es the same pairs; put \{direction\}"),
        (
            ["source_column=translation.{source}"],
            "en-es: text.train: train/en-es.jsonl, row 1 has no column 'translation.en'",
        ),
        (["test=train/{direction}.jsonl"], "en-ca: text.test .*the source of every pair is in text.train"),
    ],
)
def test_mistakes_in_one_direction_name_it(data, words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_texts(text(*PATHS, *words), ["train", "test"], 0, make_tokenizer())
    assert "\n" not in str(error.value)


def test_directions_of_very_different_size_get_a_hint(data, caplog):
    write(Path("train/en-ca.jsonl"), [{"source": f"the cat {n}", "target": "x"} for n in range(40)])
    load_texts(text(*PATHS), ["train"], 0, make_tokenizer())
    assert "text.train has 40 pairs of en-ca and 2 of en-es; text.mixing=temperature or uniform" in caplog.text
    caplog.clear()
    load_texts(text(*PATHS, "mixing=uniform"), ["train"], 0, make_tokenizer())
    assert caplog.text == ""
