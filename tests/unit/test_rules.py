"""How gradients go with the size of an FFN's output, and the rule that follows.

Shape suffixes: N rows (scored positions).
"""

from typing import Any

import numpy as np
import pytest
import torch

from hireconvert.families import ffn_parts, find_layout, num_layers
from hireconvert.recipe import FfnRecipe, Recipe
from hireconvert.rules import FIRST, rule_of, size_power, with_rule
from tests.tiny import tiny_model, tokens


def slow_power(model: Any, ids_T: torch.Tensor, seed: int) -> float:
    """The twin: autograd by what is added to the outputs, numpy's straight line."""
    layout, added, sizes, hooks = find_layout(model), [], [], []
    for index in range(num_layers(model)):
        part = ffn_parts(model, layout, index)
        norm_F = part.down_FD().detach().norm(dim=1)

        def add(_module: Any, args: Any, out: torch.Tensor, norm_F: Any = norm_F) -> torch.Tensor:
            sizes.append((args[0].detach().abs() * norm_F).square().sum(-1).sqrt().flatten())
            added.append(torch.zeros_like(out, requires_grad=True))
            return out + added[-1]

        hooks.append(part.down.module.register_forward_hook(add))
    logs = model(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(-logs.gather(1, drawn).sum(), added)
    powers = []
    for size_N, g_ND in zip(sizes, gradients, strict=True):
        pull_N = g_ND.flatten(0, -2).norm(dim=1)
        x_N, y_N = (t[FIRST:-1].double().log().numpy() for t in (size_N, pull_N))
        powers.append(np.polyfit(x_N, y_N, 1)[0])
    return float(np.mean(powers))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "phi3"])
def test_the_power_is_that_of_gradients_taken_one_by_one(family: str) -> None:
    model, ids_WT, told = tiny_model(family), tokens(1, 40), []
    found = size_power(
        model, find_layout(model), ids_WT, seed=3, progress=lambda *done: told.append(done)
    )
    assert found == pytest.approx(slow_power(model, ids_WT[0], 3), rel=1e-3)
    assert told == [(1, 1)]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("family", "rule"),
    [("llama", "threshold"), ("gemma2", "relative"), ("gemma3_text", "relative")],
)
def test_errors_count_by_their_share_where_a_norm_follows(family: str, rule: str) -> None:
    model = tiny_model(family)
    power = size_power(model, find_layout(model), tokens(6, 64), seed=0)
    assert rule_of(power) == rule
    assert (power == pytest.approx(-1, abs=0.2)) == (rule == "relative")


def test_the_rule_takes_the_place_of_level() -> None:
    ffn = FfnRecipe(keep_fraction=0.5, selection="level", keep="candidates")
    recipe = with_rule(Recipe(name="mine", ffn=ffn), "relative")
    assert recipe.ffn is not None and recipe.ffn.selection == "relative"
    assert recipe.ffn.keep_fraction == 0.5 and recipe.name == "mine"
