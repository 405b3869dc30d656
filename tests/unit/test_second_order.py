"""Costs to second order against a slow twin and against the KL; lists against trying them all."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hireconvert.allocation import Allocation, Trades
from hireconvert.budget import Memo, Trials, solve
from hireconvert.families import ffn_parts, find_layout, num_layers
from hireconvert.lowbit import live_copies
from hireconvert.masked import MaskedModel
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.schema import UnselectedRecipe
from hireconvert.second_order import cheapest, convex_savings
from tests.ffn_reference import gradients
from tests.tiny import NEURONS, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "llama_bias", "qwen2", "gemma2", "gemma3_text", "phi3", "opt", "gpt2")
ROUGH: dict[str, Any] = {"predictor": PredictorRecipe(bits=3, block=16, symmetric=False)}
BY_ESTIMATE: dict[str, Any] = {**ROUGH, "unselected": UnselectedRecipe(bits=4, block=16)}
FINE: dict[str, Any] = {
    "predictor": PredictorRecipe(bits=8, block=16, symmetric=False),
    "unselected": UnselectedRecipe(bits=8, block=16),
}
# What names candidates and what others count as: settings of the recipe, and whether its copies
# name candidates by estimated sizes (None: there are no copies).
CASES: dict[str, tuple[dict[str, Any], bool | None]] = {
    "exact, zero": ({}, None),
    "exact": (BY_ESTIMATE, False),
    "exact, more candidates": ({**BY_ESTIMATE, "over_select": 1.5}, False),
    "plain": ({**BY_ESTIMATE, "score": "plain", "over_select": 1.5}, False),
    "sizes, zero": ({**ROUGH, "over_select": 1.5}, True),
    "sizes": ({**BY_ESTIMATE, "over_select": 1.5}, True),
    "error": ({**BY_ESTIMATE, "score": "error"}, False),
    "error, fine": ({**FINE, "score": "error"}, False),
    "error, more candidates": ({**BY_ESTIMATE, "score": "error", "over_select": 1.5}, False),
}


def masked_model(model: Any, ids_WT: torch.Tensor, case: str) -> MaskedModel:
    changes, selects = CASES[case]
    ffn = FfnRecipe(keep_fraction=0.4, **{"over_select": 1.0, **changes})
    layout = find_layout(model)
    copies = () if selects is None else live_copies(model, layout, ffn, selects=selects)
    return MaskedModel(model, layout, ids_WT, score=ffn.score, copies=copies)


# --------------------------------------------------------------------------- the pass


def outputs_of(masked: MaskedModel, ids_T: torch.Tensor, active: tuple[int, ...]) -> list[Any]:
    """What the last matrix of every FFN returns, [T, D], what others add by estimate included."""
    caught, hooks = [], []
    for index in range(len(active)):
        down = ffn_parts(masked.model, masked.layout, index).down.module
        hooks.append(down.register_forward_hook(lambda _m, _a, out: caught.append(out)))
    with torch.no_grad():
        masked._run(ids_T, active, [])
    for hook in hooks:
        hook.remove()
    return [out.flatten(0, -2) for out in caught]


def slow_costs(
    masked: MaskedModel, ids_T: torch.Tensor, active_LS: Sequence[tuple[int, ...]], seed: int
) -> list[list[float]]:
    """The twin: every number of every layer runs for itself, and every row is added up."""
    model, rows = masked.model, len(ids_T) - 1
    gradient, dense = gradients(model, ids_T, seed), outputs_of(masked, ids_T, masked.neurons)
    found = []
    for index, active_S in enumerate(active_LS):
        curve = []
        for active in active_S:
            alone = (*masked.neurons[:index], active, *masked.neurons[index + 1 :])
            error_ND = outputs_of(masked, ids_T, alone)[index] - dense[index]
            effects = [
                float(g @ e) for g, e in zip(gradient[index][:-1], error_ND[:-1], strict=True)
            ]
            curve.append(sum(effect**2 for effect in effects) / (2 * rows))
        found.append(curve)
    return found


def check_costs(family: str, case: str) -> None:
    model, ids_WT = tiny_model(family), tokens(2, 12)
    active_LS = [(8, 20, 24, 38 + index, NEURONS) for index in range(num_layers(model))]
    if family == "opt":  # few, as half of its neurons tie at zero
        active_LS = [(4, 8, 12, 16 + index, NEURONS) for index in range(num_layers(model))]
    with masked_model(model, ids_WT, case) as masked:
        found = masked.costs(1, active_LS, 7)
        expected = slow_costs(masked, ids_WT[1], active_LS, 7)
        assert masked.costs(1, active_LS, 7) == found
        assert masked.costs(1, active_LS, 8) != found
        assert masked.measure(masked.neurons)[0].kl == 0.0
    for curve, twin in zip(found, expected, strict=True):
        assert curve == pytest.approx(twin, rel=1e-3, abs=1e-9)
        assert min(curve[:-1]) > 1e-7 and curve[-1] == 0.0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_every_selection_by_itself(family: str) -> None:
    check_costs(family, "error")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_costs_go_by_what_names_candidates_and_what_the_others_count(
    family: str, case: str
) -> None:
    check_costs(family, case)


@pytest.mark.parametrize("case", ["error", "exact", "exact, zero", "exact, more candidates"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_costs_go_by_levels_where_the_selection_does(family: str, case: str) -> None:
    model, ids_WT = tiny_model(family), tokens(2, 12)
    active_LS = [(8, 20, 24, NEURONS)] * num_layers(model)
    with masked_model(model, ids_WT, case) as masked:
        fixed = masked.costs(1, active_LS, 7)
        masked.levels = masked.fit_levels()
        found = masked.costs(1, active_LS, 7)
        expected = slow_costs(masked, ids_WT[1], active_LS, 7)
    for curve, twin, other in zip(found, expected, fixed, strict=True):
        assert curve == pytest.approx(twin, rel=1e-3, abs=1e-9)
        assert curve[-1] == 0.0 and curve[:-1] != other[:-1]


def test_logits_of_a_few_positions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn one position after the other, so the draws are the same too."""
    model, ids_WT = tiny_model("gemma2"), tokens(1, 20)
    found = []
    for at_once in (2**23, 200):
        monkeypatch.setattr("hireconvert.masked.LOGITS_AT_ONCE", at_once)
        with masked_model(model, ids_WT, "error") as masked:
            found.append(masked.costs(0, [(20,), (30,)], 3))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_costs_foretell_the_divergence_of_small_errors(family: str) -> None:
    """Of one position, where tokens do not add up: the mean over draws is the KL itself."""
    model, ids_WT, num_draws = tiny_model(family), tokens(6, 2), 200
    layers = range(num_layers(model))
    numbers = [(NEURONS // 4,)] * len(layers)
    with masked_model(model, ids_WT, "error, fine") as masked:
        draws = [
            masked.costs(number, numbers, draw) for number in range(6) for draw in range(num_draws)
        ]
        for layer in layers:
            active = [numbers[0][0] if layer == each else NEURONS for each in layers]
            kl = masked.measure(tuple(active))[0].kl
            foretold = sum(drawn[layer][0] for drawn in draws) / len(draws)
            assert kl == pytest.approx(foretold, rel=0.3) and 5e-6 < kl < 1e-4


# --------------------------------------------------------------------------- the list


def trades_of(neurons: tuple[int, ...], shares: Any, step: float = 0.1) -> Trades:
    allocation = Allocation(neurons, FfnRecipe(keep_fraction=shares, over_select=1.0))
    return Trades(allocation, allocation.start, step)


def falling(seeded: random.Random, count: int, *, convex: bool) -> list[float]:
    """A curve of costs that falls."""
    savings = [seeded.random() for _ in range(count - 1)]
    if convex:
        savings.sort(reverse=True)
    return list(itertools.accumulate(savings, lambda cost, saving: cost - saving, initial=5.0))


def hull(costs: Sequence[float]) -> list[float]:
    """The lower convex hull at every point: the lowest of all lines between two of the curve."""
    places = range(len(costs))
    return [
        min(
            costs[i] if i == j else costs[i] + (costs[j] - costs[i]) * (at - i) / (j - i)
            for i in places[: at + 1]
            for j in places[at:]
        )
        for at in places
    ]


def total(trades: Trades, curves: Sequence[Sequence[float]], levels: Sequence[int]) -> float:
    return sum(
        curve[level - trades.reach(layer)[0]]
        for layer, (curve, level) in enumerate(zip(curves, levels, strict=True))
    )


def least(trades: Trades, curves: Sequence[Sequence[float]]) -> float:
    """The least cost of all lists with the base's total in every size, tried one by one."""
    neurons = trades.allocation.neurons
    lists = itertools.product(*(trades.reach(layer) for layer in range(len(neurons))))
    return min(
        total(trades, curves, levels)
        for levels in lists
        if all(
            sum(level for level, own in zip(levels, neurons, strict=True) if own == size) == 0
            for size in set(neurons)
        )
    )


def test_savings_follow_the_lower_convex_hull() -> None:
    assert convex_savings([9.0, 5.0, 3.0, 2.0]) == [4.0, 2.0, 1.0]
    assert convex_savings([9.0, 8.0, 3.0, 3.0, 1.0]) == [3.0, 3.0, 1.0, 1.0]
    assert convex_savings([4.0]) == []
    seeded = random.Random(0)
    for _ in range(30):
        costs = [seeded.random() for _ in range(7)]
        savings = convex_savings(costs)
        assert savings == sorted(savings, reverse=True)
        kept = list(itertools.accumulate(savings, lambda a, b: a - b, initial=costs[0]))
        assert kept == pytest.approx(hull(costs), abs=1e-12)


@pytest.mark.parametrize(
    ("neurons", "shares"),
    [((96,) * 3, 0.4), ((96, 96, 64, 64), [0.3, 0.5, 0.2, 0.7]), ((96, 64), 0.5)],
)
@pytest.mark.parametrize("convex", [True, False])
def test_no_list_of_the_same_total_costs_less(
    neurons: tuple[int, ...], shares: Any, convex: bool
) -> None:
    trades, seeded, moved = trades_of(neurons, shares), random.Random(1), 0
    for _ in range(15):
        curves = [
            falling(seeded, len(trades.reach(layer)), convex=convex)
            for layer in range(len(neurons))
        ]
        levels = cheapest(trades, curves)
        for size in set(neurons):
            assert sum(x for x, own in zip(levels, neurons, strict=True) if own == size) == 0
        assert all(level in trades.reach(layer) for layer, level in enumerate(levels))
        hulls = [hull(curve) for curve in curves]
        assert total(trades, hulls, levels) == pytest.approx(least(trades, hulls), abs=1e-9)
        if convex:
            assert total(trades, curves, levels) == pytest.approx(least(trades, curves), abs=1e-9)
        moved += levels != trades.none
    assert moved > 10 or len(set(neurons)) == len(neurons)


def test_levels_reach_from_one_step_to_every_neuron() -> None:
    trades = trades_of((96,) * 3, [0.4, 0.05, 1.0])
    assert [trades.reach(layer) for layer in range(3)] == [
        range(-3, 7),
        range(0, 10),
        range(-9, 1),
    ]
    assert trades.keep(0, -3) == 0.1 and trades.keep(1, 9) == 0.95 and trades.keep(2, 0) == 1.0


# --------------------------------------------------------------------------- the search

STEPS: list[tuple[int, int, str]] = []


def solved(model: Any, *, keep: Any = 0.4, path: Path | None = None, seed: int = 0) -> Any:
    """The list found on four windows, and the trials."""
    ffn = FfnRecipe(keep_fraction=keep, **{**BY_ESTIMATE, "score": "error", "over_select": 1.0})
    allocation = Allocation((NEURONS,) * num_layers(model), ffn)
    with masked_model(model, tokens(4, 16, seed=1), "error") as masked:
        trials = Trials("search", masked, allocation, Memo(path, {"seed": seed}))
        trades = Trades(allocation, allocation.start, 0.05)
        STEPS.clear()
        return solve(trials, trades, seed, lambda *step: STEPS.append(step)), trials


@pytest.mark.parametrize("loud", [0, 1, 2])
def test_the_layer_that_matters_most_keeps_most(loud: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for index in range(3):
            if index != loud:
                ffn_parts(model, find_layout(model), index).down_FD().mul_(0.1)
    keeps, _ = solved(model)
    assert keeps[loud] >= 0.7 and sum(keeps) == pytest.approx(1.2, abs=1e-9)
    assert min(keeps) >= 0.05


def test_progress_counts_windows_and_tells_the_cost_of_the_base() -> None:
    model = tiny_model("llama")
    _, trials = solved(model)
    assert [step[:2] for step in STEPS] == [(n + 1, 4) for n in range(4)]
    assert trials.num_windows_scored == 3 * 4  # a pass forward and back is three
    count = round(0.4 * NEURONS)
    with masked_model(model, tokens(4, 16, seed=1), "error") as masked:
        drawn = random.Random("0 0").getrandbits(63)
        base = sum(curve[0] for curve in masked.costs(0, [(count,)] * 3, drawn))
    assert STEPS[0][2] == f"KL to second order {base:.5f}"


def test_the_list_is_that_of_the_mean_over_windows_and_of_the_seed() -> None:
    model = tiny_model("llama")
    keeps, trials = solved(model, keep=[0.3, 0.4, 0.5])
    trades = Trades(trials.allocation, (0.3, 0.4, 0.5), 0.05)
    windows = [trials.costs(trades, number, 0) for number in range(4)]  # remembered
    layers = zip(*windows, strict=True)
    curves = [[sum(costs) for costs in zip(*layer, strict=True)] for layer in layers]
    assert keeps == trades.keeps(cheapest(trades, curves)) != trades.base
    assert solved(model, keep=[0.3, 0.4, 0.5])[0] == keeps
    other = solved(model, keep=[0.3, 0.4, 0.5], seed=1)[1]
    assert other.costs(trades, 0, 1) != windows[0]


class Killed(Exception):
    pass


def test_a_killed_pass_goes_on_with_the_next_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, memo = tiny_model("llama"), tmp_path / "memo"
    whole, _ = solved(model, path=tmp_path / "whole")
    real, passed = MaskedModel.costs, []

    def dying(self: MaskedModel, number: int, *given: Any) -> Any:
        passed.append(number)
        if len(passed) == 3:
            raise Killed
        return real(self, number, *given)

    monkeypatch.setattr(MaskedModel, "costs", dying)
    with pytest.raises(Killed):
        solved(model, path=memo)
    with memo.open("a") as file:
        file.write('["search costs 2 38,38,')  # a line that the kill cut off
    assert solved(model, path=memo)[0] == whole
    assert passed == [0, 1, 2, 2, 3]
    assert solved(model, path=memo)[0] == whole and len(passed) == 5, "it was passed again"
    assert memo.read_text() == (tmp_path / "whole").read_text()
    keys = [json.loads(line)[0] for line in memo.read_text().splitlines()[1:]]
    assert keys == [f"search costs {number} 38,38,38" for number in range(4)]
