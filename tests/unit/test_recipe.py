"""What a recipe accepts, and how its mistakes read."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import typing
from fractions import Fraction
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksl_ds import cli
from ksl_ds.config import schema as recipe
from ksl_ds.config.load import differing_keys, dotted_keys, load_recipe, save_recipe, shipped_file
from ksl_ds.config.schema import RENAMED, DrawCommand, EstimateCommand, Recipe, TransferCommand
from ksl_ds.errors import UserError
from ksl_ds.sharding.engine import read_config

LEAST = ["run_dir=r", "model.path=m"]
SCHEMAS = {
    Recipe: LEAST,
    DrawCommand: ["before=a", "after=b", "out=c"],
    TransferCommand: ["base=a", "ticket=b", "out=c"],
    EstimateCommand: ["model=m"],
}


def value_of(recipe: object, name: str) -> object:
    return reduce(getattr, name.split("."), recipe)


def keys_of(kind: type) -> list[tuple[type, str]]:
    """The keys of all schemas whose values, or list elements, are of this type."""

    def leaves(annotation: object) -> set[object]:
        arguments = typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Literal else ()
        return set().union(*map(leaves, arguments)) if arguments else {annotation}

    def walk(section: type, prefix: str) -> list[str]:
        names = []
        for name, annotation in typing.get_type_hints(section).items():
            inner = [leaf for leaf in leaves(annotation) if dataclasses.is_dataclass(leaf)]
            names += walk(inner[0], f"{prefix}{name}.") if inner else []
            names += [prefix + name] if kind in leaves(annotation) else []
        return names

    return [(schema, name) for schema in SCHEMAS for name in walk(schema, "")]


def mistake_of(schema: type, *words: str, file: str | None = None) -> str:
    with pytest.raises(UserError) as mistake:
        load_recipe(schema, file, [*SCHEMAS[schema], *words])
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


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
        (["tracking.tags=[" + "a" * 65 + "]"], ["tracking.tags", "1 to 64 characters"]),
        (["draw.alpha=1.5"], ["draw.alpha", "1.5"]),
        (["embed_tuning.learning_rate=-1"], ["embed_tuning.learning_rate", "-1"]),
        (["partial_tuning.warmup_ratio=1"], ["partial_tuning.warmup_ratio"]),
        (["partial_tuning.betas=[0.9]"], ["partial_tuning.betas"]),
        (["training.batch_size=0"], ["training.batch_size", "greater than 0"]),
        (["training.max_grad_norm=-1"], ["training.max_grad_norm"]),
        (["seed=-1"], ["seed", "-1"]),
        (["draw.early_stopping={draws: 2}"], ["draw.early_stopping", "draw.every"]),
        (["draw.early_stopping={drws: 2}"], ["unknown key draw.early_stopping.drws"]),
        (["training=5"], ["training is 5", "section"]),
        (["training=[1]"], ["training is ['1']", "section"]),
        (["text.train=[[a]]"], ["text.train is ['a']"]),
        (["text.train=[a, null]"], ["text.train is empty"]),
        (["draw.early_stopping={a: [}"], ["draw.early_stopping", "not valid YAML"]),
        (["seed=null"], ["seed is null", "integer"]),
        (["seed=1e3"], ["seed is 1e3", "integer"]),
        (["verbose=perhaps"], ["verbose is perhaps", "boolean"]),
        (["run_dir="], ["run_dir must be given"]),
        (["seed="], ["seed is empty; it should be a valid integer"]),
        (["text.max_length=1"], ["text.max_length is 1; it should be greater than or equal to 2"]),
        (
            ["model={path: a, path: b}"],
            ["model={path: a, path: b} is not valid YAML: line 1, column 11: the key path comes twice"],
        ),
        (["model=" + "[" * 5000], ["[[[... is not valid YAML: maximum recursion depth exceeded"]),
        (["run_dir=???"], ["run_dir must be given"]),
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
    assert {key.split(".")[0] for key in keys} == {field.name for field in dataclasses.fields(Recipe)}
    assert keys["training.batch_size"][1].endswith("; above 0, at most 1,000,000")
    assert keys["compare.alphas"][1].endswith("; above 0, below 1")


# --- numbers ---

RANGE = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le}
EXTREMES = ["nan", "-nan", "inf", "-inf", ".inf", ".nan", "1e999", "-1", "0", "-0.0", "1", "5e-324", "1e308", "true"]
EXTREMES += [str(sign * 10**power + one) for sign in (1, -1) for power in (12, 30) for one in (0, 1)]
EXTREMES += [str(2**63), str(2**63 - 1), str(2**64), "9" * 5000, "0x10", "1:30", "half", ""]


@pytest.mark.parametrize(("schema", "name"), keys_of(int) + keys_of(float))
def test_a_number_is_within_the_range_of_its_key_or_a_mistake_that_names_it(schema, name):
    text = dotted_keys(schema)[name][1] if "early_stopping." not in name else "above 0"
    limits = dict(re.findall(r"(above|at least|below|at most) ([\d.,]*\d)", text))
    assert limits, "no range in its help"
    integer = (schema, name) in keys_of(int)
    needs = ["draw.every=1"] if "early_stopping." in name else []
    for value in EXTREMES:
        word = f"{name}=[{value},0.5]" if name.endswith("betas") else f"{name}={value}"
        try:
            loaded = value_of(load_recipe(schema, None, [*SCHEMAS[schema], *needs, word]), name)
        except UserError as mistake:
            assert name in str(mistake) and "\n" not in str(mistake)
            assert value not in ("1", "0.5") or "below" in limits or limits.get("at least") == "2"
            continue
        number = loaded[0] if isinstance(loaded, list) and loaded else loaded
        if value == "":
            assert number in (None, [])
            continue
        kind = int if integer else float
        assert type(number) is kind and math.isfinite(number) and number == (Fraction if integer else float)(value)
        for limit, holds in RANGE.items():
            assert limit not in limits or holds(number, kind(limits[limit].replace(",", "")))


def test_there_are_numbers_in_every_section():
    numbers = {name for schema, name in keys_of(int) + keys_of(float) if schema is Recipe}
    assert len(numbers) > 60
    assert {
        "seed",
        "text.seed",
        "compare.seeds",
        "draw.early_stopping.overlap",
        "prefix.num_virtual_tokens",
    } <= numbers


@pytest.mark.parametrize(
    ("schema", "word", "said"),
    [
        (Recipe, "embed_tuning.weight_decay=nan", "embed_tuning.weight_decay is nan; it should be a finite number"),
        (Recipe, "timeout_minutes=inf", "timeout_minutes is inf; it should be a finite number"),
        (Recipe, "seed=9223372036854775808", "less than or equal to 9223372036854775807"),
        (Recipe, "compare.seeds=[0,9223372036854775808]", "compare.seeds is 9223372036854775808"),
        (Recipe, "training.batch_size=1000000000000", "less than or equal to 1000000"),
        (Recipe, "prefix.num_virtual_tokens=0", "prefix.num_virtual_tokens is 0; it should be greater than 0"),
        (Recipe, "draw.early_stopping={overlap: 1.5, draws: 3}", "draw.early_stopping.overlap is 1.5"),
        (EstimateCommand, "rows=-1", "rows is -1; it should be greater than 0"),
        (EstimateCommand, "gpu_memory=inf", "gpu_memory is inf; it should be a finite number"),
        (DrawCommand, "alpha=1", "alpha is 1; it should be less than 1"),
    ],
)
def test_the_sentence_says_key_value_and_range(schema, word, said):
    assert said in mistake_of(schema, word)


def test_the_largest_seed_is_one_to_torch_on_every_rank():
    seed = load_recipe(Recipe, None, [*LEAST, f"seed={2**63 - 1}"]).seed
    assert torch.Generator().manual_seed(seed + 10**6).initial_seed() == seed + 10**6


# --- text ---

LITERALS = [
    "no",
    "on",
    "off",
    "true",
    "1e3",
    "0x10",
    "2024-01-01",
    "12:30",
    "1_000",
    ".5",
    "a: b #c",
    "- a",
    "[a",
    "{a: b}",
]
LITERALS += [
    "English: {source}",
    "${oc.env:HOME}",
    "${",
    "\\${x}",
    "a\\\\${model.path}",
    "'a'",
    '"b" c',
    " a ",
    "???",
    "&a *a",
    "!!int 3",
]


@pytest.mark.parametrize("text", LITERALS)
def test_text_on_the_command_line_is_taken_as_it_is(text):
    loaded = load_recipe(Recipe, None, [*LEAST, f"text.prompt={text}", f"tracking.name={text}", f"text.valid={text}"])
    assert (loaded.text.prompt, loaded.tracking.name, loaded.text.valid) == (text, text, [text])


@pytest.mark.parametrize(
    "text", ["no", "on", "1e3", "0x10", "2024-01-01", "12:30", "1_000", "y", ".5", "${oc.env:HOME}", "???"]
)
def test_bare_words_of_a_file_are_text_where_the_key_takes_text(tmp_path, text):
    (tmp_path / "r.yaml").write_text(
        f"run_dir: r\nmodel: {{path: m}}\ntext:\n  target_language: {text}\n  train: [{text!r}, b]\n"
        f"tracking:\n  name: {text}\n"
    )
    loaded = load_recipe(Recipe, str(tmp_path / "r.yaml"), [])
    assert (loaded.text.target_language, loaded.text.train, loaded.tracking.name) == (text, [text, "b"], text)
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(Recipe, str(tmp_path / "saved.yaml"), []) == loaded


def test_null_is_empty_where_a_key_may_be_empty_and_a_mistake_elsewhere(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "run_dir: r\nmodel: {path: m}\ntraining:\ntext: {seed: 3, train: , max_words: ~}\n"
    )
    loaded = load_recipe(Recipe, str(tmp_path / "r.yaml"), ["text.seed=null", "ticket="])
    assert (loaded.training.batch_size, loaded.text.seed, loaded.text.train, loaded.ticket) == (128, None, [], None)
    (tmp_path / "r.yaml").write_text("run_dir: r\nmodel: {path: m}\ntext: {target_language: null}\n")
    assert mistake_of(Recipe, file=str(tmp_path / "r.yaml")).endswith(
        "text.target_language is empty; it should be a valid string"
    )
    (tmp_path / "r.yaml").write_text("run_dir: r\nmodel: {path: m}\ntext: {prompt: {source}}\n")
    assert mistake_of(Recipe, file=str(tmp_path / "r.yaml")).endswith("put text with brackets in quotes")


def test_numbers_and_sections_of_a_file(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "run_dir: r\nmodel: {path: m}\nembed_tuning: &both {epochs: 2, learning_rate: 1e-3}\n"
        "partial_tuning: {<<: *both, epochs: 4}\nfull_tuning: *both\nverbose: yes\nseed: 7\n"
    )
    loaded = load_recipe(Recipe, str(tmp_path / "r.yaml"), ["full_tuning.epochs=9"])
    assert [loaded.embed_tuning.epochs, loaded.partial_tuning.epochs, loaded.full_tuning.epochs] == [2, 4, 9]
    assert loaded.partial_tuning.learning_rate == 1e-3 and loaded.verbose is True and loaded.seed == 7


@pytest.mark.parametrize(
    "content",
    ["seed: 1\nseed: 2\n", "a: &a {b: *a}\n", "seed: !!python/name:os.system 1\n", "seed: !!timestamp x\n", "? [a]\n: 1\n",
     "[" * 5000, "seed: !!int x\n", "\0", "1: 2\n", "~: 2\n", "seed: [1\n"],
)  # fmt: skip
def test_broken_yaml_is_one_sentence_that_names_the_file(tmp_path, content):
    (tmp_path / "r.yaml").write_text(content)
    assert mistake_of(Recipe, file=str(tmp_path / "r.yaml")).count(str(tmp_path / "r.yaml")) >= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1\nverbose: true\nseed: 2\n", "line 3, column 1: the key seed comes twice"),
        ("seed: 1\nticket: 'a\n", "line 3, column 1: found unexpected end of stream"),
        ("text:\n\t- b\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("ticket: *nobody\n", "line 1, column 9: found undefined alias 'nobody'"),
        ("seed: \0\n", "position 6: special characters are not allowed"),
    ],
)
def test_broken_yaml_is_named_by_line_and_column(tmp_path, content, said):
    (tmp_path / "r.yaml").write_text(content)
    assert mistake_of(Recipe, file=str(tmp_path / "r.yaml")) == f"{tmp_path / 'r.yaml'} is not valid YAML: {said}"


MAPPINGS = ("text.languages", "text.prompts")


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_are_given_as_yaml(name):
    section = load_recipe(Recipe, None, [*LEAST, f"{name}={{ca: 'x {{source}}', es: y}}"]).text
    assert getattr(section, name.partition(".")[2]) == {"ca": "x {source}", "es": "y"}
    for wrong in ("x", "[x]", "{ca: [x]}", "{ca: }"):
        assert mistake_of(Recipe, f"{name}={wrong}").startswith(name)


@pytest.mark.parametrize("name", [name for schema, name in keys_of(str) if schema is Recipe and name not in MAPPINGS])
@pytest.mark.parametrize("text", ["a\ud800b", "a\nb", "a\0b", "a\x7fb"])
def test_names_are_one_line_that_can_be_written(name, text):
    if name == "text.prompt" and "\ud800" not in text:
        assert load_recipe(Recipe, None, [*LEAST, f"{name}={text}"]).text.prompt == text
    else:
        assert mistake_of(Recipe, f"{name}={text}").startswith(f"{name} is {text!r}; it must be ")


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(codec="utf-8")), st.floats(min_value=1e-300, allow_infinity=False), st.text("\\${}a'\"\n: #-")
)
def test_any_text_and_number_survives_saving(tmp_path_factory, prompt, rate, other):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    loaded = load_recipe(Recipe, None, [*LEAST, f"text.prompt={prompt}", f"embed_tuning.learning_rate={rate!r}"])
    assert (loaded.text.prompt, loaded.embed_tuning.learning_rate) == (prompt, rate)
    loaded.text.prompt += other
    save_recipe(loaded, path)
    assert load_recipe(Recipe, str(path), []) == loaded


# --- files that come with the package ---


def test_only_a_bare_name_is_looked_up_among_the_shipped_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipe.PACKAGE_DIR / "recipes" / "quickstart.yaml"
    assert shipped_file("quickstart.yaml", "recipes") == shipped
    for name in (
        "somewhere/else/quickstart.yaml",
        "./quickstart.yaml",
        "/quickstart.yaml",
        "../recipes/quickstart.yaml",
        "",
    ):
        assert str(shipped_file(name, "recipes")) == str(recipe.Path(name))
    with pytest.raises(
        UserError, match="recipe somewhere/else/quickstart.yaml: no such file; .*use the bare name quickstart.yaml"
    ):
        load_recipe(Recipe, "somewhere/else/quickstart.yaml", [])
    with pytest.raises(UserError, match="no file typo/dir/zero2.json.*use the bare name zero2.json"):
        read_config("typo/dir/zero2.json")
    with pytest.raises(UserError, match="no such file$"):
        load_recipe(Recipe, "a" * 5000, [])
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_config("zero2.json")["zero_optimization"]["stage"] == 1


def test_which_shipped_file_is_used_is_said(tmp_path, monkeypatch, capsys, messages):
    monkeypatch.chdir(tmp_path)
    cli._log_shipped_file("quickstart.yaml", "recipes")
    cli._log_shipped_file("zero3.json", "ds_configs")
    (tmp_path / "zero2.json").write_text("{}")
    for name, folder in (("zero2.json", "ds_configs"), ("nowhere/zero3.json", "ds_configs"), (None, "ds_configs")):
        cli._log_shipped_file(name, folder)
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        f"quickstart.yaml is the file that comes with ksl_ds, {recipe.PACKAGE_DIR / 'recipes' / 'quickstart.yaml'}",
        f"zero3.json is the file that comes with ksl_ds, {recipe.PACKAGE_DIR / 'ds_configs' / 'zero3.json'}",
    ]


# --- renamed keys ---

OLD_VALUES = {"training.clip": "0.5", "training.valid_every": "7", "draw.stop_when_settled": "{overlap: 0.9, draws: 2}"}


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_accepted_with_a_warning_that_names_the_new_one(old, tmp_path, caplog):
    new = RENAMED[old]
    section, _, short = old.partition(".")
    value = OLD_VALUES.get(old, "0.25")
    words = ["run_dir=r", "model.path=m", "draw.every=5"]
    (tmp_path / "old.yaml").write_text(
        f"run_dir: r\nmodel: {{path: m}}\ndraw: {{every: 5}}\n{section}: {{{short}: {value}}}\n"
    )
    if section == "draw":
        (tmp_path / "old.yaml").write_text(f"run_dir: r\nmodel: {{path: m}}\ndraw: {{every: 5, {short}: {value}}}\n")
    wanted = load_recipe(Recipe, None, [*words, f"{new}={value}"])
    assert not caplog.records and wanted != load_recipe(Recipe, None, words)
    for found in (
        load_recipe(Recipe, None, [*words, f"{old}={value}"]),
        load_recipe(Recipe, str(tmp_path / "old.yaml"), []),
    ):
        assert found == wanted
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [f"{old} is now called {new}"] * 2


def test_a_key_within_a_renamed_section_and_both_names_at_once(tmp_path):
    words = ["run_dir=r", "model.path=m", "draw.every=5", "draw.early_stopping={overlap: 0.9, draws: 2}"]
    assert load_recipe(Recipe, None, [*words, "draw.stop_when_settled.draws=4"]).draw.early_stopping.draws == 4
    (tmp_path / "both.yaml").write_text("run_dir: r\nmodel: {path: m}\ntraining: {clip: 1, max_grad_norm: 2}\n")
    with pytest.raises(UserError, match=r"training.clip is the old name of training.max_grad_norm, and both are given"):
        load_recipe(Recipe, str(tmp_path / "both.yaml"), [])


def test_recorded_recipes_with_old_names_are_compared_by_the_new_ones():
    wanted = load_recipe(Recipe, None, ["run_dir=r", "model.path=m"])
    recorded = dataclasses.asdict(wanted)
    for old, new in RENAMED.items():
        section, _, short = old.partition(".")
        recorded[section][short] = recorded[section].pop(new.partition(".")[2])
    assert differing_keys(recorded, wanted) == {}
    recorded["training"]["clip"] = 2.0
    assert differing_keys(recorded, wanted) == {"training.max_grad_norm": (2.0, 1.0)}
