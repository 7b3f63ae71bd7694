"""Tickets: what a draw records, logits as PEFT's, rows that go in and out of a model to the bit."""

from __future__ import annotations

import doctest
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tickets import IDS, random_matrix, shifted
from helpers.tiny import make_model_folder
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ksl_ds.lottery.ticket import Shift, Ticket, choose_rows, draw_ticket, explain_empty, make_ticket, measure_shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ticket_records_what_scipy_finds(dtype):
    before_VD = random_matrix(dtype=dtype)
    after_VD = shifted(before_VD)
    ticket = draw_ticket(before_VD, after_VD)
    assert ticket.token_ids == IDS
    for place, number in enumerate(IDS):
        reference = stats.ks_2samp(before_VD[number].double(), after_VD[number].double(), method="exact")
        assert ticket.statistic[place] == pytest.approx(reference.statistic, abs=1e-12)
        assert ticket.pvalue[place] == pytest.approx(reference.pvalue, rel=1e-9)
        moved = (after_VD[number].double() - before_VD[number].double()).norm() / before_VD[number].double().norm()
        assert ticket.shift_ratio[place] == pytest.approx(moved.item(), rel=1e-5)
    assert torch.equal(ticket.rows_KD, after_VD[IDS].float())
    assert torch.equal(ticket.base_rows_KD, before_VD[IDS]) and ticket.base_rows_KD.dtype == dtype
    assert ticket.count_V.dtype == torch.int32 and ticket.count_V[IDS].tolist() == ticket.count
    assert ticket.count_V.count_nonzero() == len(IDS)
    assert ticket.tested_dtype == ticket.base["dtype"] == str(dtype).removeprefix("torch.")


def test_ticket_shift_ratio_is_finite_for_zero_rows(tmp_path):
    before_VD = random_matrix()
    before_VD[[5, 6]] = 0
    after_VD = before_VD.clone()
    after_VD[6] = 1e-3
    shift = measure_shift(before_VD, after_VD)
    assert shift.shift_ratio_V[5] == 0 and shift.shift_ratio_V[6] == torch.finfo(torch.float32).max
    draw_ticket(before_VD, after_VD, selection="shift_ratio", top_k=1).save(tmp_path / "t", "embed")
    json.loads((tmp_path / "t" / "ticket.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no Infinity


def test_ticket_shift_does_not_depend_on_blocks_or_mapping(tmp_path):
    before_VD = random_matrix()
    after_VD = shifted(before_VD)
    mapped = []
    for name, matrix in (("before", before_VD), ("after", after_VD)):
        matrix.numpy().tofile(tmp_path / name)
        mapped.append(torch.from_numpy(np.memmap(tmp_path / name, np.float32, "r+", shape=tuple(matrix.shape))))
    whole, blocked = measure_shift(before_VD, after_VD), measure_shift(*mapped, workspace_bytes=20_000)
    for name in ("count_V", "shift_norm_V", "shift_ratio_V"):
        assert torch.equal(getattr(whole, name), getattr(blocked, name)), name


def test_ticket_selections_take_the_rows_they_name():
    count_V = torch.tensor([0, 30, 12, 31, 5], dtype=torch.int32)
    norm_V, ratio_V = torch.tensor([0.0, 1, 9, 2, 8]), torch.tensor([0.0, 7, 1, 2, 6])
    shift = Shift(count_V, norm_V, ratio_V, num_samples=32, tested_dtype="float32")
    assert choose_rows(shift).tolist() == [1, 2, 3]
    assert choose_rows(shift, selection="bonferroni", alpha=0.05).tolist() == [1, 3]
    assert choose_rows(shift, selection="top_k", top_k=2).tolist() == [1, 3]
    assert choose_rows(shift, selection="shift_norm", top_k=2).tolist() == [2, 4]
    assert choose_rows(shift, selection="shift_ratio", top_k=2).tolist() == [1, 4]
    frequency_V = torch.tensor([9, 0, 0, 0, 8])
    assert choose_rows(shift, selection="frequency", top_k=2, frequency_V=frequency_V).tolist() == [0, 4]
    draws = [choose_rows(shift, selection="random", top_k=2, seed=seed).tolist() for seed in range(20)]
    assert draws[3] == choose_rows(shift, selection="random", top_k=2, seed=3).tolist()
    assert len({tuple(ids) for ids in draws}) > 5 and all(ids == sorted(set(ids)) for ids in draws)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"selection": "largest"}, "must be one of alpha, top_k"),
        ({"alpha": 0.0}, "between 0 and 1"),
        ({"alpha": 1.0}, "between 0 and 1"),
        ({"selection": "top_k", "top_k": 0}, "between 1 and the 134"),
        ({"selection": "random", "top_k": 135}, "between 1 and the 134"),
        ({"selection": "frequency"}, "how often each token occurs"),
        ({"embedding_scope": "output"}, "one of input, shared"),
    ],
)
def test_ticket_refuses_bad_settings(settings, reason):
    before_VD = random_matrix()
    with pytest.raises(ValueError, match=reason):
        draw_ticket(before_VD, shifted(before_VD), **settings)


