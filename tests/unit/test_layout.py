"""The import rule of ksl_ds/README.md, read from there and enforced on every import, those under TYPE_CHECKING included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksl_ds

PACKAGE = Path(ksl_ds.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ZERO_NAMES = re.compile(r"ds_[a-z_]+|_ds_[a-z_]+|_hp_mapping|_z3_optimizer|GatheredParameters")


def levels() -> dict[str, int]:
    """The line of each top-level module or package in the README's list; larger is lower."""
    block = (PACKAGE / "README.md").read_text().split("```")[1]
    found = {}
    for number, line in enumerate(block.strip().splitlines()):
        for name in re.findall(r"(\w+)(?:/|\.py)(?=\s|$)", line.split("   ")[0] + " "):
            found[name] = number
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Full names of the ksl_ds modules that a file imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ksl_ds"))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ksl_ds"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def test_the_list_names_every_package_and_nothing_else():
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert set(levels()) == there


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_from_lower_lines_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        other = name.split(".")[1] if "." in name else None
        if other not in (None, own):
            assert levels()[other] > levels()[own], f"{path} imports {name}"


def test_no_circular_imports():
    graph = {name: {other for other in imports(path) if other != name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " imports ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_command_imports_another():
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("ksl_ds.commands.")], path


def test_zero_is_known_in_sharding_only():
    for path in FILES:
        if path.parent.name == "sharding":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
                if node.attr == "zero" and isinstance(node.value, ast.Name) and node.value.id == "deepspeed":
                    names.append("GatheredParameters")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]  # hasattr(parameter, "ds_id")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed.runtime.zero"):
                names = ["GatheredParameters"]
            found = [name for name in names if ZERO_NAMES.fullmatch(name) and name != "ds_configs"]
            assert not found, f"{path}, line {node.lineno}: {found[0]}"
