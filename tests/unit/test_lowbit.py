"""Low-bit copies of live weights, and the recipes that they can stand for."""

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from hireconvert import planning
from hireconvert.errors import InputError, UsageError
from hireconvert.families import ffn_parts, find_layout
from hireconvert.lowbit import Estimate, Inputs, LiveCopies, estimates_of, ffn_inputs
from hireconvert.planning import make_skeleton, plan
from hireconvert.quantize import GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.recipe import load_recipe
from hireconvert.runtime.hire_predict import expected_errors
from hireconvert.schema import (
    DataRecipe,
    EvaluateRecipe,
    FfnRecipe,
    FinetuneRecipe,
    PredictorRecipe,
    Recipe,
    UnselectedRecipe,
)
from hireconvert.schema_budget import BudgetRecipe
from tests.tiny import NEURONS, VOCAB, WIDTH, tiny_model

FIRST, DOWN = GridFormat(4, 16, True), GridFormat(4, 16, False)


def copies_of(family: str, **changes: Any) -> tuple[Any, LiveCopies]:
    model = tiny_model(family)
    parts = ffn_parts(model, find_layout(model), 0)
    return parts, LiveCopies(parts, Estimate(FIRST, **changes))


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt", "gpt2"])
def test_values_are_those_of_rounded_matrices(family: str) -> None:
    parts, copies = copies_of(family, down=DOWN)
    x_ND = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def product(part: Any) -> torch.Tensor:
        weight_FD = part.weight_out_in().detach()
        grid = fit_grid(weight_FD, FIRST)
        bias = 0.0 if part.bias() is None else part.bias()
        return x_ND @ decode_codes(round_codes(weight_FD, grid), grid).T + bias

    expected = parts.act(product(parts.up))
    if parts.gate is not None:
        expected = parts.act(product(parts.gate)) * product(parts.up)
    torch.testing.assert_close(copies.estimated(x_ND)[0], expected)
    down_FD = parts.down_FD().detach()
    grid = fit_grid(down_FD, DOWN)
    assert copies.down_FD is not None
    assert torch.equal(copies.down_FD, decode_codes(round_codes(down_FD, grid), grid))


@torch.no_grad()
def test_refreshing_follows_the_weights_on_the_grids_of_the_start() -> None:
    parts, copies = copies_of("llama", down=DOWN)
    x_ND = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before_NF, before_FD = copies.estimated(x_ND)[0], copies.down_FD
    grids = [fit_grid(part.weight_out_in(), FIRST) for part in (parts.gate, parts.up)]
    for part in parts.matrices():
        part.weight_out_in().mul_(0.7)
    assert torch.equal(copies.estimated(x_ND)[0], before_NF) and copies.down_FD is before_FD
    copies.refresh()
    gate, up = (
        decode_codes(round_codes(part.weight_out_in(), grid), grid)
        for part, grid in zip((parts.gate, parts.up), grids, strict=True)
    )
    torch.testing.assert_close(copies.estimated(x_ND)[0], parts.act(x_ND @ gate.T) * (x_ND @ up.T))
    assert copies.down_FD is not None and before_FD is not None
    torch.testing.assert_close(copies.down_FD, 0.7 * before_FD, atol=0.1, rtol=0)
    assert not torch.equal(copies.down_FD, 0.7 * before_FD)


def test_without_output_vectors_nothing_stands_for_them() -> None:
    _, copies = copies_of("llama")
    assert copies.down_FD is None


