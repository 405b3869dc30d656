"""A recipe's YAML form: shipped names, `--set` overrides, writing.

The typed tree itself is in `schema.py`. A recipe file states differences from the defaults only.
"""

import importlib.resources
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hireconvert.errors import UsageError
from hireconvert.schema import (
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
from hireconvert.strict_yaml import Dumper, build, did_you_mean, parse, read_mapping, shown

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
    tree = read_mapping(path, "recipe", "name, ffn, head")
    for override in overrides:
        _override(tree, override)
    return build(Recipe, tree, str(path), "recipe")


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
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


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
    hint = did_you_mean(name, shipped)
    raise UsageError(f"{name}: no shipped recipe{hint}; there are {', '.join(shipped)}")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or not text.strip():
        raise UsageError(
            f"--set {override!r}: expected KEY=VALUE, for example ffn.keep_fraction=0.5"
        )
    if key.strip() in ("data", "data.source", "finetune.source"):
        # A path is taken as typed, whatever YAML makes of it.
        parts, value = [parts[0], "source"], text.strip()
    else:
        value = parse(text, f"--set {override!r}", "recipe")
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
            f"{where} is {shown(node)}, which has no keys; expected a section or a list"
        )
    if not re.fullmatch(r"[0-9]+", part) or int(part) >= len(node):
        raise UsageError(
            f"{where} is a list of {len(node)}; {part!r} is no index of it (0 is first)"
        )
    return int(part)
