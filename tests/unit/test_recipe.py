"""What a recipe accepts, and how its mistakes read."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ksl_ds.errors import UserError
from ksl_ds.recipe import DrawCommand, Recipe, dotted_keys, load_recipe, save_recipe

LEAST = ["run_dir=r", "model.path=m"]


def test_a_saved_recipe_gives_the_same_recipe(tmp_path):
    recipe = load_recipe(
        Recipe, None, [*LEAST, "text.train=[a.en,a.fr]", "draw.alpha=0.25", "embed_tuning.max_steps=7"]
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(Recipe, str(tmp_path / "recipe.yaml"), []) == recipe
    assert (recipe.draw.alpha, recipe.embed_tuning.max_steps, recipe.text.train) == (0.25, 7, ["a.en", "a.fr"])


def test_the_command_line_comes_last(tmp_path):
    (tmp_path / "r.yaml").write_text("run_dir: r\nmodel: {path: m}\ntext: {train: a.jsonl}\ndraw: {alpha: 0.5}\n")
    recipe = load_recipe(Recipe, str(tmp_path / "r.yaml"), ["draw.alpha=.1", "text.test=b.jsonl"])
    assert recipe.draw.alpha == 0.1
    assert recipe.text.train == ["a.jsonl"] and recipe.text.test == ["b.jsonl"]


def test_a_bare_off_is_the_word(tmp_path):
    """YAML 1.1 reads `off` as false."""
    (tmp_path / "r.yaml").write_text("run_dir: r\nmodel: {path: m}\ntracking: {wandb: off}\n")
    assert load_recipe(Recipe, str(tmp_path / "r.yaml"), []).tracking.wandb == "off"
    assert load_recipe(Recipe, None, [*LEAST, "tracking.wandb=off"]).tracking.wandb == "off"
    with pytest.raises(UserError, match="seed"):
        load_recipe(Recipe, None, [*LEAST, "seed=off"])


@pytest.mark.parametrize(
    "words, parts",
    [
        (["text.trian=a"], ["text.trian", "did you mean text.train?"]),
        (["trainin.batch_size=3"], ["trainin", "did you mean training?"]),
        (["batch_size=3"], ["batch_size", "training.batch_size"]),
        (["training.batch_size=many"], ["training.batch_size", "many"]),
        (["draw.selection=best"], ["draw.selection", "best", "top_k"]),
        (["draw.alpha=0"], ["draw.alpha", "0"]),
        (["draw.alpha=1.5"], ["draw.alpha", "1.5"]),
        (["embed_tuning.learning_rate=-1"], ["embed_tuning.learning_rate", "-1"]),
        (["partial_tuning.warmup=1"], ["partial_tuning.warmup"]),
        (["partial_tuning.betas=[0.9]"], ["partial_tuning.betas"]),
        (["training.batch_size=0"], ["training.batch_size", "greater than 0"]),
        (["training.clip=-1"], ["training.clip"]),
        (["seed=-1"], ["seed", "-1"]),
        (["draw.stop_when_settled={draws: 2}"], ["draw.stop_when_settled", "draw.every"]),
        (["training=5"], ["training"]),
        (["model.path"], ["model.path", "key=value"]),
    ],
)
def test_mistakes_are_one_sentence(words, parts):
    with pytest.raises(UserError) as mistake:
        load_recipe(Recipe, None, [*LEAST, *words])
    message = str(mistake.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="model.path and run_dir must be given"):
        load_recipe(Recipe, None, [])
    with pytest.raises(UserError, match="after"):
        load_recipe(DrawCommand, None, ["before=a", "out=c"])


def test_broken_files_are_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "typo.yaml").write_text("drwa: {alpha: .5}\n")
    for name, part in {
        "broken.yaml": "valid YAML",
        "list.yaml": "key: value",
        "typo.yaml": "draw",
        "none.yaml": "no such",
    }.items():
        with pytest.raises(UserError) as mistake:
            load_recipe(Recipe, str(tmp_path / name), LEAST)
        assert name in str(mistake.value) and part in str(mistake.value)


def test_every_key_has_a_default_and_help():
    keys = dotted_keys(Recipe)
    assert "draw.alpha" in keys and keys["draw.alpha"][0] == 0.05
    assert all(text for _, text in keys.values())
    flat = OmegaConf.to_container(OmegaConf.structured(Recipe))
    sections = {name for name, value in flat.items() if isinstance(value, dict)}
    assert {key.split(".")[0] for key in keys} == set(flat) and sections
