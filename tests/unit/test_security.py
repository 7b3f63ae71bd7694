"""What the code must never do: run what a model ships unasked, unpickle, or give text to a shell (scripts: test_launch.py)."""

from __future__ import annotations

import ast
import json

import pytest
from helpers.processes import REPOSITORY
from helpers.tiny import make_model_folder

from ksl_ds.config.schema import Model
from ksl_ds.errors import UserError
from ksl_ds.model.dry_run import meta_model, model_config
from ksl_ds.model.load import open_folder

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineModel(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_of_a_model_runs_only_when_asked_for_and_that_is_said(tmp_path, monkeypatch, capsys, messages):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = make_model_folder(tmp_path / "model"), tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    config["auto_map"]["AutoModelForCausalLM"] = "configuration_mine.MineModel"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(UserError, match="trust_remote_code"):
        _ = open_folder(Model(path=str(folder))).config
    for name in (folder, folder / "config.json"):
        with pytest.raises(UserError, match="trust_remote_code"):
            model_config(str(name))
    assert not marker.exists() and "trust_remote_code" not in capsys.readouterr().err
    trusted = open_folder(Model(path=str(folder), trust_remote_code=True)).config
    assert marker.exists() and trusted.model_type == "mine"
    assert f"running Python code from {folder}" in capsys.readouterr().err


def calls(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """Every call's dotted name, and its keywords that are literally true."""
    return [
        (ast.unparse(node.func), [word.arg or "" for word in node.keywords if ast.unparse(word.value) == "True"])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ksl_ds").rglob("*.py")), ids=lambda path: path.name)
def test_no_shell_no_pickle_no_code_from_text(path):
    tree = ast.parse(path.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for name, true in calls(tree):
        assert name not in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "subprocess.getoutput",
            "yaml.load",
        ), name
        assert name != "torch.load" or "weights_only" in true, "torch.load of more than data"
        assert "shell" not in true, f"{name}(shell=True)"


def test_the_dry_run_of_an_ordinary_model_needs_no_trust(tmp_path):
    model = meta_model(model_config(str(make_model_folder(tmp_path / "model"))), dtype=None, untied=False)
    assert next(model.parameters()).is_meta
