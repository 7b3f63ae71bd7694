"""Run by test_rows.py on several ranks: rows outside the chosen ones stay bit-identical, whatever the engine does."""

import itertools
import unittest.mock
from functools import partial

import deepspeed
import torch
from helpers.cases import run_cases
from helpers.tiny import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from ksl_ds import distributed, train_only_rows
from ksl_ds.sharding.engine import destroy_engine
from ksl_ds.sharding.rows import RowShard

VOCABULARY, STEPS, CHOSEN = 67, 50, [3, 5, 66]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# DeepSpeed wants a CPU that is fast in fp16; a slow one computes it too.
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
CHOSEN_MASK = torch.zeros(VOCABULARY, dtype=torch.bool)
CHOSEN_MASK[CHOSEN] = True


def build(tied: bool, precision: str, stage: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES["llama"], vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model = model.to(DTYPES[precision])
    if stage == 3:
        deepspeed.zero.Init(
            module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
            dtype=DTYPES[precision],
        )  # fmt: skip
    return model


def train(stage, precision, tied, early, offload, steps=STEPS, whole_model=False, head=False):
    """Rows before and after training with decay, momentum, clipping and accumulation; the norms that were logged.

    Of the input embedding, or of the output head, which then trains beside it.
    """
    model = build(tied, precision, stage)
    if not whole_model:
        model.requires_grad_(False)
    weight = (model.get_output_embeddings() if head else model.get_input_embeddings()).weight
    for trains in {weight, model.get_input_embeddings().weight}:
        trains.requires_grad_(True)
    everything = torch.arange(VOCABULARY)
    initial_VD = RowShard(weight).read_rows(everything)
    handle = train_only_rows(model, CHOSEN, head=head) if early else None
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 128},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    handle = handle or train_only_rows(engine, CHOSEN, head=head)
    shard = RowShard(weight)
    before_VD = shard.read_rows(everything)
    generator = torch.Generator().manual_seed(distributed.rank())
    for _ in range(2 * steps):
        ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    after_VD = shard.read_rows(everything)
    norm = engine.get_global_grad_norm()
    handle.remove()
    destroy_engine(engine)
    weights_VD = RowShard(weight).read_rows(everything)
    assert torch.equal(weights_VD[~CHOSEN_MASK], initial_VD[~CHOSEN_MASK]), (stage, precision, early)
    return before_VD, after_VD, weights_VD, norm


def check(*case, **options):
    before_VD, after_VD, weights_VD, norm = train(*case, **options)
    moved_V = (before_VD != after_VD).any(dim=1)
    assert torch.equal(moved_V, CHOSEN_MASK), (case, moved_V.nonzero().flatten())
    # The copy that computes has the same rows untouched; its chosen rows are the masters, rounded.
    assert torch.equal(weights_VD, after_VD.to(DTYPES[case[1]]).float()), case
    assert norm is None or 0 < float(norm) < 100, case


def check_flat(*case, **options):
    """Stage 0 in 16 bits with masters in one flat tensor, as for DeepSpeed's FusedAdam."""
    with unittest.mock.patch.object(deepspeed.runtime.engine, "FusedAdam", torch.optim.AdamW):
        check(*case, **options)


CASES = {}
for number, (stage, precision, tied) in enumerate(itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (True, False))):
    CASES[f"stage {stage}, {precision}, {'tied' if tied else 'untied'}"] = partial(
        check, stage, precision, tied, number % 2 == 0, offload=False, steps=STEPS if stage == 3 else 10
    )
for number, (stage, precision) in enumerate(itertools.product((0, 1, 2, 3), ("fp32", "bf16"))):
    CASES[f"head, stage {stage}, {precision}"] = partial(
        check, stage, precision, False, number % 2 == 1, offload=False, steps=5, head=True
    )
CASES |= {
    "head, offload, stage 3": partial(check, 3, "bf16", False, False, offload=True, steps=5, head=True),
    "head, masters apart, fp16": partial(check, 0, "fp16", False, True, offload=False, steps=5, head=True),
    "offload, stage 3": partial(check, 3, "bf16", True, False, offload=True, steps=10),
    "offload, stage 2": partial(check, 2, "fp32", False, True, offload=True, steps=10),
    # Stage 0 in 16 bits, whose masters only DeepSpeed's wrappers know: some keep them apart, some flat.
    "masters apart, fp16": partial(check, 0, "fp16", True, True, offload=False, steps=10),
    "masters apart, bf16": partial(check, 0, "bf16", False, True, offload=False, steps=5, whole_model=True),
    "masters flat, early": partial(check_flat, 0, "bf16", True, True, offload=False, steps=5, whole_model=True),
    "masters flat, late": partial(check_flat, 0, "bf16", False, False, offload=False, steps=5, whole_model=True),
    # Other parameters that train along, in the same group, are none of its business.
    "whole model": partial(check, 3, "fp32", False, True, offload=False, steps=5, whole_model=True),
}
if __name__ == "__main__":
    run_cases(CASES)
