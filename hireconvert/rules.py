"""Which rule of selection by level serves a model: how an error counts by the size of an output.

What an error e in a layer's output costs is (g.e)^2 on average, g the gradient of -log p of a next
token (`second_order.py`). A level that is best for all tokens is then one of |g| times expected
errors. Over tokens |g| goes roughly as a power of the size of the layer's output: about 0 in Llama,
so that errors count as they are (`threshold`); about -1 where a norm follows the FFN, as in Gemma,
so that they count by their share of the output (`relative`).

Shape suffixes: W windows, T tokens of a window, N rows (scored positions).
"""

from collections.abc import Callable
from typing import Any

import torch

from hireconvert.families import Layout
from hireconvert.masked import MaskedModel
from hireconvert.recipe import Recipe

NUM_TOKENS, LENGTH = 2048, 256  # what the powers are taken on, and tokens that run at once
FIRST = 4  # positions left out: outputs there are up to a thousand times as large
MIDDLE = -0.5  # of the powers of the two rules


def size_power(
    model: Any,
    layout: Layout,
    ids_WT: torch.Tensor,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """The power p of |g| ~ size^p, by least squares of logarithms; the mean over the layers.

    A size is what `runtime.hire_predict.relative_scores` divides by. Next tokens are drawn by the
    seed. `progress` is called with windows done and windows in all.
    """
    with MaskedModel(model, layout, ids_WT) as masked:
        pairs = []
        for number in range(len(ids_WT)):
            pairs.append([logs[FIRST:] for logs in masked.pulls(number, seed)])
            progress(number + 1, len(ids_WT))
    powers = [_slope(torch.cat(of_layer)) for of_layer in zip(*pairs, strict=True)]
    return sum(powers) / len(powers)


def rule_of(power: float) -> str:
    """The selection whose scores count as errors do."""
    return "relative" if power < MIDDLE else "threshold"


def with_rule(recipe: Recipe, rule: str) -> Recipe:
    """The recipe with an explicit rule in place of `level`."""
    assert recipe.ffn is not None
    return recipe.model_copy(update={"ffn": recipe.ffn.model_copy(update={"selection": rule})})


def _slope(point_N2: torch.Tensor) -> float:
    """The slope of the line through points (x, y) that is closest in y."""
    x_N, y_N = (point_N2 - point_N2.mean(0)).double().unbind(1)
    return float((x_N @ y_N) / (x_N @ x_N).clamp_min(1e-30))
