"""The order of batches, their parts on each rank, padding and labels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.tiny import SENTENCES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from ksl_ds.errors import UserError
from ksl_ds.text.batches import (
    IGNORE_INDEX,
    BatchOrder,
    check_positions,
    collate_prompts,
    collate_training,
    common_length,
    encode_corpus,
    epoch_order,
    rank_micro_batches,
    response_tokens,
)
from ksl_ds.text.corpus import Corpus, Pair
from ksl_ds.text.prompt import Example, Prompt

SIZE = st.integers(1, 40)
PAD = 2  # the end token too, as in many models
EXAMPLES = [Example([5, 6, 7], [8, PAD]), Example([5], [9, 10, 11, PAD]), Example([5, PAD, 6, 7, 8, 9], [PAD])]


# --- order ---


@settings(deadline=None)
@given(count=st.integers(1, 200), ranks=st.integers(1, 9), size=st.integers(1, 20))
def test_micro_batches_of_the_ranks_are_the_batch_cut_up(count, ranks, size):
    indices = list(range(100, 100 + count))
    examples = [Example([0] * (number * 7919 % 23), [1]) for number in range(100 + count)]
    parts = [rank_micro_batches(examples, indices, rank, ranks, size) for rank in range(ranks)]
    assert sorted(index for part in parts for micro in part for index in micro) == indices
    assert len({len(part) for part in parts}) == 1, "every rank joins as many collectives"
    assert all(len(micro) <= size for part in parts for micro in part)
    shares = [sum(map(len, part)) for part in parts]
    assert max(shares) - min(shares) <= 1
    assert len(parts[0][-1]) > 0, "no micro-batch is empty on all ranks"
    for number in range(len(parts[0]) - 1):
        now, after = ([len(examples[index]) for part in parts for index in part[at]] for at in (number, number + 1))
        assert min(now) >= max(after, default=0), "all ranks are at the same lengths at the same time"


@settings(deadline=None)
@given(examples=SIZE, size=SIZE, seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_an_epoch_has_every_example_once_and_no_batch_mixes_two(examples, size, seed, epochs):
    order = BatchOrder(examples, size, seed)
    assert order.steps_per_epoch == -(-examples // size)
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(examples))
        assert all(len(batch) == size for batch in batches[:-1]) and 0 < len(batches[-1]) <= size


@settings(deadline=None)
@given(
    examples=SIZE, size=SIZE, seed=st.integers(0, 2**31), steps=st.lists(st.integers(0, 300), min_size=1, max_size=9)
)
def test_a_batch_depends_on_seed_and_step_alone(examples, size, seed, steps):
    # As after a resume: asked for out of order, by an object that has seen no step before.
    order = BatchOrder(examples, size, seed)
    in_turn = [order.batch(step) for step in range(max(steps) + 1)]
    assert [order.batch(step) for step in steps] == [in_turn[step] for step in steps]
    assert [BatchOrder(examples, size, seed).batch(step) for step in steps] == [in_turn[step] for step in steps]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    # PCG64 of numpy: another order after an upgrade would make a resumed run train on some pairs twice.
    assert epoch_order(10, 0, 0) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


# --- tensors ---


def test_labels_are_the_response_by_position_though_pad_is_the_end_token():
    batch = collate_training(EXAMPLES, PAD)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, PAD, PAD, PAD],
        [5, 9, 10, 11, PAD, PAD, PAD],
        [5, PAD, 6, 7, 8, 9, PAD],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 5, 7]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 8, PAD, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, 9, 10, 11, PAD, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX] * 6 + [PAD],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert response_tokens(EXAMPLES) == int((batch["labels"] != IGNORE_INDEX).sum()) == 7


def test_an_empty_micro_batch_runs_and_counts_for_nothing():
    batch = collate_training([], PAD)
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].numel() > 0
    assert batch["input_ids"].dtype == torch.int64
    assert (batch["labels"] == IGNORE_INDEX).all() and (batch["attention_mask"] == 1).all()
    assert response_tokens([]) == 0


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[5, 6, 7], [8], [PAD, 9]], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [PAD, PAD, 8], [PAD, PAD, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_prompts_that_share_a_beginning_are_padded_behind_it():
    batch = collate_prompts([[7, 8, 1, 2, 3], [7, 8, 4]], 0, shared=2)
    assert batch["input_ids"].tolist() == [[7, 8, 1, 2, 3], [7, 8, 0, 0, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
    assert common_length([[7, 8, 1], [7, 8, 4]]) == 2
    assert common_length([[7, 8], [7, 8]]) == 1 and common_length([[7], [7, 8]]) == 0  # one token of each is left


def test_padding_changes_no_loss_and_no_next_token():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()

    def nll(examples: list[Example]) -> torch.Tensor:
        batch = collate_training(examples, PAD)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)

    with torch.no_grad():
        alone = torch.cat([nll([example]) for example in EXAMPLES])
        assert torch.allclose(nll(EXAMPLES), alone, atol=1e-5)
        assert alone.min() > 0
        prompts = [example.prompt_ids for example in EXAMPLES]
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
        together = model.generate(**collate_prompts(prompts, PAD), **settings)[:, -3:]
        for row, prompt in zip(together, prompts, strict=True):
            assert row.tolist() == model.generate(**collate_prompts([prompt], PAD), **settings)[0, -3:].tolist()


# --- lengths ---


def corpus() -> Corpus:
    return Corpus("text.train (a.jsonl)", [Pair(*pair) for pair in SENTENCES])


def test_too_long_pairs_leave_examples_and_corpus_and_are_counted():
    prompt = Prompt("{source} :", "English", "French", make_tokenizer())
    lengths = Counter(len(source.split()) + 1 + len(target.split()) + 1 for source, target in SENTENCES)
    limit = sorted(lengths)[1]
    kept = corpus()
    examples, dropped = encode_corpus(kept, prompt, limit)
    assert dropped == {f"longer than {limit} tokens": sum(lengths[length] for length in lengths if length > limit)}
    assert len(examples) == len(kept.pairs) == len(SENTENCES) - sum(dropped.values())
    assert examples == prompt.encode(kept.pairs) and max(map(len, examples)) == limit
    whole = corpus()
    assert encode_corpus(whole, prompt, max(lengths))[1] == {} and whole.pairs == corpus().pairs


def test_all_pairs_too_long():
    prompt = Prompt("{source} :", "English", "French", make_tokenizer())
    shortest = min(map(len, prompt.encode(corpus().pairs)))
    with pytest.raises(UserError) as caught:
        encode_corpus(corpus(), prompt, 3)
    assert str(caught.value) == (
        "text.train (a.jsonl): all 12 pairs are longer than text.max_length=3 tokens, prompt included; "
        f"the shortest has {shortest}"
    )


def test_lengths_against_the_positions_of_a_model():
    texts = {"train": [Example([1] * 5, [2] * 5)], "test": [Example([1] * 4, [2] * 3)]}
    check_positions(texts, None, 10**6)
    check_positions(texts, 10, 7)
    with pytest.raises(UserError) as caught:
        check_positions(texts, 10, 8)
    assert str(caught.value) == (
        "a prompt of text.test has 4 tokens and evaluation.max_new_tokens is 8, but the model has 10 positions; set "
        "evaluation.max_new_tokens=7 or shorten the text by text.max_length"
    )
    with pytest.raises(UserError) as caught:
        check_positions(texts, 9, 1)
    assert str(caught.value) == (
        "a pair of text.train has 10 tokens, but the model has 9 positions; set text.max_length=9"
    )
    with pytest.raises(
        UserError, match="has 12 positions, 3 of them for prefix.num_virtual_tokens; set text.max_length=9"
    ):
        check_positions(texts, 12, 1, virtual_tokens=3)
