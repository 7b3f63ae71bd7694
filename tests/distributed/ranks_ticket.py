"""Run by test_ticket_modes.py on several ranks: the two ways to train a ticket give the same losses and rows."""

from functools import partial

import deepspeed
import torch
from helpers.cases import run_cases
from helpers.tiny import SHAPES, random_model

from ksl_ds import distributed, train_only_rows
from ksl_ds.model.row_parameter import TicketRows
from ksl_ds.sharding.eight_bits import GROUP, round_trip
from ksl_ds.sharding.engine import destroy_engine
from ksl_ds.sharding.partition import is_rounded
from ksl_ds.sharding.rounding import ROUNDED, for_deepspeed, round_frozen
from ksl_ds.sharding.rows import RowShard

VOCABULARY, STEPS = 67, 50
TICKET = torch.tensor([0, 3, 5, 66])  # the padding row among them


def build(architecture: str, tied: bool, dtype: torch.dtype, stage: int, zero: dict, rounded: str) -> torch.nn.Module:
    model = random_model(architecture, VOCABULARY, tied=tied).to(dtype)
    if rounded == "before":
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if (
                    weight.dim() > 1
                    and "embed" not in name
                    and weight.numel() % (GROUP * distributed.world_size()) == 0
                ):
                    weight.copy_(round_trip(weight.flatten()).view_as(weight))
    if stage == 3:
        config_dict = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}
        deepspeed.zero.Init(module=model, config_dict_or_path=config_dict, dtype=dtype)
    if rounded == "after":
        round_frozen(model, EIGHT_BITS)
        assert sum(map(is_rounded, model.parameters())) == 14
    return model.requires_grad_(False)


def train(
    mode, architecture, tied, stage, dtype=torch.float32, steps=STEPS, accumulation=1, ticket=TICKET, decay=0.1,
    rounded="", **zero
):  # fmt: skip
    """Losses and gradient norms of all steps, and the ticket's rows, after AdamW with decay and clipping."""
    model = build(architecture, tied, dtype, stage, zero, rounded)
    shard = RowShard(model.get_input_embeddings().weight)
    base_KD = shard.read_rows(ticket)
    base_VD = shard.read_rows(torch.arange(VOCABULARY))
    if mode == "rows":
        rows = TicketRows(model, ticket, base_KD)
        trained = rows.delta_KD
    else:
        trained = model.get_input_embeddings().weight.requires_grad_(True)
        rows = train_only_rows(model, ticket) if mode == "hooks" else None
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }
    optimizer = torch.optim.AdamW([trained], lr=0.01, weight_decay=decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(distributed.rank())
    losses, norms = [], []
    for micro_step in range(accumulation * steps):
        ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if (micro_step + 1) % accumulation == 0:
            norms.append(float(engine.get_global_grad_norm() or 0))
    if mode == "rows":
        # Nothing of the matrix's size is trained: the optimizer holds this rank's part of the K rows, and padding.
        held = sum(state.numel() for state in optimizer.state.values() for state in [state["exp_avg"]])
        assert held <= len(ticket) * 32 / distributed.world_size() + 64, held
        after_KD = rows.moved(RowShard(trained).read_rows(torch.arange(len(ticket))))
    else:
        after_KD = shard.read_rows(ticket)
    destroy_engine(engine)
    if rows is not None:
        rows.remove()
    if mode == "rows":
        assert torch.equal(shard.read_rows(torch.arange(VOCABULARY)), base_VD)
        assert not any("ticket" in name for name, _ in model.named_modules())
    return torch.tensor(losses), torch.tensor(norms), after_KD, base_KD


def compare(*case, tolerance, **options):
    hooks, rows = (train(mode, *case, **options) for mode in ("hooks", "rows"))
    for quantity, ours, theirs in zip(("loss", "norm", "rows"), rows, hooks, strict=False):
        furthest = float((ours - theirs).abs().max())
        assert furthest <= tolerance, (case, quantity, furthest)
    moved = (rows[2] - rows[3]).abs().max()
    assert moved > 0.01, case


def compare_stages(architecture):
    """Stages 2 and 3, tied and untied, over the two numbers of ranks that the test starts."""
    for stage, tied in ((2, True), (3, False)) if distributed.world_size() == 2 else ((3, True),):
        compare(architecture, tied, stage, tolerance=1e-6)


def compare_with_embed_tuning(stage, dtype):
    """A ticket of all rows is embed tuning, to the bit; without decay, which goes elsewhere there."""
    ours, theirs = (
        train(mode, "llama", True, stage, dtype, steps=10, ticket=torch.arange(VOCABULARY), decay=0.0)
        for mode in ("hooks", "embed tuning")
    )
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def compare_rounded(dtype):
    """Frozen weights kept in 8 bits train as a model of rounded weights does, to the bit."""
    settings = for_deepspeed(EIGHT_BITS)["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    ours, theirs = (
        train("rows", "llama", False, dtype=dtype, steps=10, rounded=when, **settings) for when in ("after", "before")
    )
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


EIGHT_BITS = {"zero_optimization": {"stage": 3, ROUNDED: True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {architecture: partial(compare_stages, architecture) for architecture in SHAPES} | {
    "stage 0": partial(compare, "llama", True, 0, tolerance=1e-6, steps=10),
    "stage 1": partial(compare, "llama", False, 1, tolerance=1e-6, steps=10, accumulation=2),
    "offload": partial(compare, "llama", True, 3, tolerance=1e-6, steps=10, accumulation=2, **OFFLOAD),
    # In 16 bits a difference rounds otherwise than a row does.
    "bf16, stage 3": partial(compare, "llama", True, 3, tolerance=3e-2, steps=10, dtype=torch.bfloat16),
    "bf16, stage 2": partial(compare, "gemma", False, 2, tolerance=3e-2, steps=10, dtype=torch.bfloat16),
    "bf16, stage 0": partial(compare, "llama", True, 0, tolerance=3e-2, steps=10, dtype=torch.bfloat16),
    "all rows, fp32": partial(compare_with_embed_tuning, 3, torch.float32),
    "all rows, bf16": partial(compare_with_embed_tuning, 2, torch.bfloat16),
    "rounded, fp32": partial(compare_rounded, torch.float32),
    "rounded, bf16": partial(compare_rounded, torch.bfloat16),
}
if __name__ == "__main__":
    run_cases(CASES)
