"""Run by test_estimated_memory.py on several ranks: what the real engine holds and sends, beside what `estimate` says."""

import gc
import json
from functools import partial
from pathlib import Path

import torch
from helpers.cases import run_cases
from torch.utils._pytree import tree_iter

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.estimate.memory import rank_needs
from ksl_ds.estimate.plan import Estimated, plan_of
from ksl_ds.model.adapters import adapter_config, with_adapter
from ksl_ds.model.dry_run import LiveBytes
from ksl_ds.model.row_hooks import TrainedRows, train_only_rows
from ksl_ds.model.row_parameter import TicketRows
from ksl_ds.sharding.engine import adamw, training_engine
from ksl_ds.sharding.rows import RowShard
from ksl_ds.text.batches import collate_training
from ksl_ds.text.packing import collate_packed
from ksl_ds.text.prompt import Example
from ksl_ds.training.loss import response_nll
from ksl_ds.training.run import open_run

BATCH, LENGTH, RESPONSE, ROWS = 4, 64, 32, 7
NOTHING_STAYS = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
# Two of the model's layers, of 147,456 elements each: what full tuning under checkpointing needs. Norms stay whole.
SOME_STAYS = {
    "stage3_max_live_parameters": 300_000,
    "stage3_max_reuse_distance": 300_000,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_param_persistence_threshold": 200,
}
# Name: DeepSpeed's settings, precision, checkpointing, the methods measured one after the other, tokens that prompts share.
SETTINGS = {
    "nothing stays": (NOTHING_STAYS, "bf16", False, ("full", "embed"), 0),
    "some stays": (SOME_STAYS, "bf16", True, ("full", "embed", "ticket, hooks", "ticket, rows", "lora"), 0),
    "fp32": (NOTHING_STAYS, "fp32", False, ("embed",), 0),
    "stage 2": ({"stage": 2}, "bf16", False, ("full",), 0),
    "packed": (NOTHING_STAYS, "bf16", False, ("full", "embed"), 20),
}


class Wire(LiveBytes):
    """Counts what this rank receives from collectives too, as rings do it."""

    received = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            size = [sum(t.nbytes for t in tree_iter(value) if isinstance(t, torch.Tensor)) for value in args]
            share = (distributed.world_size() - 1) / distributed.world_size()
            # The first argument is the output, of a reduce-scatter the part; an all-reduce is both in one.
            factor = {"_allgather_base_": size[0], "allgather_": size[0], "allgather_into_tensor_coalesced_": size[0]}
            factor |= {"_reduce_scatter_base_": size[1], "reduce_scatter_": size[1], "allreduce_": 2 * size[0]}
            self.received += share * factor.get(func.__name__.partition(".")[0], 0)
        return super().__torch_dispatch__(func, types, args, kwargs)


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(run, method: str, shared: int) -> dict[str, float]:
    """Bytes of this rank while `method` trains, on pairs whose prompts share their first tokens."""
    model, recipe = run.model, run.recipe
    embedding = model.get_input_embeddings().weight
    rows: TicketRows | TrainedRows | None = None
    if method == "lora":
        model = with_adapter(model, adapter_config(model.config, recipe, "lora"))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        model.requires_grad_(False)
        parameters = list(model.parameters()) if method == "full" else [embedding]
        for parameter in parameters:
            parameter.requires_grad_(True)
        if method == "ticket, hooks":
            rows = train_only_rows(model, range(ROWS))
        elif method == "ticket, rows":
            ids = torch.arange(ROWS)
            rows = TicketRows(model, ids, RowShard(embedding).read_rows(ids))
            embedding.requires_grad_(False)
            parameters = [rows.delta_KD]
    weights = sum(
        (p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else 0) + p.detach().nbytes for p in model.parameters()
    )
    before = held()
    examples = [Example([5] * (LENGTH - RESPONSE), [6] * RESPONSE)] * (BATCH - 1)
    examples += [Example([5] * (LENGTH - RESPONSE - 1), [6] * RESPONSE)]  # a padding mask, as real text has
    batch = collate_training(examples, 0)
    if shared:
        own = LENGTH - RESPONSE - shared
        examples = [Example([5] * shared + [7 + number] * own, [6] * RESPONSE) for number in range(BATCH)]
        batch = collate_packed(examples, next(model.parameters()).dtype, shares_prompt=True)
    found: dict[str, float] = {}
    with training_engine(model, adamw(parameters, recipe.embed_tuning), None, run.config) as engine:
        for _ in range(3):  # DeepSpeed learns in the first step in which order weights are used
            found["wire"] = 0
            with Wire() as live:
                engine.module.train()
                loss = response_nll(engine, batch, True)
                engine.backward(loss)
                loss = None
            found["passes"], found["kept"] = live.peak, live.now
            found["wire"] += live.received
            with Wire() as live:
                engine.step()
            found["step"] = live.peak
            found["wire"] += live.received
        found["weights"] = sum(
            (p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else 0) + p.detach().nbytes for p in model.parameters()
        )
        optimizer = engine.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            found["gradients"] = optimizer.grad_partitions_flat_buffer.nbytes
        states = list(optimizer.optimizer.state.items())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p, _ in states}
        weights_at = {
            (p.ds_tensor if hasattr(p, "ds_tensor") else p.detach()).untyped_storage().data_ptr()
            for p in model.parameters()
        }
        found["optimizer"] = sum(size for at, size in storages.items() if at not in weights_at)
        found["optimizer"] += sum(v.nbytes for _, s in states for v in s.values() if isinstance(v, torch.Tensor))
        states = storages = optimizer = batch = None
        found["all"] = held() - before + weights
    if rows is not None:
        rows.remove()
    return found


def check(name: str) -> None:
    section, precision, checkpointing, methods, shared = SETTINGS[name]
    if distributed.is_rank0():
        section = {"stage": 3, "reduce_bucket_size": 50_000, **section}
        Path(f"{name}.json").write_text(json.dumps({"zero_optimization": section}))
    distributed.barrier()
    recipe = load_recipe(
        Recipe,
        "recipe.yaml",
        [
            f"run_dir=run {name}", f"deepspeed={name}.json", f"training.precision={precision}", "method=lora",
            f"training.micro_batch_size={BATCH}", f"training.batch_size={BATCH * distributed.world_size()}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}", f"text.max_length={LENGTH}",
            "training.packing=prefix",
        ],
    )  # fmt: skip
    plan = plan_of(recipe, RESPONSE, ROWS, shared)
    training = plan.training()
    report = {}
    with open_run(recipe) as run:
        for method in methods:
            cost = plan.method(Estimated(method), checkpointing=checkpointing)
            report[method] = (
                measure(run, method, shared),
                rank_needs(cost, training, plan.zero, distributed.world_size()),
            )
    for method, (found, needs) in report.items():
        states = needs.weights + needs.optimizer + needs.buffers
        said = {
            "weights": needs.weights,
            "gradients": needs.gradients,
            "optimizer": needs.optimizer,
            # Below stage 3 gradients are made in the backward pass and dropped in the step.
            "all": states + (needs.gradients if "gradients" in found else 0),
            "passes": needs.gathered + needs.working,
            "step": needs.step,
            "wire": needs.wire_step,
        }
        for kind, estimated in said.items():
            if kind in found:
                ratio = estimated / found[kind]
                assert 0.9 <= ratio <= 1.1, (method, kind, found[kind], estimated)


CASES = {name: partial(check, name) for name in SETTINGS}
if __name__ == "__main__":
    run_cases(CASES)
