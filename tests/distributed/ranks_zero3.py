"""Run by test_lottery.py on several ranks: what a rank holds during training."""

from pathlib import Path

from ksl_ds.recipe import Recipe, load_recipe
from ksl_ds.sharding import cluster
from ksl_ds.sharding.engine import quiet_libraries
from ksl_ds.training.loop import train
from ksl_ds.training.run import open_run

cluster.start()
quiet_libraries(False)
recipe = load_recipe(Recipe, "recipe.yaml", ["run_dir=zero3"])
with open_run(recipe) as run:
    embedding = run.model.get_input_embeddings().weight
    held = []

    def count(step: int, learning_rate: float) -> bool:
        """Elements that this rank holds between two steps."""
        parameters = list(run.model.parameters())
        held.append(sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in parameters))
        return False

    def states() -> int:
        optimizer = embedding._z3_optimizer
        return sum(state["exp_avg"].numel() for state in optimizer.optimizer.state.values())

    _, moments = train(
        run, [embedding], stage="embed_tuning", tuning=recipe.embed_tuning, at_end=states, after_step=count
    )
    total = sum(parameter.ds_numel for parameter in run.model.parameters())
    share = total / cluster.world_size()
    assert len(held) == 6
    assert all(share <= elements <= 1.01 * share for elements in held), (held, share)
    assert moments == embedding.ds_numel / cluster.world_size(), moments
assert Path("zero3/metrics.jsonl").exists()
cluster.stop()
