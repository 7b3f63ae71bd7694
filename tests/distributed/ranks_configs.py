"""Run by test_configs.py on several ranks: every shipped DeepSpeed configuration trains two steps in the given precision."""

import json
import math
import sys
from pathlib import Path

from helpers.processes import REPOSITORY

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.sharding.engine import set_library_verbosity

precision = next(word for word in sys.argv[1:] if not word.startswith("--"))
distributed.initialize()
set_library_verbosity(False)
for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
    words = [f"run_dir={path.stem}", f"deepspeed={path.name}", f"training.precision={precision}"]
    tune.main(load_recipe(Recipe, "recipe.yaml", words))
    lines = [json.loads(line) for line in Path(path.stem, "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses)), (path.name, losses)
distributed.shutdown()
