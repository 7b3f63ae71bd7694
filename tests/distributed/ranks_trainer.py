"""Run by test_rows.py: rows and draws within Hugging Face's Trainer on DeepSpeed, at the Trainer's own settings."""

import sys

import torch
from helpers.tiny import make_tokenizer, random_model
from transformers import Trainer, TrainingArguments

from ksl_ds import Ticket, distributed, train_only_rows
from ksl_ds.integrations import DrawCallback

distributed.initialize()  # so that DeepSpeed compiles nothing
stage = int(sys.argv[-1])
tokenizer = make_tokenizer()
model = random_model("llama", len(tokenizer), tied=False).to(torch.bfloat16)
names = ("model.embed_tokens.weight", "lm_head.weight")
before = {name: model.state_dict()[name].clone() for name in names}
model.requires_grad_(False)
train_only_rows(model, [3, 7], head=True)
examples = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(16)]
arguments = TrainingArguments(
    output_dir="trainer",
    max_steps=5,
    per_device_train_batch_size=2,
    learning_rate=0.05,
    weight_decay=0.1,
    bf16=True,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    deepspeed={
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
    },
)
callback = DrawCallback(every=2, alpha=0.9, out=f"ticket{stage}")
trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[callback])
trainer.train()
after = trainer.accelerator.get_state_dict(trainer.model_wrapped)
for name in names:
    moved = (after[name].cpu() != before[name]).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3, 7], f"rows of {name} that moved: {moved}"
draws = [line for line in trainer.state.log_history if "ticket_size" in line]
assert [line["step"] for line in draws] == [2, 4]
ticket = Ticket.load(f"ticket{stage}")
assert ticket.token_ids and set(ticket.token_ids) <= {3, 7}, ticket.token_ids