def test_copies_given_up_stay_away() -> None:
    _, copies = copies_of("llama", down=DOWN)
    copies.release_first()
    copies.refresh()
    assert list(copies._copies) == ["down"]


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    layout = find_layout(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        LiveCopies(ffn_parts(model, layout, 0), Estimate(FIRST, DOWN))


# --------------------------------------------------------------------------- fitted to a text


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("centre", [True, False])
@torch.no_grad()
def test_copies_fitted_to_a_text_estimate_it_better(family: str, centre: bool) -> None:
    """What an FFN receives lies along few directions, and off zero."""
    model = tiny_model(family)
    layout = find_layout(model)
    parts = ffn_parts(model, layout, 1)
    width = parts.down_FD().shape[1]
    generator = torch.Generator().manual_seed(3)
    few_ND = torch.randn(400, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    x_ND = few_ND + 0.1 * torch.randn(400, width, generator=generator)
    x_ND = x_ND + torch.randn(width, generator=generator)
    inputs = Inputs(x_ND.mean(0), x_ND.T @ x_ND / len(x_ND))

    def error(copies: LiveCopies) -> float:
        exact_NF = parts.act(parts.up.run(x_ND))
        if parts.gate is not None:
            gate_NF, up_NF = (x_ND @ part.weight_out_in().T for part in (parts.gate, parts.up))
            biases = [part.bias() for part in (parts.gate, parts.up)]
            if biases[0] is not None:
                gate_NF, up_NF = gate_NF + biases[0], up_NF + biases[1]
            exact_NF = parts.act(gate_NF) * up_NF
        return float((copies.estimated(x_ND)[0] - exact_NF).square().mean())

    estimate = Estimate(FIRST, centre=centre)
    fitted = LiveCopies(parts, estimate, inputs)
    assert error(fitted) < 0.6 * error(LiveCopies(parts, estimate))
    before = fitted.estimated(x_ND)[0]
    fitted.refresh()  # the weights are what they were: only the feedback of errors is gone
    assert not torch.equal(fitted.estimated(x_ND)[0], before)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "opt"])
@pytest.mark.parametrize("centre", [True, False])
@torch.no_grad()
def test_errors_expected_are_those_of_the_text(family: str, centre: bool) -> None:
    """Fitted copies know them from the moments; refreshed ones take them on some of the rows."""
    model = tiny_model(family)
    parts = ffn_parts(model, find_layout(model), 1)
    width = parts.down_FD().shape[1]
    generator = torch.Generator().manual_seed(5)
    x_ND = torch.randn(900, width, generator=generator) * torch.rand(width, generator=generator)
    x_ND = x_ND + torch.randn(width, generator=generator)
    inputs = Inputs(x_ND.mean(0), x_ND.T @ x_ND / len(x_ND))
    estimate = Estimate(FIRST, DOWN, by_error=True, centre=centre)
    copies = LiveCopies(parts, estimate, inputs)
    gated, down_FD = parts.gate is not None, parts.down_FD()
    names = ("gate", "up") if gated else ("up",)

    def expected(copies: LiveCopies) -> torch.Tensor:
        z_NM = torch.cat([copies._product(name, x_ND) for name in names], dim=-1)
        each = [getattr(parts, name) for name in names]
        exact = [linear(x_ND, part.weight_out_in(), part.bias()) for part in each]
        soft_M = (z_NM - torch.cat(exact, dim=-1)).std(dim=0)
        assert copies.down_FD is not None
        rest = float(((copies.down_FD - down_FD).norm(dim=1) / down_FD.norm(dim=1)).mean())
        return expected_errors(z_NM, soft_M, parts.act, rest, gated=gated)

    torch.testing.assert_close(copies.estimated(x_ND)[1], expected(copies), rtol=2e-2, atol=1e-4)
    copies.refresh()
    error_NF = copies.estimated(x_ND)[1]
    assert error_NF is not None
    assert float((error_NF - expected(copies)).norm() / expected(copies).norm()) < 0.2


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_inputs_are_those_of_the_up_projection(family: str) -> None:
    model = tiny_model(family)
    layout = find_layout(model)
    ids_WT = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    part = ffn_parts(model, layout, 1).up
    hook = part.module.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].flatten(0, -2))
    )
    inputs = ffn_inputs(model, layout, ids_WT)
    hook.remove()
    x_ND = torch.cat(seen)
    assert len(seen) == len(ids_WT)
    torch.testing.assert_close(inputs[1].mean_D, x_ND.mean(0))
    torch.testing.assert_close(inputs[1].moment_DD, x_ND.T @ x_ND / 21)
    assert not part.module._forward_pre_hooks


# --------------------------------------------------------------------------- recipes


