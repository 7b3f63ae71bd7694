"""Several translation directions in one run: which text each reads, how they are mixed, and what test text they share.

A direction such as `en-ca` stands for its codes in paths and columns of the recipe: `{direction}` is en-ca, `{source}` en and
`{target}` ca. A recipe without `text.directions` has one direction without a name, whose text is the recipe's own.

Choices and what they cost:
- Mixing repeats small directions within an epoch and drops nothing of large ones, so an epoch is longer than the text: with
  `uniform` as long as the largest direction times their number.
- A test sentence that is the source of any direction's training pair is left out of the test text of all: multi-parallel
  text would otherwise test what another direction has trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import langcodes
import numpy as np

from ksl_ds.config.schema import Text
from ksl_ds.errors import UserError
from ksl_ds.text.batches import encode_corpus
from ksl_ds.text.corpus import Corpus, Pair, Split, load_corpus
from ksl_ds.text.prompt import Example, Prompt

logger = logging.getLogger(__name__)

VERY_DIFFERENT = 10  # times as many pairs as another direction, which is worth a hint
TRAINED = "whose source is in the training text"


@dataclasses.dataclass(frozen=True)
class Direction:
    """A translation direction.

    Attributes
    ----------
    name
        As in the recipe; empty for the only direction of a recipe that names none.
    codes
        Language codes of source and target; empty without a name.
    text
        The recipe's section `text`, filled in for this direction.
    """

    name: str
    codes: tuple[str, ...]
    text: Text


def directions_of(text: Text) -> list[Direction]:
    """The directions of a recipe's section `text`. Raises UserError for a name that is none, or an unknown language."""
    if not text.directions:
        return [Direction("", (), text)]
    unknown = [name for name in text.prompts if name not in text.directions]
    if unknown:
        raise UserError(f"text.prompts has {unknown[0]}, which is not one of text.directions")
    return [_direction(name, text) for name in text.directions]


def _direction(name: str, text: Text) -> Direction:
    codes = tuple(name.split("-"))
    if len(codes) != 2 or not all(codes) or codes[0] == codes[1]:
        raise UserError(
            f"text.directions has {name}; a direction is two language codes with a hyphen, such as en-ca (write zh_Hant, not "
            "zh-Hant)"
        )
    source, target = codes

    def filled(value: str) -> str:
        return value.replace("{direction}", name).replace("{source}", source).replace("{target}", target)

    return Direction(
        name,
        codes,
        dataclasses.replace(
            text,
            train=[filled(path) for path in text.train],
            valid=[filled(path) for path in text.valid],
            test=[filled(path) for path in text.test],
            hub_config=text.hub_config and filled(text.hub_config),
            source_column=filled(text.source_column),
            target_column=filled(text.target_column),
            source_language=language_name(source, text),
            target_language=language_name(target, text),
            prompt=text.prompts.get(name, text.prompt),
        ),
    )


def language_name(code: str, text: Text) -> str:
    """The English name of a language, by its code: the recipe's own, else CLDR's. Raises UserError for an unknown code."""
    if code in text.languages:
        return text.languages[code]
    try:
        language = langcodes.Language.get(code)
    except langcodes.LanguageTagError:
        language = None
    if language is None or not language.is_valid():
        raise UserError(
            f"text.directions: no language has the code {code}; correct it, or name the language, such as "
            f"text.languages={{{code}: Name}}"
        )
    return language.simplify_script().display_name()


def load_split(text: Text, split: Split, seed: int) -> dict[str, Corpus]:
    """The pairs of a split by direction, each pair with its direction. Raises UserError as `load_corpus` does."""
    corpora = {}
    for direction in directions_of(text):
        try:
            corpus = load_corpus(direction.text, split, seed, direction.codes)
        except UserError as error:
            raise UserError(f"{direction.name}: {error}" if direction.name else str(error)) from None
        for pair in corpus.pairs:
            pair.direction = direction.name
        corpora[direction.name] = corpus
    return corpora


