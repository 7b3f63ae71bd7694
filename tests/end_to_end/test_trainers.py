"""Rows and draws in other people's trainers: Hugging Face's Trainer, TRL's SFTTrainer, and new tokens from start to finish."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import SENTENCES, make_model_folder
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from ksl_ds import Ticket, draw_ticket, train_only_rows
from ksl_ds.errors import UserError
from ksl_ds.integrations import DrawCallback, add_tokens, save_token_adapter

CHOSEN = [3, 7, 11]


@pytest.fixture
def base(tmp_path):
    return make_model_folder(tmp_path / "base")


def arguments(folder, **options) -> TrainingArguments:
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    return TrainingArguments(output_dir=str(folder / "trainer"), **settings | quiet | options)


def examples(tokenizer, sentences=SENTENCES) -> list[dict[str, list[int]]]:
    """Of one length, so that no collator is needed."""
    ids = [(tokenizer(" ".join(pair))["input_ids"] * 12)[:12] for pair in sentences]
    return [{"input_ids": row, "labels": row} for row in ids]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def embedding(model) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach().clone()


def moved(before_VD, after_VD) -> list[int]:
    return (before_VD != after_VD).any(dim=1).nonzero().flatten().tolist()


def trains_the_embedding(model):
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)


class Stop(TrainerCallback):
    """Interrupts a training after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step >= self.steps


# ---- the callback


def test_callback_draws_logs_and_writes_the_ticket(base, tmp_path):
    """The ticket is the one that two matrices give, PEFT loads it, and the trainer's own log has every draw."""
    model, tokenizer = load(base)
    trains_the_embedding(model)
    before_VD = embedding(model)
    callback = DrawCallback(every=4, alpha=0.5, out=tmp_path / "ticket")
    settings = {"train_dataset": examples(tokenizer), "processing_class": tokenizer, "callbacks": [callback]}
    trainer = Trainer(model, arguments(tmp_path), **settings)
    trainer.train()
    draws = [line for line in trainer.state.log_history if "ticket_size" in line]
    assert [line["step"] for line in draws] == [4, 8, 12]
    expected = draw_ticket(before_VD, embedding(model), alpha=0.5)
    assert draws[-1]["ticket_size"] == len(expected) > 0
    assert draws[-1]["largest_statistic"] == pytest.approx(max(expected.statistic))
    ticket = Ticket.load(tmp_path / "ticket")
    assert ticket.token_ids == expected.token_ids and torch.equal(ticket.rows_KD, expected.rows_KD)
    assert ticket.tokens == tokenizer.convert_ids_to_tokens(ticket.token_ids) and ticket.source["base"] == str(base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ticket")
    written = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        written.get_input_embeddings().weight[ticket.token_ids] = ticket.rows_KD
    ids = torch.arange(3, 13)[None]
    assert torch.equal(adapted(input_ids=ids).logits, written(input_ids=ids).logits)


def test_callback_ends_the_training_once_the_ticket_has_settled(base, tmp_path):
    model, tokenizer = load(base)
    trains_the_embedding(model)
    callback = DrawCallback(every=2, alpha=0.999, stop_overlap=0.01, stop_draws=2)
    trainer = Trainer(model, arguments(tmp_path, max_steps=40), train_dataset=examples(tokenizer), callbacks=[callback])
    trainer.train()
    overlaps = [line["ticket_overlap"] for line in trainer.state.log_history if "ticket_overlap" in line]
    assert min(overlaps[-2:]) >= 0.01 and len(overlaps) * 2 == trainer.state.global_step < 40


def test_callback_of_a_resumed_training_compares_with_the_base(base, tmp_path):
    """Not with the rows of the checkpoint: the ticket is that of the uninterrupted training."""
    tickets = []
    for parts in ((8,), (4, 8)):
        folder = tmp_path / f"in {len(parts)}"
        for number, steps in enumerate(parts):
            model, tokenizer = load(base)
            trains_the_embedding(model)
            settings = arguments(folder, max_steps=8, save_strategy="steps", save_steps=4)
            callback = DrawCallback(every=4, alpha=0.5, out=folder / "ticket")
            trainer = Trainer(model, settings, train_dataset=examples(tokenizer), callbacks=[callback, Stop(steps)])
            trainer.train(resume_from_checkpoint=bool(number))
        tickets.append(Ticket.load(folder / "ticket"))
    assert tickets[0].token_ids == tickets[1].token_ids and torch.equal(tickets[0].rows_KD, tickets[1].rows_KD)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every": 0}, "every is 0; it should be greater than 0"),
        ({"alpha": 1.5}, "alpha is 1.5; it should be less than 1"),
        ({"method": "exactly"}, "method is exactly; it should be 'exact' or 'asymp'"),
        ({"stop_overlap": 2.0}, "stop_overlap is 2.0; it should be less than or equal to 1"),
        ({"stop_overlap": 0.5, "stop_draws": 0}, "stop_draws is 0; it should be greater than 0"),
    ],
)
def test_callback_refuses_an_argument_in_one_sentence(arguments, said):
    with pytest.raises(ValueError) as caught:
        DrawCallback(**arguments)
    assert str(caught.value) == f"DrawCallback: {said}"