def test_estimates_follow_the_recipe_layer_by_layer() -> None:
    predictors = [PredictorRecipe(bits=3, block=8), PredictorRecipe(kind="qlr", symmetric=False)]
    ffn = FfnRecipe(keep_fraction=0.5, over_select=1.3, predictor=predictors)
    first, second = estimates_of(ffn, 2, selects=True)
    assert first == Estimate(GridFormat(3, 8, True), None, 1.3, selects=True)
    assert second == Estimate(GridFormat(4, 64, False), None, 1.3, selects=True)
    with pytest.raises(UsageError, match=r"ffn\.predictor: 2 values for 3 layers"):
        estimates_of(ffn, 3, selects=True)
    changes = {"keep": "candidates", "unselected": UnselectedRecipe(bits=2, block=24)}
    (only,) = estimates_of(FfnRecipe(keep_fraction=0.5, **changes), 1)
    assert only == Estimate(GridFormat(4, 64, True), GridFormat(2, 24, False))


SEARCH, TRAIN = "ffn.budget={mode: search}", "finetune={}"
LEFT_OUT = "ffn.unselected={}"


@pytest.mark.parametrize("simulates", [SEARCH, TRAIN])
@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("{kind: lr}", "it needs kind q or qlr, not predictor.kind lr"),
        ("{kind: auto, target_recall: 0.9}", "it needs kind q or qlr, not predictor.kind auto"),
        ("{input_keep: 0.5}", "it needs predictor.input_keep 1, not 0.5"),
        ("[{kind: q}, {kind: lr}]", "it needs kind q or qlr, not predictor.1.kind lr"),
    ],
)
def test_what_rounded_copies_cannot_stand_for_is_refused(
    simulates: str, predictor: str, message: str
) -> None:
    settings = [simulates, f"ffn.predictor={predictor}", "ffn.score=norm"]
    with pytest.raises(UsageError) as caught:
        load_recipe("balanced", [LEFT_OUT, *settings])
    what = "budget.mode search" if simulates is SEARCH else "finetune"
    assert f"ffn.unselected: {what} simulates estimates by rounded copies" in str(caught.value)
    assert message in str(caught.value)
    as_zero = [*settings, "ffn.unselected=null"]
    assert load_recipe("balanced", as_zero).ffn is not None
    assert load_recipe("balanced", [LEFT_OUT, *settings[1:]]).ffn is not None


@pytest.mark.parametrize("kind", ["q", "qlr"])
def test_what_rounded_copies_stand_for_is_accepted(kind: str) -> None:
    recipe = load_recipe("balanced", [LEFT_OUT, SEARCH, TRAIN, f"ffn.predictor.kind={kind}"])
    assert recipe.ffn is not None and recipe.ffn.not_simulated() is None


# --------------------------------------------------------------------------- memory and time


def planned(**changes: Any) -> tuple[int, float]:
    """(peak memory in bytes, seconds) for a tiny model under the changed recipe, not evaluated."""
    model = tiny_model("llama")
    tensors = {name: ("F32", tuple(each.shape)) for name, each in model.state_dict().items()}
    tensors.pop("lm_head.weight")  # tied
    ffn = FfnRecipe(keep_fraction=0.5, **changes.pop("ffn", {}))
    settings = {"evaluate": EvaluateRecipe(num_tokens=0), **changes}
    recipe = Recipe(name="test", ffn=ffn, **settings)
    skeleton = make_skeleton(model.config.to_dict(), tensors)
    result = plan(skeleton, recipe)
    return int(result["peak_memory_bytes"]), planning._seconds(skeleton, result, recipe)


def peak(**changes: Any) -> int:
    return planned(**changes)[0]


LAYERS = 3  # of the tiny Llama


def test_training_plans_memory_for_the_copies_and_for_what_they_add() -> None:
    tuned = {"finetune": FinetuneRecipe(window=1024)}
    by_estimate = {"ffn": {"unselected": UnselectedRecipe()}}
    copies = LAYERS * 3 * NEURONS * WIDTH
    per_window = LAYERS * NEURONS * 1024
    assert peak(**tuned, **by_estimate) - peak(**tuned) == 4 * (copies + per_window)


