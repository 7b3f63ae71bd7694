"""The learning rate of every step, and that the first one trains."""

from __future__ import annotations

import math

import pytest
import torch

from ksl_ds.config.schema import EmbedTuning
from ksl_ds.sharding.engine import adamw
from ksl_ds.training.loop import learning_rates


def rates(tuning: EmbedTuning, num_steps: int) -> list[float]:
    """The learning rate that each of the steps is taken with."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = adamw([weight], tuning)
    schedule = learning_rates(optimizer, tuning, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == found[-1:]
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    return found


def test_the_warm_up_is_counted_from_step_1():
    tuning = EmbedTuning(learning_rate=8.0, schedule="linear", warmup_ratio=0.4)
    # Four warm-up steps; then (10 - s + 1) / 6 of the rate for step s, as transformers has it: the last is above 0.
    expected = [2, 4, 6, 8, 8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6]
    assert rates(tuning, 10) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    ("num_steps", "warmup"), [(1, 0.03), (1, 0.0), (7, 0.03), (7, 0.5), (40, 0.1), (40, 0.0), (3, 0.99)]
)
def test_only_warm_up_steps_differ_from_transformers(schedule, num_steps, warmup):
    from transformers import get_scheduler

    tuning = EmbedTuning(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup)
    warmup_steps = math.ceil(warmup * num_steps)
    optimizer = adamw([torch.nn.Parameter(torch.ones(1))], tuning)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps).lr_lambdas[0]
    found = rates(tuning, num_steps)
    assert found[warmup_steps:] == [0.5 * theirs(step) for step in range(warmup_steps, num_steps)]
    assert found[:warmup_steps] == [0.5 * ((step + 1) / warmup_steps) for step in range(warmup_steps)]
    assert min(found) > 0
