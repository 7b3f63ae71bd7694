"""Reads recipes: YAML merged over the schema's defaults, then `key=value` words of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ksl_ds.config.schema import (
    BEFORE_A_KEY,
    KEYS_THAT_MAY_CHANGE_ON_RESUME,
    MISSING,
    NULL,
    PACKAGE_DIR,
    RENAMED,
    Recipe,
)
from ksl_ds.config.validate import check_recipe
from ksl_ds.errors import UserError, reason_of
from ksl_ds.files import write_text

logger = logging.getLogger(__name__)


def dotted_keys(section: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """All keys of a recipe class, dotted, with default and help text (description and range)."""
    keys: dict[str, tuple[Any, str]] = {}
    for name, annotation in _annotations(section).items():
        entry = section.__pydantic_fields__[name]  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(annotation):
            keys |= dotted_keys(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            text = "; ".join(filter(None, (entry.description, ", ".join(_limits(annotation)))))
            keys[prefix + name] = (entry.get_default(call_default_factory=True), text)
    return keys


@functools.cache
def _annotations(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _limits(annotation: Any) -> list[str]:
    """The range of a number, or of the numbers in a list, in words."""
    if typing.get_origin(annotation) is not Annotated:
        return [word for argument in typing.get_args(annotation) for word in _limits(argument)]
    limits = [limit for entry in annotation.__metadata__ for limit in getattr(entry, "metadata", ())]
    return [f"{LIMITS[name]} {value:,}" for limit in limits for name, value in dataclasses.asdict(limit).items()]


def differing_keys(left: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys that differ between two recipes and that training may depend on, with both values.

    Each is a Recipe or the mapping that results.json records.
    """
    defaults = {name: default for name, (default, _) in dotted_keys(Recipe).items()} | BEFORE_A_KEY

    def flat(section: Any, prefix: str = "") -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for name, value in section.items():
            keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return keys

    ours, theirs = (
        defaults | flat(dataclasses.asdict(recipe) if isinstance(recipe, Recipe) else with_current_names(recipe))
        for recipe in (left, right)
    )
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
        and name not in KEYS_THAT_MAY_CHANGE_ON_RESUME
        and name.partition(".")[0] not in KEYS_THAT_MAY_CHANGE_ON_RESUME
    }


def shipped_file(name: str, folder: str) -> Path:
    """The path `name`; a bare name that is not a file here means the one shipped in `folder`, if it exists."""
    shipped = PACKAGE_DIR / folder / name
    if os.path.basename(name) == name and not os.path.exists(name) and os.path.isfile(shipped):
        return shipped
    return Path(name)


def shipped_hint(name: str, folder: str) -> str:
    """For a missing file: the bare name to use if one of that name is shipped in `folder`."""
    bare = os.path.basename(name)
    shipped = os.path.isfile(PACKAGE_DIR / folder / bare)
    return f"; for the file shipped with ksl_ds use the bare name {bare}" if shipped else ""


def with_current_names(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with old key names replaced. Raises UserError if a key has both of its names."""
    current = dict(given)
    for old, new in RENAMED.items():
        section, _, old_short = old.partition(".")
        values = current.get(section)
        if isinstance(values, dict) and old_short in values:
            short = new.partition(".")[2]
            if short in values:
                raise UserError(f"{old} is the old name of {new}, and both are given; remove {old}")
            current[section] = {short if name == old_short else name: value for name, value in values.items()}
    return current


def _is_or_lies_in(name: str, key: str) -> bool:
    """Whether a dotted name is `key` or one of the keys of that section."""
    return name == key or name.startswith(f"{key}.")


def _word_with_current_name(word: str) -> str:
    name, equals, value = word.partition("=")
    for old, new in RENAMED.items():
        if _is_or_lies_in(name, old):
            return f"{new}{name.removeprefix(old)}{equals}{value}"
    return word


def _warn_of_old_names(given: dict[str, Any], words: list[str]) -> None:
    """Warns of every old key name in a recipe or command line."""
    named = {word.partition("=")[0] for word in words}
    for old, new in RENAMED.items():
        section, _, short = old.partition(".")
        in_file = isinstance(given.get(section), dict) and short in given[section]
        if in_file or any(_is_or_lies_in(name, old) for name in named):
            logger.warning("%s is now called %s; the old name will be removed", old, new)


def load_recipe(schema: type, file: str | None, overrides: list[str]) -> Any:
    """A recipe from a YAML file and `key=value` words, checked.

    Parameters
    ----------
    schema
        A dataclass of schema.py.
    file
        A path, or the name of a shipped recipe; None for the defaults.
    overrides
        Words `section.key=value`, which override the file.

    Raises
    ------
    UserError
        For a missing file, invalid YAML, an unknown key (names the nearest known one), a wrong type or value.
    """
    given: dict[str, Any] = {}
    content = _read_yaml(file) if file is not None else {}
    _warn_of_old_names(content, overrides)
    if file is not None:
        try:
            given = _as_meant(schema, with_current_names(content))
            _validated(schema, given)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    for word in map(_word_with_current_name, overrides):
        given = _merged(given, _as_meant(schema, _read_word(schema, word)))
    recipe = _validated(schema, given)
    required = [name for name, (default, _) in dotted_keys(schema).items() if default == MISSING]
    missing = sorted(name for name in required if _value(recipe, name) in (MISSING, ""))
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given, in the recipe or as {missing[0]}=...")
    if isinstance(recipe, Recipe):
        check_recipe(recipe)
    return recipe


def _validated(schema: type, given: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(schema).validate_python(given)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0], schema)) from None


def _value(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


def _merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`given` updated by `more`, section by section."""
    merged = dict(given)
    for name, value in more.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are literal text, except null and the merge key. Duplicate keys are errors."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if name.value in names:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {name.value} comes twice", problem_mark=name.start_mark
                    )
                names.add(name.value)
        return node


