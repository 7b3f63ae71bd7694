"""From sentence pairs to tensors: token ids, the order of batches, padding.

The order is a pure function of (seed, step), so a resumed run needs nothing else. Labels are masked by position, never by
token id: many models pad with their end token.

Legend: B pairs of a batch, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ksl_ds.errors import UserError

if TYPE_CHECKING:
    from ksl_ds.text.corpus import Corpus
    from ksl_ds.text.prompt import Prompt

IGNORED = -100  # the label that torch's and transformers' losses skip


@dataclass
class Example:
    """A prompt and the response to learn, end token included, as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def encode_corpus(corpus: Corpus, prompt: Prompt, max_length: int) -> tuple[list[Example], dict[str, int]]:
    """Token ids of all pairs of at most `max_length` tokens, and how many were longer; these leave the corpus too.

    So losses and translations of a held-out text are of the same pairs.

    Raises
    ------
    UserError
        When all are longer.
    """
    examples = prompt.encode(corpus.pairs)
    fits = [len(example) <= max_length for example in examples]
    if not any(fits):
        raise UserError(
            f"{corpus.name}: all {len(examples)} pairs are longer than text.max_length={max_length} tokens, prompt "
            f"included; the shortest has {min(map(len, examples))}"
        )
    dropped = fits.count(False)
    corpus.pairs = list(compress(corpus.pairs, fits))
    return list(compress(examples, fits)), {f"longer than {max_length} tokens": dropped} if dropped else {}


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
        self._num_examples, self._batch_size, self._seed = num_examples, batch_size, seed
        self._epoch, self._order = -1, []  # type: tuple[int, list[int]]

    def batch(self, step: int) -> list[int]:
        """Indices of the global batch of `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._num_examples, self._seed, epoch)
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


def collate_training(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, (B, L) int64, padded on the right.

    Without examples there is one row that no loss counts: a rank with nothing to do still joins the others' collectives.
    """
    if not examples:
        examples = [Example([pad_id, pad_id], [])]
    longest = max(map(len, examples))
    rows = [example.prompt_ids + example.response_ids for example in examples]
    labels = [[IGNORED] * len(example.prompt_ids) + example.response_ids for example in examples]
    return {
        "input_ids": torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
    }


def collate_prompts(prompts: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, L) int64, padded on the left as generation needs it."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_id] * (longest - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]),
    }
