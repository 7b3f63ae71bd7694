"""Packed micro-batches: their layout against brute force, their losses and gradients against pairs computed alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.text.batches import collate_training, rank_micro_batches
from ksl_ds.text.packing import (
    Packing,
    balanced_bins,
    collate_packed,
    packed_positions,
    shared_beginning,
)
from ksl_ds.text.prompt import Example
from ksl_ds.training.loss import can_keep_logits, response_nll
from ksl_ds.training.packing import packing_of

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
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    bins = balanced_bins(examples, longest_first, ranks, size)
    assert sorted(index for some in bins for index in some) == list(range(len(lengths)))
    assert len(bins) == ranks * len(rank_micro_batches(examples, range(len(lengths)), 0, ranks, size))
    assert all(len(some) <= size for some in bins)
    tokens = [sum(len(examples[index]) for index in some) for some in bins]
    assert tokens == sorted(tokens, reverse=True)
    parts = [
        Packing("sequences").micro_batches(examples, range(len(lengths)), rank, ranks, size) for rank in range(ranks)
    ]
    assert parts == [(bins[rank::ranks], True) for rank in range(ranks)]


def test_packing_gives_ranks_the_same_work():
    generator = torch.Generator().manual_seed(0)
    examples = [Example([1] * int(length), [2]) for length in torch.randint(5, 60, (128,), generator=generator)]
    longest_first = sorted(range(128), key=lambda index: -len(examples[index]))
    tokens = [sum(len(examples[index]) for index in some) for some in balanced_bins(examples, longest_first, 4, 8)]
    assert max(tokens) <= 1.03 * min(tokens)


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


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "opt", "gpt2", "phi3", "mixtral")


def random_architecture(name: str):
    sizes = {"head_dim": 8} if name in ("gemma2", "qwen3") else {}
    return random_model(name, 48, tied=False, **sizes)


@pytest.mark.parametrize("layout", ["prefix", "sequences"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_changes_no_loss_and_no_gradient(architecture, layout):
    model = random_architecture(architecture).eval()
    if (architecture, layout) == ("opt", "sequences"):  # its code does not look for restarting positions
        with pytest.raises(UserError, match="sequences does not work with folder: losses of tokens differ by"):
            packing_of(run_of(model, layout), model)
    else:
        check_gradients(model, layout)


@pytest.mark.parametrize("layout", ["prefix", "sequences"])
def test_packing_with_eager_attention(layout):
    model = random_architecture("llama")
    model.set_attn_implementation("eager")
    check_gradients(model, layout)


def check_gradients(model, layout: str) -> None:
    """Seven pairs in one row against each of them alone."""
    examples = with_beginning(7, 6)
    nll, gradients = [], []
    for batches in ([examples], [[example] for example in examples]):
        model.zero_grad()
        total = sum(
            response_nll(model, Packing(layout).collate(some, 0, packed=some is examples), can_keep_logits(model))
            for some in batches
        )
        total.backward()
        nll.append(total.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*nll, rtol=1e-5, atol=0)
    for packed_gradient, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=2e-5)


# --- what is packed at all ---


def run_of(model, packing: str = "auto", examples: list[Example] | None = None) -> SimpleNamespace:
    recipe = load_recipe(Recipe, None, ["run_dir=x", "model.path=folder", f"training.packing={packing}"])
    return SimpleNamespace(
        recipe=recipe, model=model, examples={"test": examples or with_beginning(9, 6)}, pad_id=0, proved=None
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_is_proved_on_the_model(architecture):
    run = run_of(random_architecture(architecture))
    packing = packing_of(run, run.model)
    assert packing.layout == "prefix" and packing.width == 32
    assert packing.longest == packed_positions(run.examples["test"], shares_prompt=True)
    assert packing_of(run, None) is packing, "proved once for a model"
    assert packing_of(run_of(run.model, "off"), None) == Packing()


def falls_back(run: SimpleNamespace, reason: str, caplog) -> None:
    caplog.set_level("INFO")
    assert packing_of(run, run.model) == Packing()
    assert len(caplog.messages) == 1 and f"not packed: {reason}" in caplog.messages[0]
    run.recipe.training.packing = "prefix"
    run.proved = None
    with pytest.raises(UserError, match=f"training.packing=prefix does not work with folder: {reason}"):
        packing_of(run, run.model)


@pytest.mark.parametrize("architecture", ["bloom", "mamba"])
def test_packing_falls_back_where_code_takes_no_positions(architecture, caplog):
    falls_back(run_of(random_architecture(architecture)), f"the code of {architecture} takes no position_ids", caplog)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_packing_finds_out_code_that_ignores_what_it_takes(ignored, caplog):
    model = random_architecture("llama")
    whole = model.forward

    def forward(logits_to_keep=0, position_ids=None, attention_mask=None, **inputs):
        inputs |= {"position_ids": position_ids, "attention_mask": attention_mask}
        if position_ids is not None:  # a packed row
            inputs[ignored] = None if ignored == "position_ids" else torch.ones_like(inputs["input_ids"])
        return whole(logits_to_keep=logits_to_keep, **inputs)

    # Random weights of a tiny model hardly look at positions: larger ones do.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    model.forward = forward
    falls_back(run_of(model), "losses of tokens differ", caplog)


def test_packing_falls_back_where_a_row_does_not_run(caplog):
    model = random_architecture("llama")
    whole = model.forward

    def forward(logits_to_keep=0, position_ids=None, **inputs):
        if position_ids is not None:
            raise NotImplementedError
        return whole(logits_to_keep=logits_to_keep, **inputs)

    model.forward = forward
    falls_back(run_of(model), "a packed micro-batch does not run in llama: NotImplementedError", caplog)
    assert model.training


def test_packing_knows_windows_shorter_than_a_pair():
    examples = with_beginning(9, 6)
    longest = max(map(len, examples))
    model = random_architecture("mistral")
    model.config.sliding_window = longest - 1
    assert packing_of(run_of(model, examples=examples), model).layout == "sequences"
    model.config.sliding_window = longest  # shorter than a row, but no pair reaches beyond it
    assert packing_of(run_of(model, examples=examples), model).layout == "prefix"
    check_gradients(model, "prefix")
