"""What the rules of selection by level cost, weighed by gradients, and the one chosen.

Shape suffixes: N rows (scored positions), F neurons.
"""

import random
from typing import Any

import pytest
import torch

from hireconvert.families import ffn_parts, find_layout, num_layers
from hireconvert.levels import ScoreLevels
from hireconvert.recipe import FfnRecipe, Recipe
from hireconvert.rules import cheapest_rule, is_asked, rule_costs, told, with_rule
from hireconvert.scoring import layer_counts
from tests.ffn_reference import gradients
from tests.tiny import NEURONS, tiny_model, tokens


def slow_costs(model: Any, ids_WT: torch.Tensor, num_kept: int, seed: int) -> dict[str, float]:
    """The twin: autograd by what is added to the outputs, scores sorted."""
    layout = find_layout(model)
    layers = range(num_layers(model))
    scores: list[list[torch.Tensor]] = [[] for _ in layers]
    pulls: list[list[torch.Tensor]] = [[] for _ in layers]
    last: dict[int, torch.Tensor] = {}
    hooks = []
    for index in layers:
        part = ffn_parts(model, layout, index)
        norm_F = part.down_FD().detach().norm(dim=1)

        def note(_module: Any, args: Any, index: int = index, norm_F: Any = norm_F) -> None:
            last[index] = (args[0].detach().abs() * norm_F).reshape(-1, NEURONS)[:-1].double()

        hooks.append(part.down.module.register_forward_pre_hook(note))
    for number, ids_T in enumerate(ids_WT):
        own_seed = random.Random(f"{seed} {number}").getrandbits(63)
        for index, g_ND in enumerate(gradients(model, ids_T, own_seed)):
            pulls[index].append(g_ND[:-1].double().square().sum(1))
            scores[index].append(last[index])
    for hook in hooks:
        hook.remove()
    costs = {"threshold": 0.0, "relative": 0.0}
    for index in layers:
        score_NF, pull_N = torch.cat(scores[index]), torch.cat(pulls[index])
        cost_NF = score_NF.square() * pull_N[:, None]
        share_NF = score_NF / score_NF.norm(dim=1, keepdim=True)
        for rule, standing_NF in (("threshold", score_NF), ("relative", share_NF)):
            order = standing_NF.flatten().sort(descending=True).indices
            costs[rule] += float(cost_NF.flatten()[order[num_kept * len(score_NF) :]].mean())
    return {rule: cost / min(costs.values()) for rule, cost in costs.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "phi3"])
def test_costs_are_those_of_scores_sorted(family: str) -> None:
    model, ids_WT, told = tiny_model(family), tokens(3, 40), []
    layout, kept = find_layout(model), [NEURONS // 4] * num_layers(model)
    found = rule_costs(
        model, layout, ids_WT, kept, seed=3, progress=lambda *done: told.append(done)
    )
    expected = slow_costs(model, ids_WT, NEURONS // 4, 3)
    assert found == pytest.approx(expected, rel=2e-2)
    assert cheapest_rule(found) == min(expected, key=lambda rule: expected[rule])
    assert min(found.values()) == 1.0 and told == [(1, 3), (2, 3), (3, 3)]
    assert found != rule_costs(model, layout, ids_WT, kept, seed=4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_scores_count_by_their_share_where_a_norm_follows(family: str) -> None:
    model = tiny_model(family)
    kept = [NEURONS // 4] * num_layers(model)
    costs = rule_costs(model, find_layout(model), tokens(6, 64), kept, seed=0)
    assert cheapest_rule(costs) == "relative" and costs["threshold"] > 1.02


def test_weights_below_a_level_are_summed() -> None:
    levels, dice = ScoreLevels(1), torch.Generator().manual_seed(0)
    score_NF, weight_NF = (torch.rand(50, 40, generator=dice) + 0.1 for _ in range(2))
    levels.note(0, score_NF, weight_NF.double())
    for number in (1, 10, 39):
        below_NF = score_NF < levels.of(0, number)
        expected = float((weight_NF * below_NF).sum() / 50)
        assert levels.below(0, number) == pytest.approx(expected, abs=0.05)
    assert levels.below(0, 40) == pytest.approx(0.0, abs=1e-9)
    assert levels.below(0, 41) == 0.0


def test_the_rule_takes_the_place_of_level() -> None:
    ffn = FfnRecipe(keep_fraction=0.5, selection="level", keep="candidates")
    recipe = with_rule(Recipe(name="mine", ffn=ffn), "relative")
    assert recipe.ffn is not None and recipe.ffn.selection == "relative"
    assert recipe.ffn.keep_fraction == 0.5 and recipe.name == "mine"
    assert cheapest_rule({"threshold": 1.0, "relative": 1.0}) == "threshold"
    assert told({"threshold": 1.25, "relative": 1.0}) == (
        "ffn.selection: relative (threshold would cost 1.25 times as much, to second order)"
    )


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, True),
        ({"selection": "threshold"}, False),
        ({"keep_fraction": 1.0}, False),
        ({"keep_fraction": 1.0, "rows": "copies", "unselected": {}}, False),
    ],
)
def test_nothing_is_asked_where_nothing_is_selected(changes: dict[str, Any], asked: bool) -> None:
    given = {"keep_fraction": 0.5, "selection": "level", "keep": "candidates", "over_select": 20}
    ffn = FfnRecipe(**{**given, **changes})
    assert isinstance(ffn.keep_fraction, float)
    assert is_asked([None, layer_counts(NEURONS, ffn, ffn.keep_fraction)]) == asked
    assert not is_asked([]) and not is_asked([None])