def test_a_search_plans_memory_for_the_copies() -> None:
    searched = {"mode": "search", "method": "evolution"}
    plain = {"budget": BudgetRecipe(**searched)}
    by_estimate = {**plain, "unselected": UnselectedRecipe()}
    copies = LAYERS * 3 * NEURONS * WIDTH
    assert peak(ffn=by_estimate) - peak(ffn=plain) == 4 * copies


def test_a_search_plans_memory_for_the_windows_that_it_runs() -> None:
    """Short ones, but as long as it takes where the text has too few of them."""
    kept = []
    for num_tokens in (4096, 16384):
        budget = {"budget": BudgetRecipe(method="second_order", num_tokens=num_tokens)}
        data = {"data": DataRecipe(num_tokens=16384, window=1024)}
        probabilities = 2 * min(num_tokens, 4096) * VOCAB + max(num_tokens - 4096, 0) * VOCAB
        kept.append(peak(ffn=budget, **data) - 4 * probabilities)
    per_token = LAYERS * (16 * WIDTH + 8 * NEURONS) + 16 * NEURONS + 4 * VOCAB
    assert kept[1] - kept[0] == 4 * (1024 - 256) * per_token


def test_slopes_plan_memory_for_what_goes_back_through_the_copies() -> None:
    plain = {"budget": BudgetRecipe(mode="search", method="greedy", num_tokens=65536)}
    by_estimate = {**plain, "unselected": UnselectedRecipe()}
    copies, per_window = LAYERS * 3 * NEURONS * WIDTH, 4 * LAYERS * NEURONS * 1024
    assert peak(ffn=by_estimate) - peak(ffn=plain) == 4 * (copies + per_window)


def test_a_pass_to_second_order_plans_memory_for_one_layer_behind_it() -> None:
    """It goes through the dense model, and not through the copies as slopes do."""
    changes = {"mode": "search", "num_tokens": 65536}
    plain = {"budget": BudgetRecipe(method="second_order", **changes)}
    slopes = {"budget": BudgetRecipe(method="greedy", **changes)}
    by_estimate = {"unselected": UnselectedRecipe()}
    copies = LAYERS * 3 * NEURONS * WIDTH
    assert peak(ffn=plain | by_estimate) - peak(ffn=plain) == 4 * copies
    assert peak(ffn=plain) - peak(ffn=slopes) == 4 * 16 * NEURONS * 1024


def test_a_pass_to_second_order_plans_a_small_part_of_the_time_of_slopes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "measured_rate", lambda: 1.0)
    none, slopes, curves = (
        planned(ffn={} if method is None else {"budget": BudgetRecipe(method=method)})[1]
        for method in (None, "greedy", "second_order")
    )
    weights = sum(each.numel() for each in tiny_model("llama").parameters())
    tokens = 5 * 8192 + 4 * 4096  # the pass and two lists, held-out texts
    assert curves - none == pytest.approx(1.3 * 2.0 * weights * tokens)
    assert slopes - none > 5 * (curves - none)


def test_searching_and_training_plan_time_for_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured_rate", lambda: 1.0)
    search = {"budget": BudgetRecipe(method="evolution", generations=1, num_tokens=256)}
    added = []
    for ffn, more in (({}, {}), (search, {}), ({}, {"finetune": FinetuneRecipe()})):
        with_copy = {**ffn, "unselected": UnselectedRecipe()}
        added.append(planned(ffn=with_copy, **more)[1] - planned(ffn=ffn, **more)[1])
    one_pass = 2.0 * LAYERS * 3 * NEURONS * WIDTH
    tokens = 8 * 512 + 2 * 256 + 4 * 4096  # offspring on probes, two on all, held-out texts
    assert added == pytest.approx([0.0, 1.3 * tokens * one_pass, 5.0 * 262144 * one_pass])


def test_evaluating_plans_memory_for_the_copy_of_the_output_vectors() -> None:
    evaluated = {"evaluate": EvaluateRecipe(num_tokens=65536)}
    evaluated |= {"data": DataRecipe(num_tokens=1024, num_held_tokens=65536)}
    added = peak(**evaluated, ffn={"unselected": UnselectedRecipe()}) - peak(**evaluated)
    assert added == 4 * LAYERS * NEURONS * WIDTH
