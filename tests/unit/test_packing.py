"""Packed micro-batches: their layout against brute force, their losses and gradients against pairs computed alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_model

from ksl_ds.text.batches import collate_training, rank_micro_batches
from ksl_ds.text.packing import (
    Packing,
    balanced_micro_batches,
    collate_packed,
    packed_positions,
    shared_beginning,
)
from ksl_ds.text.prompt import Example

IDS = st.lists(st.integers(3, 5), min_size=1, max_size=6)  # few ids, so that beginnings are shared by chance too
PAIRS = st.lists(st.builds(Example, IDS, IDS), min_size=1, max_size=6)


def with_beginning(count: int, shared: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(number: int) -> list[int]:
        return torch.randint(3, 40, (number,), generator=generator).tolist()

    beginning = ids(shared)
    return [Example(beginning + [3 + pair, *ids(1 + pair % 4)], ids(1 + pair * 3 % 5)) for pair in range(count)]


@settings(deadline=None)
@given(examples=PAIRS)
def test_packing_shares_the_longest_beginning_that_leaves_a_token(examples):
    shared = shared_beginning(examples)
    prompts = [example.prompt_ids for example in examples]
    fits = [
        length
        for length in range(min(map(len, prompts)))
        if len({tuple(prompt[:length]) for prompt in prompts}) == 1 and all(len(prompt) > length for prompt in prompts)
    ]
    assert shared == max(fits)


@settings(deadline=None)
@given(examples=PAIRS, shares=st.booleans())
def test_packing_shows_each_position_its_own_pair_and_no_other(examples, shares):
    """What a position sees, in order, are the tokens of its pair up to itself, at the places that they have there."""
    batch = collate_packed(examples, torch.float32, shares_prompt=shares)
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    shared = shared_beginning(examples) if shares else 0
    assert len(ids) == packed_positions(examples, shares_prompt=shares) == len(positions)
    start = shared
    predicts, targets = [], []
    for example in examples:
        whole = example.prompt_ids + example.response_ids
        row = [*range(shared), *range(start, start + len(whole) - shared)]  # where this pair lies in the row
        assert ids[row].tolist() == whole and positions[row].tolist() == list(range(len(whole)))
        if shares:
            for place, at in enumerate(row):
                seen = (batch["attention_mask"][0, 0, at] == 0).nonzero().flatten().tolist()
                assert seen == row[: place + 1]
        predicts += row[len(example.prompt_ids) - 1 : -1]
        targets += example.response_ids
        start += len(whole) - shared
    assert start == len(ids)
    assert batch["predicts"].tolist() == predicts and batch["targets"].tolist() == targets
    assert ("attention_mask" in batch) == shares


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), ranks=st.integers(1, 5), size=st.integers(1, 9))
def test_packing_balances_micro_batches(lengths, ranks, size):
    examples = [Example([1] * length, [2]) for length in lengths]
    parts = [balanced_micro_batches(examples, range(len(lengths)), rank, ranks, size) for rank in range(ranks)]
    assert sorted(index for part in parts for micro in part for index in micro) == list(range(len(lengths)))
    assert len({len(part) for part in parts}) == 1, "every rank joins as many collectives"
    assert len(parts[0]) == len(rank_micro_batches(examples, range(len(lengths)), 0, ranks, size))
    assert all(len(micro) <= size for part in parts for micro in part)
    tokens = [[sum(len(examples[index]) for index in micro) for micro in part] for part in parts]
    in_order = [tokens[rank][number] for number in range(len(parts[0])) for rank in range(ranks)]
    assert in_order == sorted(in_order, reverse=True)


def test_packing_gives_ranks_the_same_work():
    generator = torch.Generator().manual_seed(0)
    examples = [Example([1] * int(length), [2]) for length in torch.randint(5, 60, (128,), generator=generator)]
    shares = [
        [
            sum(len(examples[index]) for index in micro)
            for micro in balanced_micro_batches(examples, range(128), rank, 4, 8)
        ]
        for rank in range(4)
    ]
    assert max(map(max, shares)) <= 1.03 * min(map(min, shares))


def test_packing_is_chosen_where_it_computes_less():
    short, long = with_beginning(16, 20), [Example([3] * 20 + [number], [4] * 300) for number in range(16)]
    packing = Packing("prefix", width=64)
    assert packing.micro_batches(short, range(16), 0, 2, 8)[1]
    assert not packing.micro_batches(long, range(16), 0, 2, 8)[1], "attention over all pairs costs more than padding"
    assert Packing("prefix").micro_batches(long, range(16), 0, 2, 8)[1], "without a width everything is packed"
    assert not Packing("prefix", longest=50).micro_batches(short, range(16), 0, 2, 8)[1]
    padded = Packing("off").micro_batches(short, range(16), 1, 2, 8)
    assert padded == (rank_micro_batches(short, range(16), 1, 2, 8), False)


def test_packing_pads_an_empty_micro_batch():
    batch, padded = Packing("prefix").collate([], 0, packed=True), collate_training([], 0)
    assert batch.keys() == padded.keys() and all(torch.equal(batch[name], padded[name]) for name in batch)


@pytest.mark.parametrize("layout", ["prefix", "sequences"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_loss_and_no_gradient(layout, attention):
    model = random_model("llama", 48, tied=True)
    model.set_attn_implementation(attention)
    examples = with_beginning(7, 6)
    gradients, nll = [], []
    for packed in (True, False):
        model.zero_grad()
        losses = []
        for some in [examples] if packed else [[example] for example in examples]:
            batch = Packing(layout).collate(some, 0, packed=packed)
            if packed:
                predicts, targets = batch.pop("predicts"), batch.pop("targets")
                logits_NV = model(**batch, use_cache=False, logits_to_keep=predicts).logits[0]
            else:
                labels = batch.pop("labels")[0, 1:]
                targets = labels[labels != -100]
                logits_NV = model(**batch).logits[0, :-1][labels != -100]
            losses.append(torch.nn.functional.cross_entropy(logits_NV, targets, reduction="none"))
        nll.append(torch.cat(losses))
        nll[-1].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(nll[0]) == sum(len(example.response_ids) for example in examples)
    torch.testing.assert_close(nll[0], nll[1], rtol=1e-5, atol=1e-5)
    for packed_gradient, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)
