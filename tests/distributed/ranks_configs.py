"""Run by test_configs.py on several ranks: every shipped DeepSpeed configuration trains two steps."""

import math
from functools import partial
from pathlib import Path

import torch
from helpers.cases import run_cases
from helpers.processes import REPOSITORY
from helpers.runs import losses

from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe


def check(name: str, precision: str) -> None:
    run_dir = f"{name}-{precision}"
    tune.main(
        load_recipe(
            Recipe, "recipe.yaml", [f"run_dir={run_dir}", f"deepspeed={name}", f"training.precision={precision}"]
        )
    )
    found = losses(Path(run_dir), "embed_tuning")
    assert len(found) == 2 and all(map(math.isfinite, found)), found


# DeepSpeed trains in fp16 on GPUs only.
PRECISIONS = ("bf16", "fp16") if torch.cuda.is_available() else ("bf16",)
NAMES = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))
CASES = {f"{name}, {precision}": partial(check, name, precision) for name in NAMES for precision in PRECISIONS}
if __name__ == "__main__":
    run_cases(CASES)
