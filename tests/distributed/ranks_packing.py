"""Run by test_packing_ranks.py on two ranks under ZeRO-3: the losses of packed training steps against those of padded ones."""

from functools import partial
from pathlib import Path

import pytest
from helpers.cases import run_cases
from helpers.runs import losses
from helpers.tiny import make_model_folder

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.log import messages_on_stderr
from ksl_ds.training.loop import train
from ksl_ds.training.run import open_run

EXACT = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "opt")
PADDED = ("bloom", "mamba")
# Dropout draws other numbers for another layout.
SETTINGS = {"gemma2": {"head_dim": 8}, "qwen3": {"head_dim": 8}, "opt": {"dropout": 0.0}}


def tune(architecture: str, packing: str, *words: str) -> tuple[list[float], list[float], float | None, str]:
    """Losses and gradient norms of three steps of full tuning, the validation loss, and the layout."""
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
        norms = losses(run.dir, Stage.FULL_TUNING, "gradient_norm")
        return losses(run.dir, Stage.FULL_TUNING), norms, outcome.valid_loss, run.proved[1].layout


def packs(architecture: str) -> None:
    padded, padded_norms, padded_valid, layout = tune(architecture, "off")
    assert layout == "off"
    for packing in ("prefix", "sequences") if architecture != "opt" else ("prefix",):  # see the unit tests
        packed, norms, valid, layout = tune(architecture, packing)
        assert layout == packing
        assert packed == pytest.approx(padded, rel=2e-5), (packing, packed, padded)
        assert norms == pytest.approx(padded_norms, rel=2e-4), (packing, norms, padded_norms)
        assert valid == pytest.approx(padded_valid, rel=2e-5), packing
    assert tune(architecture, "auto")[-1] == "prefix"


def pads(architecture: str) -> None:
    """auto falls back, and a layout that is asked for is refused."""
    padded, *_ = tune(architecture, "off")
    fallen_back, *_, layout = tune(architecture, "auto")
    assert layout == "off" and fallen_back == padded
    with pytest.raises(
        UserError, match=f"training.packing=prefix does not work with model-{architecture}: .*position_ids"
    ):
        tune(architecture, "prefix")


def packs_with_checkpointing_in_bf16() -> None:
    words = ("training.gradient_checkpointing=true", "training.precision=bf16")
    packed, *_, layout = tune("llama", "auto", *words)
    assert layout == "prefix" and packed == pytest.approx(tune("llama", "off", *words)[0], rel=1e-2)


CASES = {architecture: partial(packs, architecture) for architecture in EXACT}
CASES |= {architecture: partial(pads, architecture) for architecture in PADDED}
CASES["checkpointing, bf16"] = packs_with_checkpointing_in_bf16
if __name__ == "__main__":
    run_cases(CASES)
