"""Run by test_packing_ranks.py on two ranks under ZeRO-3: the losses of packed training steps against those of padded ones."""

from pathlib import Path

import pytest
from helpers.runs import losses
from helpers.tiny import make_model_folder

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.log import messages_on_stderr
from ksl_ds.sharding.engine import set_library_verbosity
from ksl_ds.training.loop import train
from ksl_ds.training.run import open_run

EXACT = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "opt")
PADDED = ("bloom", "mamba")
# Dropout draws other numbers for another layout.
SETTINGS = {"gemma2": {"head_dim": 8}, "qwen3": {"head_dim": 8}, "opt": {"dropout": 0.0}}

distributed.initialize()
set_library_verbosity(False)


def tune(architecture: str, packing: str, *words: str) -> tuple[list[float], float | None, str]:
    """Losses of the steps, the validation loss, and the layout of three steps of full tuning."""
    folder = f"model-{architecture}"
    if distributed.is_rank0() and not Path(folder).exists():
        make_model_folder(Path(folder), architecture, **SETTINGS.get(architecture, {}))
    distributed.barrier()
    name = "-".join([architecture, packing, *(word.replace("/", "_") for word in words)])
    recipe = load_recipe(
        Recipe,
        "recipe.yaml",
        [
            f"run_dir={name}", f"model.path={folder}", f"training.packing={packing}", "method=full",
            "full_tuning.learning_rate=1e-3", "full_tuning.max_steps=3", *words,
        ],
    )  # fmt: skip
    with messages_on_stderr(), open_run(recipe, method="full") as run:
        outcome, _ = train(
            run,
            list(run.model.parameters()),
            stage=Stage.FULL_TUNING,
            tuning=recipe.full_tuning,
            at_end=lambda: None,
        )
        return losses(run.dir, Stage.FULL_TUNING), outcome.valid_loss, run.proved[1].layout


for architecture in EXACT:
    padded, padded_valid, layout = tune(architecture, "off")
    assert layout == "off"
    for packing in ("prefix", "sequences") if architecture != "opt" else ("prefix",):  # see the unit tests
        packed, packed_valid, layout = tune(architecture, packing)
        assert layout == packing
        assert packed == pytest.approx(padded, rel=2e-5), (architecture, packing, packed, padded)
        assert packed_valid == pytest.approx(padded_valid, rel=2e-5), (architecture, packing)
    assert tune(architecture, "auto")[2] == "prefix", architecture
for architecture in PADDED:
    padded, _, _ = tune(architecture, "off")
    fallen_back, _, layout = tune(architecture, "auto")
    assert layout == "off" and fallen_back == padded, architecture
    with pytest.raises(
        UserError, match=f"training.packing=prefix does not work with model-{architecture}: .*position_ids"
    ):
        tune(architecture, "prefix")
# With gradient checkpointing, in bf16.
words = ("training.gradient_checkpointing=true", "training.precision=bf16")
packed, _, layout = tune("llama", "auto", *words)
assert layout == "prefix" and packed == pytest.approx(tune("llama", "off", *words)[0], rel=1e-2)
distributed.shutdown()
