"""Run by test_lottery.py on several ranks: what a rank holds during training, and draws that do not disturb it."""

import torch
from helpers.runs import losses

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Draw, EarlyStopping, Recipe
from ksl_ds.sharding.draw import DrawMonitor
from ksl_ds.sharding.engine import set_library_verbosity
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.loop import train
from ksl_ds.training.run import open_run
from ksl_ds.training.stages import token_frequency

distributed.initialize()
set_library_verbosity(False)
recipe = load_recipe(Recipe, "recipe.yaml", ["run_dir=zero3"])
with open_run(recipe) as run:
    embedding = run.model.get_input_embeddings().weight
    shard = RowShard(embedding)
    base_RD = shard.read()
    held = []

    def count(step: int) -> tuple[dict, bool]:
        """Elements that this rank holds between two steps."""
        parameters = list(run.model.parameters())
        held.append(sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in parameters))
        return {}, False

    def states() -> int:
        optimizer = embedding._z3_optimizer
        return sum(state["exp_avg"].numel() for state in optimizer.optimizer.state.values())

    def tune(after_step, at_end):
        shard.write(base_RD)
        return train(
            run, [embedding], stage=Stage.EMBED_TUNING, tuning=recipe.embed_tuning, at_end=at_end, monitor=after_step
        )

    _, moments = tune(count, states)
    total = sum(parameter.ds_numel for parameter in run.model.parameters())
    share = total / distributed.world_size()
    assert len(held) == 6
    assert all(share <= elements <= 1.01 * share for elements in held), (held, share)
    assert moments == embedding.ds_numel / distributed.world_size(), moments

    # Draws at every step: the same losses to the bit, and the last ticket is the one of a draw at the end.
    def monitor(**settings) -> DrawMonitor:
        draw = Draw(selection="top_k", top_k=9, every=1, **settings)
        return DrawMonitor(shard, base_RD, draw, seed=0, frequency_V=token_frequency(run))

    seen = []
    watching = monitor()

    def watch(step: int) -> tuple[dict, bool]:
        numbers, stop = watching(step)
        seen.append(numbers)
        return numbers, stop

    _, rows_RD = tune(watch, shard.read)
    logged = losses(run.dir, Stage.EMBED_TUNING)
    assert logged[6:] == logged[:6]
    assert [numbers["ticket_size"] for numbers in seen][1:] == [9] * 5  # the first step has learning rate 0
    assert all(0 <= numbers["ticket_overlap"] <= 1 and numbers["draw_seconds"] > 0 for numbers in seen)
    assert not torch.equal(rows_RD, base_RD)

    settled, _ = tune(monitor(early_stopping=EarlyStopping(overlap=0.01, draws=2)), lambda: None)
    logged = losses(run.dir, Stage.EMBED_TUNING)
    assert settled.steps < settled.planned_steps and logged[12:] == logged[: settled.steps]
distributed.shutdown()