def _parse_yaml(text: str | bytes, what: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # constructors of tags may raise anything
        shown = what if len(what) <= 100 else what[:100] + "..."
        raise UserError(f"{shown} is not valid YAML: {_where_yaml_breaks(error)}") from None


def _where_yaml_breaks(error: Exception) -> str:
    """PyYAML's message with line and column instead of its multi-line excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"position {error.position}: {error.reason}"
    return reason_of(error)


def _read_yaml(file: str) -> dict[str, Any]:
    path = shipped_file(file, "recipes")
    if os.path.isdir(path):
        raise UserError(f"recipe {file} is a folder; give the .yaml file")
    if not os.path.isfile(path):
        raise UserError(f"recipe {file}: no such file{shipped_hint(file, 'recipes')}")
    try:
        content = _parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"recipe {file} cannot be read: {error.strerror}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return content or {}


def _read_word(schema: type, word: str) -> dict[str, Any]:
    """What a `key=value` word says: text literally, a section as YAML, a list as YAML where it has brackets."""
    name, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", name):
        raise UserError(f"{word!r} is not of the form key=value (a recipe comes first, then key=value words)")
    annotation = None
    section = schema
    for part in name.split("."):
        annotation = _annotations(section).get(part) if section else None
        section = _section_of(annotation)
    is_list = typing.get_origin(annotation) is list
    value: Any = text
    is_mapping = typing.get_origin(annotation) is dict
    if section or is_mapping or (is_list and text.startswith("[") and text.endswith("]")):
        value = _parse_yaml(text, word)
    elif text in NULL and (is_list or type(None) in typing.get_args(annotation)):
        value = None
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _section_of(annotation: Any) -> Any:
    """The dataclass that a key of this type holds, if it is a section."""
    kinds = (annotation, *typing.get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _as_meant(section: type, given: dict[str, Any]) -> dict[str, Any]:
    """`train: a.jsonl` means `train: [a.jsonl]`; a section or list without content is an empty one."""
    meant = dict(given)
    for name, annotation in _annotations(section).items():
        value = given.get(name)
        inner = _section_of(annotation)
        if inner is not None and isinstance(value, dict):
            meant[name] = _as_meant(inner, value)
        elif name in given and value is None and inner is annotation:
            meant[name] = {}
        elif name in given and typing.get_origin(annotation) is list and not isinstance(value, list):
            meant[name] = [] if value is None else [value]
    return meant


def explain(error: Any, schema: type) -> str:
    """One sentence for one of pydantic's errors."""
    name = ".".join(part for part in error["loc"] if isinstance(part, str))
    if error["type"] == "unexpected_keyword_argument":
        return _unknown_key(name, schema)
    value = error["input"]
    if value in (None, ""):
        shown = "empty"
    elif isinstance(value, str) and value.isprintable():
        shown = value
    else:
        shown = repr(value)
    if error["type"] == "dataclass_type":
        reason = "it is a section with keys (see ksl-ds COMMAND --help)"
    else:
        reason = (
            error["msg"].removeprefix("Value error, ").partition(", unable to")[0].replace("Input should", "it should")
        )
    if error["type"] == "string_type" and value is not None:
        reason += "; put text with brackets in quotes"
    return f"{name} is {shown if len(shown) <= 100 else shown[:100] + '...'}; {reason}"


def _unknown_key(name: str, schema: type) -> str:
    known = dotted_keys(schema)
    sections = sorted({known_key.rpartition(".")[0] for known_key in known} - {""})
    by_last_part = {known_key.rpartition(".")[2]: known_key for known_key in known}
    near = difflib.get_close_matches(name, [*known, *sections], n=1, cutoff=0.6)
    near = near or [
        by_last_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1)
    ]
    return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "; see ksl-ds COMMAND --help")


class _Dumper(yaml.SafeDumper):
    """YAML whose text with line breaks is in double quotes: PyYAML loses Unicode's own ones elsewhere."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if data.splitlines() != [data] else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def save_recipe(recipe: Any, path: Path) -> None:
    """Writes the complete, resolved recipe; `load_recipe` of that file gives the same recipe. Raises UserError."""
    write_text(path, yaml.dump(dataclasses.asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
