"""Figures out of results, whatever lies there, and figures as people read them."""

import math
import sys
from collections.abc import Mapping
from typing import Any

SCOPES = ("all", "all_prefix")  # the sparse ones of an evaluation; limits hold for the worse
ABSENT = "-"


def figure(tree: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, bool) or not isinstance(tree, int | float):
        return None
    # An integer of JSON may be larger than any float.
    return float(tree) if abs(tree) <= sys.float_info.max else None


def worse_scope(text: Mapping[str, Any]) -> str | None:
    """The sparse scope with the higher perplexity; None without a sparse FFN."""
    found = {scope: figure(text, scope, "perplexity") for scope in SCOPES if text.get(scope)}
    return max(found, key=lambda scope: found[scope] or math.inf, default=None)


def number(value: Any, form: str) -> str:
    """A figure in a format, or a dash where there is none."""
    found = figure({"value": value}, "value")
    return ABSENT if found is None else format(found, form)


def interval(each: Any, form: str = ".2%") -> str:
    """A figure with its 95 % interval if it has one, all with their signs."""
    if figure(each, "point") is None:
        return ABSENT
    if figure(each, "low") is None or figure(each, "high") is None:
        return number(figure(each, "point"), f"+{form}")
    point, low, high = (number(figure(each, end), f"+{form}") for end in ("point", "low", "high"))
    return f"{point} ({low} to {high})"


def rest(layer: Mapping[str, Any]) -> str:
    """What a layer's neurons that are not kept count as: zero, or an estimate of so many bits.

    Where all count by their copies, that.
    """
    spec = layer["unselected"]
    if layer["rows"] == "copies":
        return "4-bit copies"
    return "zero" if spec is None else f"{spec['bits']}-bit estimate"


def size(count: float) -> str:
    """Bytes in the unit that keeps three digits, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
