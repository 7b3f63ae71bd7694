"""One training run, the same for every method: order, schedule, clipping, logging, checkpoints.

The caller chooses the parameters and may hook their gradients. The data order is a function of (seed, step). Losses are those
of the global batch, hence comparable between numbers of ranks. SIGTERM or SIGUSR1 stops a run after the current step, with a
checkpoint; a resumed run has bit-identical losses.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ksl_ds import distributed
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Tuning
from ksl_ds.errors import Interrupted, UserError
from ksl_ds.model.row_parameter import TicketRows
from ksl_ds.sharding.checkpoint import Checkpoints
from ksl_ds.sharding.draw import DrawMonitor
from ksl_ds.sharding.engine import adamw, training_engine
from ksl_ds.sharding.states import OptimizerState, optimizer_tensors
from ksl_ds.text.batches import BatchOrder, response_tokens
from ksl_ds.text.packing import Packing
from ksl_ds.training.loss import can_keep_logits, corpus_loss, response_nll
from ksl_ds.training.packing import packing_of
from ksl_ds.training.run import RunContext

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class TrainingStats:
    """Statistics of a training run."""

    steps: int = 0
    planned_steps: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # of this rank
    optimizer_bytes: int = 0  # Adam's moments on all ranks
    valid_loss: float | None = None
    settled: bool = False  # ended before its planned steps, since the ticket had settled


def total_steps(tuning: Tuning, num_examples: int, batch_size: int) -> int:
    """Optimizer steps of a tuning: `max_steps`, or its epochs, the last batch of an epoch being a smaller one."""
    if tuning.max_steps is not None:
        return tuning.max_steps
    return math.ceil(tuning.epochs * math.ceil(num_examples / batch_size))


def learning_rates(optimizer: torch.optim.Optimizer, tuning: Tuning, num_steps: int) -> LambdaLR:
    """The learning rate of each step: W warm-up steps with 1/W, 2/W, ... 1 of it, then transformers' schedule.

    transformers gives its first warm-up step a learning rate of 0, in which nothing trains; after the warm-up the two are
    the same.
    """
    from transformers import get_scheduler

    warmup_steps = math.ceil(tuning.warmup_ratio * num_steps)
    name = "constant_with_warmup" if tuning.schedule == "constant" else tuning.schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    share_of = schedule.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: (step + 1) / warmup_steps if step < warmup_steps else share_of(step))


def train(
    run: RunContext,
    parameters: list[nn.Parameter],
    *,
    stage: Stage,
    tuning: Tuning,
    at_end: Callable[[], Result],
    monitor: DrawMonitor | None = None,
    ticket_rows: TicketRows | None = None,
) -> tuple[TrainingStats, Result]:
    """Trains `parameters` of the run's model and freezes all others.

    Returns what it cost and what `at_end` returned, which is called while the engine still holds the fp32 master weights.
    `monitor` draws between steps; `ticket_rows` are given when `parameters` are theirs alone.

    Raises
    ------
    UserError
        On every rank, if the loss is not finite, or a checkpoint cannot be written or loaded.
    Interrupted
        On every rank, after a checkpoint, if a signal stops any of them.
    """
    recipe = run.recipe
    model = run.model
    tracker = run.tracker
    examples = run.examples["train"]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    training = recipe.training
    order = BatchOrder(len(examples), training.batch_size, recipe.seed)
    outcome = TrainingStats(planned_steps=total_steps(tuning, len(examples), training.batch_size))
    optimizer = adamw(parameters, tuning)
    scheduler = learning_rates(optimizer, tuning, outcome.planned_steps)
    torch.manual_seed(recipe.seed + distributed.rank())  # dropout differs over ranks and repeats over runs
    checkpoints = run.checkpoints(stage)
    started = time.perf_counter()
    with training_engine(model, optimizer, scheduler, run.config) as engine, distributed.stop_signals() as signals:
        state = OptimizerState(engine, None if ticket_rows is None else ticket_rows.ids_K.tolist())
        packing = packing_of(run, engine)  # before a checkpoint is loaded, so that a resumed run decides alike
        saves = recipe.checkpoint.every is not None or recipe.resume == "auto"
        if recipe.resume == "auto":
            _resume(run, stage, checkpoints, state, outcome, monitor)
        started -= outcome.seconds
        remaining = range(outcome.steps, outcome.steps if outcome.settled else outcome.planned_steps)
        label = stage.label
        with distributed.progress(remaining, label, total=outcome.planned_steps, done=outcome.steps) as steps:
            for step in steps:
                step_started = time.perf_counter()
                learning_rate = scheduler.get_last_lr()[0]
                indices = order.batch(step)
                loss, ends = train_step(engine, run, indices, signals, packing)
                if not math.isfinite(loss):
                    raise UserError(
                        f"{stage}: the loss of step {step + 1} is {loss}; lower its learning_rate "
                        f"({tuning.learning_rate}) or use training.precision=bf16 or fp32"
                    )
                batch_tokens = sum(len(examples[index]) for index in indices)
                outcome.steps = step + 1
                seconds = time.perf_counter() - step_started
                numbers, outcome.settled = monitor(step + 1) if monitor is not None else ({}, False)
                last = outcome.settled or step + 1 == outcome.planned_steps
                numbers |= _validate(run, engine, outcome, last, packing)
                if (step + 1) % training.log_every == 0 or numbers or last:
                    norm = engine.get_global_grad_norm()
                    tracker.log(
                        stage,
                        step + 1,
                        loss=loss,
                        learning_rate=learning_rate,
                        gradient_norm=None if norm is None else float(norm),
                        tokens_per_second=batch_tokens / seconds,
                        peak_memory_bytes=distributed.peak_memory(),
                        **numbers,
                    )
                steps.set_postfix(loss=f"{loss:.3f}")
                every = recipe.checkpoint.every
                due = every is not None and (step + 1) % every == 0
                if ends or due or (last and saves):
                    outcome.seconds = time.perf_counter() - started
                    watched = monitor.state_dict() if monitor is not None else {}
                    checkpoints.save(step + 1, state, {"outcome": asdict(outcome), "monitor": watched})
                if ends:
                    raise Interrupted(
                        f"{label} was stopped by a signal after step {step + 1} of {outcome.planned_steps}; checkpoint "
                        f"saved in {checkpoints.folder}, resume with resume=auto"
                    )
                if last:
                    break
        outcome.seconds = time.perf_counter() - started
        outcome.peak_memory_bytes = distributed.peak_memory()
        moments = sum(moment.nbytes for moment in optimizer_tensors(engine))
        outcome.optimizer_bytes = sum(distributed.gather_objects(moments))
        engine.empty_partition_cache()  # weights that DeepSpeed fetched for a step that does not come
        result = at_end()
    return outcome, result


def train_step(
    engine: Any, run: RunContext, indices: list[int], signals: list[int], packing: Packing
) -> tuple[float, bool]:
    """One optimizer step on the global batch of the training examples `indices`.

    Returns the batch's mean loss of a response token, and whether any rank has received one of `signals` by its end; the
    same on every rank.
    """
    examples = run.examples["train"]
    world_size = distributed.world_size()
    run.model.train()
    keeps_logits = can_keep_logits(run.model)
    num_tokens = response_tokens([examples[index] for index in indices])
    size = run.recipe.training.micro_batch_size
    micro_batches, packed = packing.micro_batches(examples, indices, distributed.rank(), world_size, size)
    # The engine counts micro-batches itself; a short last batch is filled up with empty ones.
    micro_batches += [[]] * (engine.gradient_accumulation_steps() - len(micro_batches))
    sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
    for micro_batch in micro_batches:
        batch = packing.collate([examples[index] for index in micro_batch], run.pad_id, packed=packed)
        loss = response_nll(engine, batch, keeps_logits)
        sums[0] += loss.detach().double()
        # DeepSpeed averages over ranks and accumulation steps; this makes it a mean over the global batch.
        engine.backward(loss * (world_size * len(micro_batches) / num_tokens))
        engine.step()
    sums[1] = len(signals)
    nll, ends = distributed.all_reduce(sums).tolist()
    return nll / num_tokens, ends > 0


def _validate(run: RunContext, engine: Any, outcome: TrainingStats, last: bool, packing: Packing) -> dict[str, Any]:
    """The validation loss where it is due, for the log and the outcome."""
    training = run.recipe.training
    valid = run.examples.get("valid", [])
    if not valid or not (last or (training.eval_every and outcome.steps % training.eval_every == 0)):
        return {}
    outcome.valid_loss = corpus_loss(engine, run.model, valid, run.pad_id, training.micro_batch_size, packing)
    return {"valid_loss": outcome.valid_loss}


def _resume(
    run: RunContext,
    stage: Stage,
    checkpoints: Checkpoints,
    state: OptimizerState,
    outcome: TrainingStats,
    monitor: DrawMonitor | None,
) -> None:
    """Goes back to the newest checkpoint, if there is one, and drops what was logged after it."""
    saved = checkpoints.load(state)
    if saved is not None:
        for item in fields(outcome):
            setattr(outcome, item.name, saved["outcome"][item.name])
        if monitor is not None:
            monitor.load_state_dict(saved["monitor"])
        logger.info(f"resuming {stage.label} after step {outcome.steps} of {outcome.planned_steps}")
        resumed = {"stage": str(stage), "step": outcome.steps, "ranks": distributed.world_size()}
        resumed["ranks_before"] = saved["world_size"]
        run.results.resumed = [*run.results.resumed, resumed]
    run.tracker.rewind(stage, outcome.steps)
