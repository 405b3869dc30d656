"""YAML read strictly into typed sections: YAML 1.2 scalars, errors that name the key or the line.

Recipes and gates are such files; `schema.Section` is the base of what they are read into.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hireconvert.errors import UsageError
from hireconvert.schema import LIST, ONE

Model = TypeVar("Model", bound=BaseModel)


def read_mapping(path: Path, what: str, keys: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that is called `what` ("recipe") in messages.

    `keys` are some it may have, for the message. Raises UsageError when it is no such file.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: a {what} is a UTF-8 YAML file; this is none") from error
    except OSError as error:
        raise UsageError(f"{path}: the {what} cannot be read: {error.strerror}") from error
    tree = parse(text, str(path), what)
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {shown(tree)}"
        raise UsageError(f"{path}: a {what} is a mapping of keys ({keys}, ...); it {found}")
    return tree


def build(model: type[Model], tree: Mapping[str, Any], where: str, what: str) -> Model:
    """Return the tree as a `model`. Raises UsageError listing every problem with its key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = "".join(f"\n  {line}" for line in _explain(error, model))
        raise UsageError(f"{where}: the {what} is wrong:{lines}") from error


# ------------------------------------------------------------------------------------------- YAML

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# YAML 1.2's core schema: PyYAML's own reads 1e-3 as text, 010 as 8, `no` as false, 1:30 as 90.
_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    _INT: (r"[-+]?[0-9]+", "-+0123456789"),
    _FLOAT: (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's class-level table

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not used here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                what = "duplicate key" if isinstance(key, yaml.ScalarNode) else "key is no text"
                named = f" {key.value!r}" if isinstance(key, yaml.ScalarNode) else ""
                raise yaml.constructor.ConstructorError(None, None, what + named, key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=True)


class Dumper(yaml.SafeDumper):
    """Writes what is read back as it was."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's class-level table


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, Dumper):
        _letters = ["" if letter == "\0" else letter for letter in _first]
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _letters)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor(_INT, _decimal)


def parse(text: str, where: str, what: str) -> Any:
    """Return what YAML text holds. Raises UsageError naming the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{where}{line}: not a valid {what}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{where}: a {what} is a UTF-8 YAML file; this is none: {error}"
        ) from error


# ------------------------------------------------------------------------------------ explanations

_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section (a mapping of keys)",
    "dict_type": "a section (a mapping of keys)",
}


def _explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"] if part not in (ONE, LIST)]
        if item["type"] == "together":
            problems = item["ctx"]["problems"]
        else:
            problems = [("", _message(item, parts, model))]
        for key, message in problems:
            path = ".".join([*parts, key] if key else parts)
            lines.append(f"{path}: {message}" if path else message)
    return lines


def _message(item: Mapping[str, Any], parts: list[str], model: type[BaseModel]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "missing":
        return "missing; this key is required"
    if kind == "extra_forbidden":
        known = _keys_beside(parts, model)
        return f"unknown key{did_you_mean(parts[-1], known)}; there are {', '.join(known)}"
    if kind == "literal_error":
        return f"{shown(value)} is not one of {item['ctx']['expected']}"
    if kind in ("string_too_short", "too_short"):
        return f"{shown(value)} is empty"
    if kind in _EXPECTED:
        return f"{shown(value)} is not {_EXPECTED[kind]}"
    return str(item["msg"])


def _keys_beside(parts: list[str], section: type[BaseModel]) -> list[str]:
    for part in parts[:-1]:
        if part in section.model_fields:  # else it is an index, or a key that the user chose
            section = next(_sections(section.model_fields[part].annotation))
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def did_you_mean(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the known word that was probably meant, as the end of a message, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """Return a value as messages quote it."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    text = "null" if value is None else text
    return text if len(text) <= 60 else text[:57] + "..."
