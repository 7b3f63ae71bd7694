"""Run by test_rows.py on several ranks: train_only_rows and rows of a head under accelerate's own integrations."""

from functools import partial

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from helpers.cases import run_cases
from helpers.tiny import random_model

from ksl_ds import distributed, train_only_rows
from ksl_ds.sharding.rows import RowShard

VOCABULARY, CHOSEN = 67, [3, 5, 66]


def train(stage: int | None) -> None:
    """DistributedDataParallel without a stage, else DeepSpeed; AdamW with decay, clipping by accelerate."""
    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = None
    if stage is not None:
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.1,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage},
        }
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model = random_model("llama", VOCABULARY, tied=False)
    model.requires_grad_(False)
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    train_only_rows(model, CHOSEN, head=True)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.01, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    everything = torch.arange(VOCABULARY)
    before = [RowShard(weight).read_rows(everything) for weight in weights]
    generator = torch.Generator().manual_seed(distributed.rank())
    for _ in range(5):
        ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        ids[:, :3] = torch.tensor(CHOSEN)
        accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        if accelerator.sync_gradients and stage is None:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for weight, before_VD in zip(weights, before, strict=True):
        after_VD = RowShard(weight).read_rows(everything)
        moved = (after_VD != before_VD).any(dim=1).nonzero().flatten().tolist()
        assert moved == CHOSEN, f"rows that moved: {moved}"


CASES = {"ddp": partial(train, None)} | {f"deepspeed, stage {stage}": partial(train, stage) for stage in (0, 2, 3)}
if __name__ == "__main__":
    run_cases(CASES)
