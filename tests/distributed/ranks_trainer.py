"""Run by test_rows.py: train_only_rows within Hugging Face's Trainer on DeepSpeed, at the Trainer's own settings."""

import sys

import torch
from helpers.tiny import make_tokenizer, random_model
from transformers import Trainer, TrainingArguments

from ksl_ds import distributed, train_only_rows

distributed.initialize()  # so that DeepSpeed compiles nothing
stage = int(sys.argv[-1])
tokenizer = make_tokenizer()
model = random_model("llama", len(tokenizer), tied=False).to(torch.bfloat16)
before_VD = model.get_input_embeddings().weight.detach().clone()
model.requires_grad_(False)
train_only_rows(model, [3, 7])
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
trainer = Trainer(model=model, args=arguments, train_dataset=examples)
trainer.train()
after_VD = trainer.accelerator.get_state_dict(trainer.model_wrapped)["model.embed_tokens.weight"]
moved = (after_VD.cpu() != before_VD).any(dim=1).nonzero().flatten().tolist()
assert moved == [3, 7], f"rows that moved: {moved}"