def load_texts(
    text: Text, splits: Sequence[Split], seed: int, tokenizer: Any
) -> tuple[dict[str, Corpus], dict[str, list[Example]]]:
    """Pairs and token ids of the splits, all directions together: those of `train` mixed, others one after the other.

    Parameters
    ----------
    text
        The recipe's section.
    splits
        Which to load: "train", "valid", "test".
    seed
        Of the order of the pairs.
    tokenizer
        The model's.

    Returns
    -------
    corpora
        By split; pairs that are left out are counted by reason.
    examples
        By split, in the order of the corpus' pairs.

    Raises
    ------
    UserError
        For a text that cannot be read or used, and for directions that are given the same pairs.
    """
    prompts = {
        one.name: Prompt(one.text.prompt, one.text.source_language, one.text.target_language, tokenizer)
        for one in directions_of(text)
    }
    by_split = {split: load_split(text, split, seed) for split in splits}
    if text.directions and text.train:
        trained = by_split["train"] if "train" in by_split else load_split(text, "train", seed)
        leave_out_trained(by_split.get("test", {}), {pair.source for one in trained.values() for pair in one.pairs})
    corpora: dict[str, Corpus] = {}
    examples: dict[str, list[Example]] = {}
    for split, by_direction in by_split.items():
        if len(by_direction) > 1:
            _check_distinct(split, by_direction)
        every: list[Example] = []
        for name, corpus in by_direction.items():
            encoded, dropped = encode_corpus(corpus, prompts[name], text.max_length)
            every += encoded
            corpus.dropped |= dropped
        sizes = [len(corpus.pairs) for corpus in by_direction.values()]
        order = list(range(sum(sizes)))
        if split == "train":
            order = mixed(sizes, text, seed)
            _hint(by_direction, text)
        pairs = [pair for corpus in by_direction.values() for pair in corpus.pairs]
        corpora[split] = _together(split, by_direction, [pairs[index] for index in order])
        examples[split] = [every[index] for index in order]
    return corpora, examples


def leave_out_trained(corpora: dict[str, Corpus], trained: set[str]) -> None:
    """Takes pairs out whose source is in `trained`, and counts them. Raises UserError where a direction has none left."""
    for name, corpus in corpora.items():
        kept = [pair for pair in corpus.pairs if pair.source not in trained]
        if not kept:
            raise UserError(f"{name}: {corpus.name}: the source of every pair is in text.train of some direction")
        if len(kept) < len(corpus.pairs):
            corpus.dropped[TRAINED] = len(corpus.pairs) - len(kept)
            corpus.pairs = kept


def mixed(sizes: Sequence[int], text: Text, seed: int) -> list[int]:
    """The pairs of an epoch: indices into the directions' pairs, one direction after the other.

    A direction of n pairs gets a share of the epoch in proportion to n (`proportional`), to n ** (1 / T) at a temperature T,
    or the same as all others (`uniform`). The epoch is as short as can be with every pair in it.

    Parameters
    ----------
    sizes
        Pairs of each direction.
    text
        Says how to mix.
    seed
        Chooses the pairs that come once more than others of their direction.
    """
    exponent = {"proportional": 1.0, "uniform": 0.0, "temperature": 1 / text.mixing_temperature}[text.mixing]
    weights = [size**exponent for size in sizes]
    length = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    order = []
    start = 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        times, rest = divmod(round(weight * length), size)
        more = np.random.Generator(np.random.PCG64([seed, number])).permutation(size)[:rest]
        order += [start + index for index in [*range(size)] * times + sorted(more.tolist())]
        start += size
    return order


def _together(split: str, corpora: dict[str, Corpus], pairs: list[Pair]) -> Corpus:
    """One corpus of several."""
    if list(corpora) == [""]:
        return Corpus(corpora[""].name, pairs, corpora[""].dropped)
    dropped: Counter[str] = Counter()
    for corpus in corpora.values():
        dropped.update(corpus.dropped)
    return Corpus(f"text.{split}", pairs, dict(dropped))


def _check_distinct(split: str, corpora: dict[str, Corpus]) -> None:
    """Raises UserError where two directions have the same pairs: their text was not told apart."""
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for name, corpus in corpora.items():
        pairs = tuple((pair.source, pair.target) for pair in corpus.pairs)
        if pairs in seen:
            raise UserError(
                f"text.{split} gives {seen[pairs]} and {name} the same pairs; put {{direction}}, {{source}} or {{target}} "
                f"into text.{split} or into text.source_column and text.target_column"
            )
        seen[pairs] = name


def _hint(corpora: dict[str, Corpus], text: Text) -> None:
    if text.mixing != "proportional":
        return
    least, *_, most = sorted(corpora, key=lambda name: len(corpora[name].pairs)) * 2
    if len(corpora[most].pairs) >= VERY_DIFFERENT * len(corpora[least].pairs):
        logger.warning(
            f"text.train has {len(corpora[most].pairs):,} pairs of {most} and {len(corpora[least].pairs):,} of {least}; "
            "text.mixing=temperature or uniform shows those of small directions more often"
        )