def test_ticket_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="must have the same shape"):
        draw_ticket(random_matrix(), random_matrix(133))


def test_empty_ticket_is_legal_explained_and_not_saved(tmp_path):
    before_VD = random_matrix()
    after_VD = before_VD.clone()
    after_VD[7] *= 1.01
    ticket = draw_ticket(before_VD, after_VD)
    assert len(ticket) == 0 and ticket.rows_KD.shape == (0, 32)
    text = explain_empty(measure_shift(before_VD, after_VD), 0.05)
    largest = stats.ks_2samp(before_VD[7], after_VD[7]).statistic
    assert f"the largest D is {largest:.4f} (p = 1)" in text and "0.01, 0, 0" in text
    for word in ("learning rate", "steps", "alpha", "selection=top_k"):
        assert word in text
    with pytest.raises(ValueError, match="empty ticket"):
        ticket.save(tmp_path / "t", "embed")
    assert not (tmp_path / "t").exists()


def test_ticket_docstring_example_runs():
    module = sys.modules["ksl_ds.lottery.ticket"]
    results = doctest.testmod(module)
    assert results.attempted >= 5 and results.failed == 0


def test_ticket_with_rows_keeps_the_draw_and_its_own_copy():
    before_VD = random_matrix()
    ticket = draw_ticket(before_VD, shifted(before_VD))
    rows_KD = torch.ones(4, 32)
    tuned = ticket.with_rows(rows_KD, stage="partial_tuning")
    rows_KD.zero_()
    assert torch.equal(tuned.rows_KD, torch.ones(4, 32)) and tuned.source == {"stage": "partial_tuning"}
    assert torch.equal(tuned.base_rows_KD, ticket.base_rows_KD) and tuned.count == ticket.count
    with pytest.raises(ValueError, match=r"\(4, 32\), not \(3, 32\)"):
        ticket.with_rows(rows_KD[:3])


# On models


def ticket_on(path: Path, scope: str = "input", dtype: torch.dtype | None = None) -> tuple[Ticket, torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").eval()
    before_VD = model.get_input_embeddings().weight.detach()
    shift = measure_shift(before_VD, shifted(before_VD))
    ids, tokens = torch.tensor(IDS), AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(IDS)
    ticket = make_ticket(
        shift,
        ids,
        before_VD[ids],
        shifted(before_VD)[ids],
        selection="alpha",
        alpha=0.05,
        method="exact",
        tokens=tokens,
        embedding_scope=scope,
        source={"before": str(path)},
    )
    return ticket, model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids_BL = torch.tensor([[3, 17, 9, 64, 130, 2, 20, 21], [5, 6, 7, 8, 9, 10, 11, 3]])
    with torch.no_grad():
        return model(input_ids=ids_BL).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "tied", "scope"),
    [
        ("llama", False, "input"),
        ("llama", True, "shared"),
        ("gemma", True, "shared"),
        ("gemma", False, "input"),
        ("opt", True, "shared"),
        ("gpt_neox", False, "input"),
        ("gpt_neox", True, "shared"),
        ("qwen2", True, "shared"),
    ],
)
def test_peft_gives_the_same_logits_as_the_ticket(tmp_path, architecture, tied, scope, dtype, recwarn):
    from peft import PeftModel

    base = make_model_folder(tmp_path / "base", architecture, tied=tied, dtype=dtype)
    ticket, model = ticket_on(base, scope)
    untouched = logits(model)
    modules = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    head = modules[model.get_output_embeddings()] if tied else None
    ticket.save(tmp_path / "ticket", modules[model.get_input_embeddings()], head)
    Ticket.load(tmp_path / "ticket").apply(model)
    recwarn.clear()
    with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), tmp_path / "ticket")
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)]
    assert torch.equal(logits(with_peft), logits(model))
    assert not torch.equal(logits(model), untouched)
    assert torch.equal(logits(with_peft.merge_and_unload()), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "scope"), [(False, "input"), (True, "input"), (True, "shared")])
