"""From sentence pairs to tensors: token ids, the order of batches, padding.

The order is a pure function of (seed, step), so a resumed run needs nothing else. Labels are masked by position, never by
token id: many models pad with their end token.

Legend: B pairs of a batch, L positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.text.prompt import Example

if TYPE_CHECKING:
    from ksl_ds.text.corpus import Corpus, Pair
    from ksl_ds.text.prompt import Prompt
IGNORE_INDEX = -100  # the label that torch's and transformers' losses skip


def encode_corpus(corpus: Corpus, prompt: Prompt, max_length: int) -> tuple[list[Example], dict[str, int]]:
    """Token ids of all pairs of at most `max_length` tokens, and how many were left out for which reason.

    These leave the corpus too, so losses and translations of a held-out text are of the same pairs.

    Raises
    ------
    UserError
        When none is left.
    """
    encoded = prompt.encode(corpus.pairs)
    too_long = f"longer than {max_length} tokens"
    dropped: Counter[str] = Counter()
    examples: list[Example] = []
    pairs: list[Pair] = []
    for pair, example in zip(corpus.pairs, encoded, strict=True):
        if isinstance(example, str):
            dropped[example] += 1
        elif len(example) > max_length:
            dropped[too_long] += 1
        else:
            examples.append(example)
            pairs.append(pair)
    if not examples and dropped[too_long] == len(encoded):
        raise UserError(
            f"{corpus.name}: all {len(encoded)} pairs are longer than text.max_length={max_length} tokens, prompt "
            f"included; the shortest has {min(map(len, encoded))}"
        )
    if not examples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise UserError(f"{corpus.name}: none of its {len(encoded):,} pairs can be used: {reasons}")
    corpus.pairs = pairs
    return examples, dict(dropped)


def check_positions(
    examples: dict[str, list[Example]], positions: int | None, max_new_tokens: int, virtual_tokens: int = 0
) -> None:
    """Compares the lengths of texts by name ("test" is translated too) with the positions that the model has a table for.

    Parameters
    ----------
    examples
        Tokenized pairs by text: "train", "valid", "test".
    positions
        The model's position embeddings; None for a model without such a limit.
    max_new_tokens
        Longest translation of the test text.
    virtual_tokens
        Positions that prefix tuning puts before every prompt.

    Raises
    ------
    UserError
        Where a pair, or a prompt with its translation, is longer.
    """
    if positions is None:
        return
    free = positions - virtual_tokens
    has = f"the model has {positions} positions" + (
        f", {virtual_tokens} of them for prefix.num_virtual_tokens" if virtual_tokens else ""
    )
    for name, some in examples.items():
        longest = max(map(len, some))
        if longest > free:
            raise UserError(
                f"a pair of text.{name} has {longest} tokens, but {has}; set text.max_length={max(0, free)}"
            )
    prompt = max(len(example.prompt_ids) for example in examples["test"])
    # The last new token is read by no further forward pass.
    if prompt + max_new_tokens - 1 > free:
        raise UserError(
            f"a prompt of text.test has {prompt} tokens and evaluation.max_new_tokens is {max_new_tokens}, but {has}; set "
            f"evaluation.max_new_tokens={max(1, free - prompt + 1)} or shorten the text by text.max_length"
        )


def response_tokens(examples: list[Example]) -> int:
    """How many tokens the loss of these examples counts: every response token is predicted once."""
    return sum(len(example.response_ids) for example in examples)


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the examples, its own for every (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples).tolist()


class BatchOrder:
    """Which examples each optimizer step sees: epochs reshuffled, never mixed, the last batch of each a smaller one."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.steps_per_epoch = math.ceil(num_examples / batch_size)
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Indices of the global batch of `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(self._num_examples, self._seed, epoch)
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]


def rank_micro_batches(
    examples: list[Example], indices: Iterable[int], rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """One rank's micro-batches of the global batch `indices`: as many as every other rank has, some perhaps empty.

    Examples of about the same length share a micro-batch, and the ranks work on about the same lengths at a time: little
    padding and little waiting, and the batch's gradient is the same sum. The longest come first: what does not fit into
    memory fails at once. They are dealt out in turn, so no rank has two more than another.
    """
    longest_first = sorted(indices, key=lambda index: -len(examples[index]))
    count = math.ceil(len(longest_first) / (world_size * micro_batch_size))
    mine = longest_first[rank::world_size]
    return [mine[number * micro_batch_size : (number + 1) * micro_batch_size] for number in range(count)]


def padding_id(tokenizer: Any) -> int:
    """The id that fills short rows: the tokenizer's own, else 0. Such positions are masked, so any id serves."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def collate_training(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, (B, L) int64, padded on the right.

    Without examples there is one row that no loss counts: a rank with nothing to do still joins the others' collectives.
    """
    if not examples:
        examples = [Example([pad_id, pad_id], [])]
    longest = max(map(len, examples))
    rows = [example.prompt_ids + example.response_ids for example in examples]
    labels = [[IGNORE_INDEX] * len(example.prompt_ids) + example.response_ids for example in examples]
    return {
        "input_ids": torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORE_INDEX] * (longest - len(row)) for row in labels]),
    }


def common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, at least one token of each left."""
    first, *others = prompts
    most = min(map(len, prompts)) - 1
    return next((at for at in range(most) if any(other[at] != first[at] for other in others)), most)


def collate_prompts(prompts: list[list[int]], pad_id: int, shared: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, L) int64, padded on the left as generation needs it, but after `shared` tokens."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([row[:shared] + [pad_id] * (longest - len(row)) + row[shared:] for row in prompts]),
        "attention_mask": torch.tensor(
            [[1] * shared + [0] * (longest - len(row)) + [1] * (len(row) - shared) for row in prompts]
        ),
    }
