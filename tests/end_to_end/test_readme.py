"""What is shipped and written down agrees with the code: recipes, DeepSpeed configurations, the README's commands and code."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from helpers.processes import REPOSITORY

from ksl_ds.cli import COMMANDS, main
from ksl_ds.config import schema as recipes
from ksl_ds.config.load import dotted_keys, load_recipe, shipped_file
from ksl_ds.config.schema import Recipe

FOLDERS = ("ds_configs", "ksl_ds", "launch", "tests")
PATHS = [
    REPOSITORY / "README.md",
    *(path for name in FOLDERS for path in sorted((REPOSITORY / name).rglob("README.md"))),
]
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PATHS}
README = TEXTS["README.md"]
EVERYTHING = "\n".join(TEXTS.values())
RECIPES = sorted((REPOSITORY / "launch" / "recipes").rglob("*.yaml"))
CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", EVERYTHING, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [content for name, content in BLOCKS if name == language]


def commands() -> list[list[str]]:
    """The words after `ksl-ds` or `--module ksl_ds` in the lines of shell blocks, comments and [optional] words taken out."""
    lines = [line for content in blocks("bash") for line in content.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    found = []
    for line in words:
        for at, word in enumerate(line):
            if word == "ksl-ds" or (word == "ksl_ds" and line[at - 1] in ("--module", "-m")):
                found.append([word for word in line[at + 1 :] if not word.startswith("[")])
                break
    return found


# --- recipes ---


def test_something_is_shipped_and_written_down():
    assert RECIPES and CONFIGS and blocks("bash") and blocks("yaml") and blocks("python") and commands()
    assert EVERYTHING.count("\n```") == 2 * len(BLOCKS), "a fence is not closed"


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_fits_the_code_and_says_how_to_run_it(path):
    recipe = load_recipe(Recipe, str(path), [])
    assert shipped_file(recipe.deepspeed, "ds_configs").is_file()
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("#") and "ksl_ds" in head


def test_recipes_and_configurations_are_found_without_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in RECIPES:
        load_recipe(Recipe, path.name, [])
    for path in CONFIGS:
        assert json.loads(shipped_file(path.name, "ds_configs").read_text()) == json.loads(path.read_text())


def test_recipes_in_the_readme_fit_the_code(tmp_path):
    for number, content in enumerate(blocks("yaml")):
        (tmp_path / f"{number}.yaml").write_text(content)
        load_recipe(Recipe, str(tmp_path / f"{number}.yaml"), [])


# --- DeepSpeed configurations ---


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_is_one_to_deepspeed(path, precision, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from ksl_ds.sharding.engine import deepspeed_config

    words = ["run_dir=runs/x", "model.path=m", f"deepspeed={path.name}", f"training.precision={precision}"]
    recipe = load_recipe(Recipe, None, [*words, "training.batch_size=24", "training.micro_batch_size=4"])
    parsed = DeepSpeedConfig(deepspeed_config(recipe))
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (24, 6)
    assert parsed.gradient_clipping == recipe.training.max_grad_norm
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    # DeepSpeed passes over keys that it does not know.
    shipped = json.loads(path.read_text())["zero_optimization"]
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(shipped) <= known | set(DeepSpeedZeroConfig.model_fields)
    assert parsed.zero_optimization_stage == shipped["stage"]
    offloads = parsed.zero_config.offload_optimizer, parsed.zero_config.offload_param
    assert [part is not None for part in offloads] == ["offload_optimizer" in shipped, "offload_param" in shipped]


def test_every_configuration_is_described():
    assert {path.name for path in CONFIGS} <= set(re.findall(r"`([\w-]+\.json)`", TEXTS["ds_configs/README.md"]))


# --- commands ---


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_prints_every_key_with_default_and_meaning(command, capsys):
    assert main([command.name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: ksl-ds {command.name} {command.usage}" in shown
    squeezed = " ".join(shown.split())
    for option in command.options:
        assert f"{option.metavar} {option.help}" in squeezed
    for name, (_, text) in keys(command.name).items():
        assert f"\n  {name} (" in shown and " ".join(text.split()) in squeezed


def keys(command: str) -> dict:
    """The keys that a command takes, with default and meaning."""
    schema = COMMANDS[command].schema
    return dotted_keys(getattr(recipes, schema)) if schema else {}


def test_every_command_is_in_the_overview_and_in_the_readme(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS.values():
        assert re.search(rf"^ +{command.name} +{re.escape(command.help)}$", overview, re.MULTILINE)
        assert f"`{command.name}`" in README and f"`{command.name}`" in TEXTS["launch/README.md"]


def test_commands_of_the_readme_exist_and_take_their_keys(tmp_path):
    mine = tmp_path / "my_recipe.yaml"  # the name that the README gives to the recipe that it shows
    mine.write_text(blocks("yaml")[0])
    for command, *words in commands():
        if command in ("COMMAND", "--help", "--version"):
            continue
        assert command in COMMANDS, f"ksl-ds {command}"
        if not keys(command) or "--help" in words or words[0] == "--from":  # a finished run's table
            continue
        if command == "estimate":  # its first word is a model
            words[0] = f"model={words[0]}"
        file = words.pop(0) if words and "=" not in words[0] else None
        if file is not None and not (REPOSITORY / file).exists():
            assert file == mine.name, f"the README runs {file}, which does not exist"
        file = file and str(mine if file == mine.name else REPOSITORY / file)
        load_recipe(getattr(recipes, COMMANDS[command].schema), file, words)


def test_commands_within_sentences_exist():
    for words in re.findall(r"`ksl-ds ([^`]*)`", EVERYTHING):
        command, *rest = words.split()
        assert command in (*COMMANDS, "COMMAND", "--help", "--version"), f"ksl-ds {words}"
        given = [word.partition("=")[0] for word in rest if re.fullmatch(r"[a-z][\w.]*=.*", word)]
        if command in COMMANDS and keys(command):
            assert set(given) <= set(keys(command))


def test_scripts_and_folders_that_are_named_exist_and_run():
    scripts = set(re.findall(r"\b(?:launch|tests)/[\w/.-]+\.(?:sh|py|yaml|sbatch)\b", EVERYTHING))
    assert {"launch/quickstart.sh", "launch/test.sh"} <= scripts
    assert [name for name in scripts if not (REPOSITORY / name).is_file()] == []
    bash = shutil.which("bash")
    for script in sorted((REPOSITORY / "launch").glob("*.sh")):
        assert os.spawnl(os.P_WAIT, bash, "bash", "-n", str(script)) == 0, script
    for name in re.findall(r"^(\w+/)\s{2,}", README, re.MULTILINE):  # the layout
        assert (REPOSITORY / name).is_dir(), name


# --- Python ---


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_of_the_readme_compiles_and_its_imports_are_there(number):
    tree = ast.parse(blocks("python")[number])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ksl_ds":
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXTS[name])
    assert [target for target in targets if not (REPOSITORY / name).parent.joinpath(target).exists()] == []