def test_ticket_goes_in_and_out_to_the_bit(tmp_path, tied, scope, dtype):
    base = make_model_folder(tmp_path / "base", tied=tied)
    ticket, _ = ticket_on(base, scope)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticket.apply(model, tokenizer=AutoTokenizer.from_pretrained(base))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    moved = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if tied and scope == "shared" else set())
    assert changed == moved
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rows_moved = (embedding != before["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
    assert rows_moved == IDS and torch.equal(embedding[IDS], ticket.rows_KD.to(dtype))
    assert (head is embedding) == (tied and scope == "shared") == model.config.tie_word_embeddings

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="already has a ticket of these rows"):
        ticket.apply(model)

    ticket.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied
    with pytest.raises(ValueError, match="does not have this ticket"):
        ticket.remove(model)


def test_ticket_is_removed_from_a_merged_model(tmp_path):
    base = make_model_folder(tmp_path / "base")
    ticket, model = ticket_on(base)
    before = model.get_input_embeddings().weight.detach().clone()
    ticket.apply(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ticket.remove(merged)
    assert torch.equal(merged.get_input_embeddings().weight, before)


def test_ticket_refuses_another_base_unless_forced(tmp_path):
    ticket, _ = ticket_on(make_model_folder(tmp_path / "base"))
    other_path = make_model_folder(tmp_path / "other", seed=1)
    other = AutoModelForCausalLM.from_pretrained(other_path)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="another base model: 4 of its 4 rows .* first is token 3"):
        ticket.apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    ticket.apply(other, force=True)
    assert torch.equal(other.get_input_embeddings().weight[IDS], ticket.rows_KD)
    ticket.remove(other)  # gives back what the other base had there, not what the ticket's base had
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    wider = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "wider", hidden_size=64))
    with pytest.raises(ValueError, match=r"shape \(134, 32\), not \(134, 64\)"):
        ticket.apply(wider, force=True)


def ticket_of(model: torch.nn.Module, ids: list[int], scope: str) -> Ticket:
    """A ticket with made-up rows for `ids`; the same rows for the same id."""
    before_VD = model.get_input_embeddings().weight.detach()
    after_VD = before_VD.clone()
    for number in ids:
        after_VD[number] += torch.arange(before_VD.shape[1]) + number
    return draw_ticket(before_VD, after_VD, embedding_scope=scope)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize(
    "scopes", [("input",) * 3, ("shared",) * 3, ("input", "shared", "input"), ("shared", "input", "shared")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_several_tickets_in_one_model_are_removed_in_any_order(tmp_path, tied, scopes, order):
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "base", tied=tied))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    all_ids = ([3, 17], [64, 130], [17, 64, 90])  # the third agrees with the others where it overlaps
    tickets = [ticket_of(model, ids, scope) for ids, scope in zip(all_ids, scopes, strict=True)]

    def check(carried: list[Ticket]) -> None:
        expected = {name: value.clone() for name, value in before.items()}
        for ticket in carried:
            expected[embedding][ticket.token_ids] = ticket.rows_KD
            if tied and ticket.embedding_scope == "shared":
                expected[head][ticket.token_ids] = ticket.rows_KD
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        untied = any(ticket.embedding_scope == "input" for ticket in carried)
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied == model.config.tie_word_embeddings == (tied and not untied)

    for number, ticket in enumerate(tickets):
        ticket.apply(model)
        check(tickets[: number + 1])
    carried = list(tickets)
    for number in order:
        tickets[number].remove(model)
        carried.remove(tickets[number])
        check(carried)
    with pytest.raises(ValueError, match="does not have this ticket"):
        tickets[0].remove(model)


