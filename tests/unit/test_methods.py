"""The registries: a selection rule or a method that is declared once is known everywhere that names are read or shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ksl_ds.comparison.entries import Entry
from ksl_ds.config.load import dotted_keys, load_recipe
from ksl_ds.config.methods import METHOD_SECTIONS, METHODS, TUNED, Rows, Stage, label_of
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.selection import RULES, rule
from ksl_ds.lottery.shift import Shift, choose_rows

BASE = ["run_dir=x", "model.path=m"]


def shift() -> Shift:
    count_V = torch.tensor([300, 0, 290, 5], dtype=torch.int32)
    return Shift(count_V, count_V.float(), count_V.float(), 576, "float32")


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_taken_by_recipes_and_draws(name):
    assert load_recipe(Recipe, None, [*BASE, f"draw.selection={name}"]).draw.selection == name
    ids_K = choose_rows(shift(), selection=name, top_k=2, frequency_V=torch.tensor([9, 0, 8, 7]))
    assert ids_K.dtype == torch.int64
    assert len(ids_K) == 2
    if name != "random":
        assert ids_K.tolist() == [0, 2]
    _, text = dotted_keys(Recipe)["draw.selection"]
    assert f"{name} ({RULES[name].label})" in text


def test_a_new_rule_needs_its_function_only():

    @rule("rows of even id")
    def select_even(vocab_size: int, top_k: int):
        return torch.arange(0, vocab_size, 2)[:top_k]

    try:
        assert choose_rows(shift(), selection="even", top_k=1).tolist() == [0]
        assert load_recipe(Recipe, None, [*BASE, "draw.selection=even"]).draw.selection == "even"
        assert RULES["even"].is_control
        assert RULES["even"].key == "rows_by_even"
        with pytest.raises(ValueError, match="between 1 and the 4"):
            choose_rows(shift(), selection="even", top_k=5)
    finally:
        del RULES["even"]
    with pytest.raises(UserError, match=r"draw.selection is even; it must be one of alpha, top_k"):
        load_recipe(Recipe, None, [*BASE, "draw.selection=even"])


def test_rules_that_take_a_number_of_rows_are_controls_of_compare():
    controls = {name for name, method in METHODS.items() if method.rows is Rows.CONTROL}
    assert controls == {name for name, entry in RULES.items() if entry.is_control} == controls & set(RULES)
    assert {"top_k", "random", "frequency", "shift_norm", "shift_ratio"} <= controls


def test_keys_are_distinct_and_fit_for_folders():
    keys = [method.key for method in METHODS.values()]
    assert len(set(keys)) == len(keys)
    assert all(key.replace("_", "").isalnum() for key in keys)
    assert label_of("partial_tuning_alpha_0.05") == "partial tuning alpha 0.05"
    assert label_of("one_row_newline") == label_of("one_row:_newline") == "one row: newline"  # the latter: version 0.1
    assert label_of("copying_source") == Stage.COPYING_SOURCE.label == "copying the source"


def test_a_stage_is_its_key_wherever_text_is_made():
    assert f"{Stage.LORA}" == str(Stage.LORA) == "lora"
    assert json.loads(json.dumps({Stage.LORA: Stage.LORA})) == {"lora": "lora"}
    assert {"lora": 1}[Stage.LORA] == 1


def test_a_run_of_a_comparison_depends_on_the_sections_that_its_method_reads():
    whole = load_recipe(Recipe, None, [*BASE, *(f"{name}.epsilon=1e-6" for name in METHOD_SECTIONS - {"draw"})])
    for name, method in METHODS.items():
        own = Entry(name, 0.5 if method.rows is Rows.TICKET else None).recipe(whole, Path(whole.run_dir), 0, 3)
        kept = {section for section in METHOD_SECTIONS - {"draw"} if getattr(own, section).epsilon == 1e-6}
        assert kept == method.reads - {"draw"}
    assert METHODS["embed"].reads == {"embed_tuning", "draw"}
    assert METHODS["ticket"].reads == METHODS["random"].reads == {"embed_tuning", "draw", "partial_tuning"}
    assert METHODS["transfer"].reads == {"embed_tuning", "draw"}
    assert METHODS["newline"].reads == {"partial_tuning"}
    assert METHODS["untuned"].reads == set()


def test_what_tune_takes():
    assert set(TUNED) == {"embed", "full", "ticket", "lora", "prefix"}
    for name in TUNED:
        assert load_recipe(Recipe, None, [*BASE, f"method={name}"]).method == name
    with pytest.raises(UserError, match=r"method is loro; did you mean lora\?"):
        load_recipe(Recipe, None, [*BASE, "method=loro"])