def test_callback_says_what_it_cannot_do(base, tmp_path):
    model, tokenizer = load(base)
    model.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    text = examples(tokenizer)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=text, callbacks=[DrawCallback()])
    with pytest.raises(ValueError, match="the input embedding is frozen"):
        trainer.train()
    trains_the_embedding(model)
    other = make_model_folder(tmp_path / "other", vocab_size=300)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=text, callbacks=[DrawCallback(base=other)])
    with pytest.raises(UserError, match="base .*other is not"):
        trainer.train()


def test_callback_without_a_drawn_row_writes_nothing(base, tmp_path, caplog):
    model, tokenizer = load(base)
    trains_the_embedding(model)
    settings = arguments(tmp_path, max_steps=2, learning_rate=1e-7)
    callback = DrawCallback(out=tmp_path / "ticket")
    Trainer(model, settings, train_dataset=examples(tokenizer), callbacks=[callback]).train()
    assert not (tmp_path / "ticket").exists() and "no ticket is written" in caplog.text


# ---- rows


@pytest.mark.parametrize("head", [False, True])
def test_rows_in_the_trainer_with_checkpointing_and_a_resumed_training(base, tmp_path, head):
    """Gradient checkpointing, decay, clipping, accumulation; resumed, the same weights to the bit, given the base rows."""
    weights = []
    for parts in ((8,), (4, 8)):
        folder = tmp_path / f"in {len(parts)}"
        for number, steps in enumerate(parts):
            model, tokenizer = load(base)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            model.requires_grad_(False)
            train_only_rows(model, CHOSEN, base=embedding(model)[CHOSEN], head=head)
            options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
            options |= {"gradient_checkpointing": True, "max_grad_norm": 0.1, "weight_decay": 0.0 if head else 0.1}
            trainer = Trainer(
                model, arguments(folder, **options), train_dataset=examples(tokenizer), callbacks=[Stop(steps)]
            )
            trainer.train(resume_from_checkpoint=bool(number))
        after = model.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if head else set())
        assert all(moved(before[name], after[name]) == CHOSEN for name in changed)
        weights.append(after)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rows_and_draws_in_trl(base, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model, tokenizer = load(base)
    before_VD = embedding(model)
    model.requires_grad_(False)
    train_only_rows(model, CHOSEN)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.3, weight_decay=0.1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, max_length=32, disable_tqdm=True,
    )  # fmt: skip
    text = Dataset.from_list([{"text": " ".join(pair)} for pair in SENTENCES])
    callback = DrawCallback(every=3, alpha=0.5, out=tmp_path / "ticket")
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=text, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    assert moved(before_VD, embedding(trainer.model)) == CHOSEN
    assert set(Ticket.load(tmp_path / "ticket").token_ids) <= set(CHOSEN)
    assert [line["step"] for line in trainer.state.log_history if "ticket_size" in line] == [3, 6]


# ---- new tokens


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_from_start_to_finish(tmp_path, tied):
    """Added, trained alone, saved as a model and as an adapter: both give the trained model's logits."""
    base = make_model_folder(tmp_path / "base", tied=tied)
    model, tokenizer = load(base)
    pieces = [tokenizer(word)["input_ids"] for word in ("catdog", "bird-house")]
    old_VD = embedding(model)
    ids = add_tokens(model, tokenizer, ["catdog", "bird-house"], pad_to_multiple_of=64)
    assert ids == [len(old_VD), len(old_VD) + 1] and len(embedding(model)) % 64 == 0
    head_VD = model.get_output_embeddings().weight
    for number, replaced in zip(ids, pieces, strict=True):
        assert torch.allclose(embedding(model)[number], old_VD[replaced].mean(dim=0))
        assert torch.allclose(head_VD[number], head_VD[replaced].mean(dim=0))
    model.save_pretrained(tmp_path / "resized")

    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)
    train_only_rows(model, ids, head=True)
    text = examples(tokenizer, [("the catdog sees", "the bird-house"), ("a bird-house", "le catdog voit")] * 2)
    Trainer(model, arguments(tmp_path, weight_decay=0.1), train_dataset=text).train()
    for name, value in model.state_dict().items():
        trained = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert moved(before[name], value) == ids if trained else torch.equal(before[name], value)

    model.save_pretrained(tmp_path / "merged")
    save_token_adapter(model, ids, tmp_path / "adapter", base_model=str(tmp_path / "resized"))
    row = torch.tensor([tokenizer("the catdog sees a bird-house")["input_ids"]])
    assert set(ids) <= set(row[0].tolist())
    model.eval()
    expected = model(input_ids=row).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    adapted = PeftModel.from_pretrained(resized, tmp_path / "adapter")
    assert torch.equal(merged(input_ids=row).logits, expected)
    assert torch.equal(adapted(input_ids=row).logits, expected)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["token_indices"] == ids
    rows = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert torch.equal(rows["base_model.model.model.embed_tokens.trainable_tokens_delta"], embedding(model)[ids])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "at least one"), (["new", "new"], "none twice"), (["cat"], "'cat' is in the vocabulary")],
)
def test_tokens_that_cannot_be_added(base, tokens, message):
    model, tokenizer = load(base)
    with pytest.raises(ValueError, match=message):
        add_tokens(model, tokenizer, tokens)


def test_an_adapter_cannot_hold_a_bias(base, tmp_path):
    model, _ = load(base)
    model.set_output_embeddings(torch.nn.Linear(32, len(embedding(model))))
    with pytest.raises(ValueError, match="cannot hold the bias"):
        save_token_adapter(model, [3], tmp_path / "adapter")
