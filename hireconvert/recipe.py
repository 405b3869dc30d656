"""A recipe's YAML form: strict reading, `--set` overrides, errors that name the key, writing.

The typed tree itself is in `schema.py`. A recipe file states differences from the defaults only.
"""

import difflib
import importlib.resources
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hireconvert.errors import UsageError
from hireconvert.schema import (
    LIST,
    ONE,
    DataRecipe,
    DecodeRecipe,
    DistillRecipe,
    EvaluateRecipe,
    FfnRecipe,
    HeadRecipe,
    OutputRecipe,
    PredictorRecipe,
    Recipe,
)

__all__ = [
    "DataRecipe",
    "DecodeRecipe",
    "DistillRecipe",
    "EvaluateRecipe",
    "FfnRecipe",
    "HeadRecipe",
    "OutputRecipe",
    "PredictorRecipe",
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "per_layer",
    "recipe_schema",
    "shipped_recipes",
]

T = TypeVar("T")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a shipped name (which wins) or a YAML file, with `a.b=c` overrides.

    Raises UsageError listing every problem with its key.
    """
    path = _find(str(name_or_path))
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: a recipe is a UTF-8 YAML file; this is none") from error
    except OSError as error:
        raise UsageError(f"{path}: the recipe cannot be read: {error.strerror}") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_shown(tree)}"
        raise UsageError(
            f"{path}: a recipe is a mapping of keys (name, ffn, head, ...); it {found}"
        )
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = "".join(f"\n  {line}" for line in _explain(error))
        raise UsageError(f"{path}: the recipe is wrong:{lines}") from error


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package by name, sorted."""
    if importlib.util.find_spec("hireconvert.recipes") is not None:
        folder = Path(str(importlib.resources.files("hireconvert.recipes")))
    else:  # run from the source tree, where recipes/ lies beside the package
        folder = Path(__file__).resolve().parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: every field, in the order of the schema."""
    tree = recipe.model_dump(mode="python")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def per_layer(value: T | list[T], num_layers: int, key: str) -> list[T]:
    """Return one value a layer; a single one counts for every layer. Raises UsageError."""
    if not isinstance(value, list):
        return [value] * num_layers
    if len(value) != num_layers:
        found = f"{len(value)} values for {num_layers} layers"
        raise UsageError(f"{key}: {found}; give one value, or a list of {num_layers}")
    return list(value)


def _find(name: str) -> Path:
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name}: a recipe is a YAML file; this is a folder")
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        raise UsageError(f"{name}: there is no such recipe file")
    hint = _did_you_mean(name, shipped)
    raise UsageError(f"{name}: no shipped recipe{hint}; there are {', '.join(shipped)}")


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
            raise yaml.composer.ComposerError(None, None, "aliases are not used in recipes", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                what = "duplicate key" if isinstance(key, yaml.ScalarNode) else "key is no text"
                shown = f" {key.value!r}" if isinstance(key, yaml.ScalarNode) else ""
                raise yaml.constructor.ConstructorError(None, None, what + shown, key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's class-level table


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _letters = ["" if letter == "\0" else letter for letter in _first]
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _letters)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor(_INT, _decimal)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{where}{line}: not a valid recipe: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{where}: a recipe is a UTF-8 YAML file; this is none: {error}"
        ) from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or not text.strip():
        raise UsageError(
            f"--set {override!r}: expected KEY=VALUE, for example ffn.keep_fraction=0.5"
        )
    if key.strip() in (
        "data",
        "data.source",
    ):  # a path is taken as typed, whatever YAML makes of it
        parts, value = ["data", "source"], text.strip()
    else:
        value = _parse(text, f"--set {override!r}")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        index = _index(node, part, parts[:depth], override)
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}  # a section that was absent or null comes into being
        node = node[index]
    node[_index(node, parts[-1], parts[:-1], override)] = value


def _index(node: Any, part: str, above: list[str], override: str) -> Any:
    if isinstance(node, dict):
        return part
    where = f"--set {override!r}: {'.'.join(above)}"
    if not isinstance(node, list):
        raise UsageError(
            f"{where} is {_shown(node)}, which has no keys; expected a section or a list"
        )
    if not re.fullmatch(r"[0-9]+", part) or int(part) >= len(node):
        raise UsageError(
            f"{where} is a list of {len(node)}; {part!r} is no index of it (0 is first)"
        )
    return int(part)


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


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"] if part not in (ONE, LIST)]
        if item["type"] == "together":
            problems = item["ctx"]["problems"]
        else:
            problems = [("", _message(item, parts))]
        for key, message in problems:
            path = ".".join([*parts, key] if key else parts)
            lines.append(f"{path}: {message}" if path else message)
    return lines


def _message(item: Mapping[str, Any], parts: list[str]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "missing":
        return "missing; this key is required"
    if kind == "extra_forbidden":
        known = _keys_beside(parts)
        return f"unknown key{_did_you_mean(parts[-1], known)}; there are {', '.join(known)}"
    if kind == "literal_error":
        return f"{_shown(value)} is not one of {item['ctx']['expected']}"
    if kind in ("string_too_short", "too_short"):
        return f"{_shown(value)} is empty"
    if kind in _EXPECTED:
        return f"{_shown(value)} is not {_EXPECTED[kind]}"
    return str(item["msg"])


def _keys_beside(parts: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in parts[:-1]:
        if not part.isdigit():
            section = next(_sections(section.model_fields[part].annotation))
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _did_you_mean(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    text = "null" if value is None else text
    return text if len(text) <= 60 else text[:57] + "..."
