"""Packed micro-batches: all pairs in one row, the beginning that their prompts share computed once.

A micro-batch is laid out as `[shared beginning | rest of pair 1 | rest of pair 2 | ...]`. Position ids restart after the
beginning, and a 4-D mask lets a position see the beginning and its own pair: each pair is computed as if it were alone. There
is no padding, and each layer runs once, so ZeRO-3 gathers it once. What it costs: attention is computed for all pairs of
positions in the row. Many long pairs are therefore cheaper padded, and `auto` decides that for each batch by arithmetic
on lengths, the same on all ranks.

Legend: P positions of the row, N response tokens of the micro-batch, B pairs, L positions of a padded pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ksl_ds.text.batches import collate_training, common_length, rank_micro_batches
from ksl_ds.text.prompt import Example

Layout = Literal["prefix", "sequences", "off"]
# Time of one (query, key) pair against that of a multiplication by a weight: masked attention runs less efficiently.
ATTENTION_COST = 2
MAX_POSITIONS = 4096  # of a row: the mask has so many positions squared


@dataclass(frozen=True)
class Packing:
    """How micro-batches become tensors.

    Parameters
    ----------
    layout
        prefix (pairs share the beginning of their prompts), sequences (pairs in one row, nothing shared) or off (padding).
    width
        Of the model's hidden states; 0 packs whatever it costs.
    longest
        Positions of the longest row that is known to be exact; batches with a longer one are padded.
    dtype
        Of the model's weights, hence of a mask that is added to attention scores.
    """

    layout: Layout = "off"
    width: int = 0
    longest: int = MAX_POSITIONS
    dtype: torch.dtype = torch.float32

    def micro_batches(
        self, examples: list[Example], indices: Iterable[int], rank: int, world_size: int, size: int
    ) -> tuple[list[list[int]], bool]:
        """One rank's micro-batches of the global batch `indices`, and whether all ranks' are packed."""
        chosen = sorted(indices, key=lambda index: -len(examples[index]))
        if self.layout != "off":
            bins = balanced_bins(examples, chosen, world_size, size)
            rows = [self._row(examples, some) for some in bins]
            together = world_size * size
            # Ranks wait for the slowest: the largest row, or the most and longest pairs, of those computed at the same time.
            slowest = [max(rows[start : start + world_size]) for start in range(0, len(rows), world_size)]
            padded = [len(examples[index]) for index in chosen[::together]]
            pairs = [min(size, -(-(len(chosen) - start) // world_size)) for start in range(0, len(chosen), together)]
            cheaper = not self.width or self._cost(slowest, [1] * len(slowest)) < self._cost(padded, pairs)
            if max(rows) <= self.longest and cheaper:
                return bins[rank::world_size], True
        return rank_micro_batches(examples, chosen, rank, world_size, size), False

    def _row(self, examples: list[Example], indices: list[int]) -> int:
        return packed_positions([examples[index] for index in indices], shares_prompt=self.layout == "prefix")

    def _cost(self, lengths: list[int], rows: list[int]) -> int:
        """Time of consecutive micro-batches, given their lengths and numbers of rows, in multiplications by 2 D."""
        # A decoder layer has about 12 D^2 weights, and attention multiplies 2 D times for a query and a key.
        return sum(
            count * length * (6 * self.width + ATTENTION_COST * length)
            for length, count in zip(lengths, rows, strict=True)
        )

    def collate(self, examples: list[Example], pad_id: int, *, packed: bool) -> dict[str, Tensor]:
        """The tensors of a micro-batch; one without examples is always padded."""
        if not packed or not examples:
            return collate_training(examples, pad_id)
        return collate_packed(examples, self.dtype, shares_prompt=self.layout == "prefix")


def shared_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with, at least one token of each prompt left."""
    return common_length([example.prompt_ids for example in examples])


def packed_positions(examples: Sequence[Example], *, shares_prompt: bool) -> int:
    """Positions of the row of a micro-batch."""
    saved = shared_beginning(examples) * (len(examples) - 1) if shares_prompt and examples else 0
    return sum(map(len, examples)) - saved


def balanced_bins(examples: list[Example], longest_first: Sequence[int], world_size: int, size: int) -> list[list[int]]:
    """Micro-batches of at most `size` pairs and about equal numbers of tokens, as many for every rank.

    In rounds of a pair for each, the longest pair of a round goes to the micro-batch with the fewest tokens. The largest come
    first: `world_size` in a row, which the ranks compute at the same time, are the most alike, and what does not fit into
    memory fails at once.
    """
    count = math.ceil(len(longest_first) / (world_size * size)) * world_size
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for start in range(0, len(longest_first), count):
        fewest_first = sorted(range(count), key=tokens.__getitem__)
        for number, index in zip(fewest_first, longest_first[start : start + count], strict=False):
            bins[number].append(index)
            tokens[number] += len(examples[index])
    bins.sort(key=lambda some: -sum(len(examples[index]) for index in some))
    return bins


def collate_packed(examples: list[Example], dtype: torch.dtype, *, shares_prompt: bool) -> dict[str, Tensor]:
    """The row of a micro-batch.

    Returns
    -------
    input_ids, position_ids : int64 (1, P)
    attention_mask : (1, 1, P, P), 0 where a position sees another and the lowest number of `dtype` elsewhere. There is none
        without `shares_prompt`: restarting positions tell transformers, and flash attention, where a sequence ends
    predicts : int64 (N,), the positions whose logits predict the response tokens, pair after pair
    targets : int64 (N,), these tokens
    """
    shared = shared_beginning(examples) if shares_prompt else 0
    ids = examples[0].prompt_ids[:shared]
    positions = list(range(shared))
    pair_of = [0] * shared
    predicts: list[int] = []
    targets: list[int] = []
    for number, example in enumerate(examples, start=1):
        first = len(ids) + len(example.prompt_ids) - shared - 1  # the prompt's last token
        predicts += range(first, first + len(example.response_ids))
        targets += example.response_ids
        ids += example.prompt_ids[shared:] + example.response_ids
        positions += range(shared, len(example))
        pair_of += [number] * (len(example) - shared)
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "predicts": torch.tensor(predicts, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
    }
    if shares_prompt:
        pair_P = torch.tensor(pair_of)
        sees_PP = (pair_P == pair_P[:, None]) | (pair_P == 0)
        mask_PP = torch.zeros(len(ids), len(ids), dtype=dtype)
        mask_PP.masked_fill_(~sees_PP.tril(), torch.finfo(dtype).min)
        batch["attention_mask"] = mask_PP[None, None]
    return batch
