"""One training run, the same for every method: order, schedule, clipping, logging.

Which parameters train, and what is done to their gradients, is the caller's business. The data order is a pure function of
(seed, step). Losses are reported as of the global batch, hence comparable between any numbers of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ksl_ds.errors import UserError
from ksl_ds.recipe import Tuning
from ksl_ds.sharding import cluster
from ksl_ds.sharding.engine import adamw, training_engine
from ksl_ds.text.batches import BatchOrder, collate_training, rank_micro_batches, response_tokens
from ksl_ds.training.loss import can_keep_logits, corpus_loss, response_nll
from ksl_ds.training.run import Run

Result = TypeVar("Result")
# After a step, called with its number: what to log beside its loss, and whether training ends here.
AfterStep = Callable[[int], tuple[dict[str, Any], bool]]


@dataclass
class TrainingRun:
    """What a training run cost and where it ended."""

    steps: int = 0
    planned_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0  # of this rank
    losses: list[float] = field(default_factory=list)
    valid_loss: float | None = None


def total_steps(tuning: Tuning, num_examples: int, batch_size: int) -> int:
    """Optimizer steps of a tuning: `max_steps`, or its epochs, the last batch of an epoch being a smaller one."""
    if tuning.max_steps is not None:
        return tuning.max_steps
    return math.ceil(tuning.epochs * math.ceil(num_examples / batch_size))


def train(
    run: Run,
    parameters: list[nn.Parameter],
    *,
    stage: str,
    tuning: Tuning,
    at_end: Callable[[], Result],
    after_step: AfterStep | None = None,
) -> tuple[TrainingRun, Result]:
    """Trains `parameters` of the run's model and freezes all others.

    Returns what it cost and what `at_end` returned, which is called while the engine still holds the fp32 master weights.

    Raises
    ------
    UserError
        On every rank, when the loss is not a finite number.
    """
    from transformers import get_scheduler

    recipe, model, pad_id, tracker = run.recipe, run.model, run.pad_id, run.tracker
    examples, valid = run.examples["train"], run.examples.get("valid", [])
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    training = recipe.training
    order = BatchOrder(len(examples), training.batch_size, recipe.seed)
    outcome = TrainingRun(planned_steps=total_steps(tuning, len(examples), training.batch_size))
    optimizer = adamw(parameters, tuning)
    scheduler = get_scheduler(
        "constant_with_warmup" if tuning.schedule == "constant" else tuning.schedule,
        optimizer,
        num_warmup_steps=math.ceil(tuning.warmup * outcome.planned_steps),
        num_training_steps=outcome.planned_steps,
    )
    torch.manual_seed(recipe.seed + cluster.rank())  # dropout differs over ranks and repeats over runs
    keeps_logits = can_keep_logits(model)
    world_size = cluster.world_size()
    started = time.perf_counter()
    with (
        training_engine(model, optimizer, scheduler, run.config) as engine,
        cluster.progress(range(outcome.planned_steps), stage.replace("_", " ")) as steps,
    ):
        for step in steps:
            model.train()
            step_started = time.perf_counter()
            learning_rate = scheduler.get_last_lr()[0]
            indices = order.batch(step)
            global_batch = [examples[index] for index in indices]
            num_tokens = response_tokens(global_batch)
            micro_batches = rank_micro_batches(indices, cluster.rank(), world_size, training.micro_batch_size)
            # The engine counts micro-batches itself; a short last batch is filled up with empty ones.
            micro_batches += [[]] * (engine.gradient_accumulation_steps() - len(micro_batches))
            nll = torch.zeros((), dtype=torch.float64, device=cluster.device())
            for micro_batch in micro_batches:
                batch = collate_training([examples[index] for index in micro_batch], pad_id)
                loss = response_nll(engine, batch, keeps_logits)
                nll += loss.detach().double()
                # DeepSpeed averages over ranks and accumulation steps; this makes it a mean over the global batch.
                engine.backward(loss * (world_size * len(micro_batches) / num_tokens))
                engine.step()
            loss_value = float(cluster.all_reduce(nll)) / num_tokens
            if not math.isfinite(loss_value):
                raise UserError(
                    f"{stage}: the loss of step {step + 1} is {loss_value}; lower its learning_rate "
                    f"({tuning.learning_rate}) or use training.precision=bf16 or fp32"
                )
            batch_tokens = sum(len(example.prompt_ids) + len(example.response_ids) for example in global_batch)
            outcome.steps, outcome.tokens = step + 1, outcome.tokens + batch_tokens
            outcome.losses.append(loss_value)
            seconds = time.perf_counter() - step_started
            last = step + 1 == outcome.planned_steps
            numbers, stop = after_step(step + 1) if after_step is not None else ({}, False)
            if valid and (last or stop or (training.valid_every and (step + 1) % training.valid_every == 0)):
                outcome.valid_loss = corpus_loss(engine, model, valid, pad_id, training.micro_batch_size)
                numbers["valid_loss"] = outcome.valid_loss
            if (step + 1) % training.log_every == 0 or numbers or last or stop:
                norm = engine.get_global_grad_norm()
                tracker.log(
                    stage,
                    step + 1,
                    loss=loss_value,
                    learning_rate=learning_rate,
                    gradient_norm=None if norm is None else float(norm),
                    tokens_per_second=batch_tokens / seconds,
                    peak_memory_bytes=cluster.peak_memory(),
                    **numbers,
                )
            steps.set_postfix(loss=f"{loss_value:.3f}")
            if stop:
                break
        outcome.seconds = time.perf_counter() - started
        outcome.peak_memory_bytes = cluster.peak_memory()
        result = at_end()
    return outcome, result
