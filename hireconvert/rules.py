"""Which rule of selection by level serves a model: what each leaves out, weighed by gradients.

What an error e in a layer's output costs is E[(g.e)^2] / 2, g the gradient of -log p of a next
token (`second_order.py`): of errors without a direction of their own, |g|^2 |e|^2 / 2D. Errors of
neurons left out grow with what these add. So a rule costs the sum over tokens of |g|^2 times the
squared scores left out. In Llama little hangs on the size of a token's output, and the largest
scores of all tokens are best (`threshold`); where a norm follows the FFN, as in Gemma, |g| falls as
that size grows, and scores count by their share of it (`relative`).

Shape suffixes: W windows, T tokens of a window, N rows (scored positions), F neurons.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hireconvert.families import Layout
from hireconvert.levels import ScoreLevels
from hireconvert.masked import MaskedModel
from hireconvert.measures import prove_logits
from hireconvert.recipe import Recipe
from hireconvert.runtime.hire_predict import relative_scores, varies
from hireconvert.runtime.hire_select import LEVEL_RULES
from hireconvert.second_order import window_seed

NUM_TOKENS, LENGTH = 2048, 256  # what the rules are weighed on, and tokens that run at once


def is_asked(layers: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether a rule is to be found for layers as planned: not where nothing is selected."""
    return any(
        layer and varies(layer) and layer["selection"]["rule"] == "level" for layer in layers
    )


def rule_costs(
    model: Any,
    layout: Layout,
    ids_WT: torch.Tensor,
    kept: Sequence[int],
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """What each rule costs where so many neurons of each layer are `kept` on average.

    In units of the rule that costs least. Scores are exact; next tokens are drawn by the seed.
    `progress` is called with windows done and windows in all.
    """
    levels = {rule: ScoreLevels(len(kept)) for rule in LEVEL_RULES}
    prove_logits(model, ids_WT)
    masked = MaskedModel(model, layout, ids_WT)  # not entered: no selection is laid over it
    for number in range(len(ids_WT)):
        pulls = masked.pulls(number, window_seed(seed, number))
        for index, (score_NF, pull_N) in enumerate(pulls):
            cost_NF = score_NF.double().square() * pull_N[:, None]
            levels["threshold"].note(index, score_NF, cost_NF)
            levels["relative"].note(index, relative_scores(score_NF, score_NF), cost_NF)
        progress(number + 1, len(ids_WT))
    costs = {
        rule: sum(of.below(index, number) for index, number in enumerate(kept))
        for rule, of in levels.items()
    }
    least = max(min(costs.values()), 1e-300)
    return {rule: cost / least for rule, cost in costs.items()}


def cheapest_rule(costs: Mapping[str, float]) -> str:
    """The rule that costs least."""
    return min(LEVEL_RULES, key=lambda rule: costs[rule])


def told(costs: Mapping[str, float]) -> str:
    """One line on the rule that follows."""
    rule = cheapest_rule(costs)
    (other,) = (one for one in LEVEL_RULES if one != rule)
    return (
        f"ffn.selection: {rule} ({other} would cost {costs[other]:.2f} times as much, to second "
        "order)"
    )


def with_rule(recipe: Recipe, rule: str) -> Recipe:
    """The recipe with an explicit rule in place of `level`."""
    assert recipe.ffn is not None
    return recipe.model_copy(update={"ffn": recipe.ffn.model_copy(update={"selection": rule})})