def test_tickets_that_disagree_on_a_row_are_refused_and_change_nothing(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "base", tied=True))
    first, second = (ticket_of(model, ids, "input") for ids in ([3, 17], [17, 64]))
    first.apply(model)
    carried = {name: value.clone() for name, value in model.state_dict().items()}
    other = second.with_rows(second.rows_KD + 1)
    for force in (False, True):
        with pytest.raises(ValueError, match="another value for token 17; remove it first"):
            other.apply(model, force=force)
    with pytest.raises(ValueError, match="does not have this ticket"):
        second.remove(model)
    assert all(torch.equal(value, carried[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [140, 131])
def test_a_vocabulary_that_was_resized_later_can_be_forced(tmp_path, size):
    ticket, model = ticket_on(make_model_folder(tmp_path / "base", tied=True))
    model.resize_token_embeddings(size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"not \({size}, 32\) \(force accepts a vocabulary that was resized later\)"):
        ticket.apply(model)
    ticket.apply(model, force=True)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding[IDS], ticket.rows_KD)
    assert (embedding != before["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist() == IDS
    ticket.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.resize_token_embeddings(IDS[-1])  # the last of the ticket's ids is gone
    with pytest.raises(ValueError, match=r"shape \(134, 32\), not \(130, 32\)$"):
        ticket.apply(model, force=True)


def test_peft_finds_the_base_model_of_a_ticket_made_in_python(tmp_path):
    from peft import AutoPeftModelForCausalLM

    base = make_model_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ticket = ticket_of(model, IDS, "input")
    ticket.apply(model)
    ticket.save(tmp_path / "ticket", "model.embed_tokens", base_model=str(base))
    # The name is kept when the ticket is saved again, as after another tuning.
    Ticket.load(tmp_path / "ticket").save(tmp_path / "again", "model.embed_tokens")
    for folder in ("ticket", "again"):
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)), logits(model))


ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["bart", "mbart", "marian", "m2m_100", "pegasus", "umt5", "t5"])
def test_encoder_decoders_are_refused_and_stay_as_they_were(architecture, tied):
    config = AutoConfig.for_model(
        architecture, **ENCODER_DECODER, vocab_size=134, pad_token_id=0, tie_word_embeddings=tied
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config_before = model.config.to_dict()
    for scope in ("input", "shared"):
        ticket = ticket_of(model, IDS, scope)
        for change in (ticket.apply, ticket.remove):
            with pytest.raises(ValueError, match="is an encoder-decoder"):
                change(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config_before


def test_a_head_whose_bias_is_tied_too_moves_only_as_a_whole(tmp_path):
    config = AutoConfig.for_model(
        "bert", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=134,
        is_decoder=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"untie cls.predictions.decoder.bias of BertLMHeadModel"):
        ticket_of(model, IDS, "input").apply(model)
    assert model.config.tie_word_embeddings
    ticket_of(model, IDS, "shared").apply(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), logits(model))


def test_ticket_refuses_another_tokenizer(tmp_path):
    base = make_model_folder(tmp_path / "base")
    ticket, model = ticket_on(base)
    other = shutil.copytree(base, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    swapped = next(token for token, number in vocabulary.items() if number == 17)
    vocabulary["SWAPPED"] = vocabulary.pop(swapped)
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=f"token 17 is '{swapped}' there and 'SWAPPED' here"):
        ticket.apply(model, tokenizer=AutoTokenizer.from_pretrained(other))
    ticket.apply(model, tokenizer=AutoTokenizer.from_pretrained(base))


def test_ticket_refuses_a_partitioned_model(tmp_path):
    ticket, model = ticket_on(make_model_folder(tmp_path / "base"))
    model.get_input_embeddings().weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        ticket.apply(model)
