"""Run by test_lottery.py on several ranks: the methods that need no ticket, one after the other."""

from ksl_ds.commands import tune
from ksl_ds.recipe import Recipe, load_recipe
from ksl_ds.sharding import cluster
from ksl_ds.sharding.engine import quiet_libraries

cluster.start()
quiet_libraries(False)
SETTINGS = {
    "embed": [
        "embed_tuning.max_steps=6",
        "embed_tuning.schedule=linear",
        "training.precision=bf16",
        "training.gradient_checkpointing=true",
        "evaluation.num_beams=2",
    ],
    "full": ["full_tuning.learning_rate=0.01", "full_tuning.max_steps=6"],
    "lora": ["lora.learning_rate=0.01", "lora.max_steps=6"],
    "prefix": ["prefix.learning_rate=0.05", "prefix.max_steps=6", "prefix.num_virtual_tokens=4"],
}
for method, words in SETTINGS.items():
    # All pairs are the test text, in one batch a step, so that the losses of the steps can be compared.
    everything = ["text.max_test_pairs=null", "training.batch_size=12"]
    tune.run(load_recipe(Recipe, "recipe.yaml", [f"method={method}", f"run_dir={method}", *words, *everything]))
cluster.stop()
