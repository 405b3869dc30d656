"""A number of neurons that varies, and estimates softened by their errors: rules, fitting, cost."""

import copy
from typing import Any

import pytest
import torch

from hireconvert.accounting import layer_rows, predictor_table
from hireconvert.distill import LayerResult, distill_layer
from hireconvert.errors import UsageError
from hireconvert.families import FfnWeights
from hireconvert.recipe import DistillRecipe, FfnRecipe, PredictorRecipe, load_recipe
from hireconvert.runtime.hire_config import check_hire_config, describe
from hireconvert.runtime.hire_predict import (
    Predictor,
    layer_bytes,
    num_active,
    predictor_bytes,
    relative_scores,
)
from hireconvert.runtime.hire_select import (
    LEVEL_RULES,
    RULES,
    candidate_mask,
    finite_rows,
    kept_mask,
    standings,
    zeroed,
)
from hireconvert.scoring import (
    distribution,
    estimated_units,
    exact_scores,
    layer_counts,
    measured,
    score_norms,
    total_bytes,
)
from tests.tiny import hire_model, tiny_model

D, F = 24, 64


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ffn(*, gated: bool = True) -> FfnWeights:
    return FfnWeights(
        gate_FD=drawn(F, D, seed=1) * 0.3 if gated else None,
        up_FD=drawn(F, D, seed=2) * 0.3,
        down_FD=drawn(F, D, seed=3) * torch.linspace(0.5, 2, F).unsqueeze(1),
        gate_bias_F=drawn(F, seed=4) * 0.3 if gated else None,
        up_bias_F=drawn(F, seed=5) * 0.3,
        act=torch.nn.functional.silu if gated else torch.relu,
    )


def rows(count: int, seed: int) -> torch.Tensor:
    mixing = drawn(D, D, seed=6) * torch.linspace(1.5, 0.2, D).unsqueeze(1)
    return drawn(count, D, seed=seed) @ mixing


# As norms before the FFN leave them, and with some four times as loud, so that thresholds matter.
EVEN, EVEN_HELD = rows(600, 7), rows(400, 8)
FIT = EVEN * drawn(600, 1, seed=9).sigmoid().mul(1.5).add(0.5)
HELD = EVEN_HELD * drawn(400, 1, seed=10).sigmoid().mul(1.5).add(0.5)


def made(
    *, gated: bool = True, share: float = 0.5, even: bool = False, **fields: Any
) -> LayerResult:
    own = {k: v for k, v in fields.items() if k in FfnRecipe.model_fields}
    rest = {k: v for k, v in fields.items() if k not in own}
    predictor = PredictorRecipe(**{"block": 8, "rank": 8} | rest)
    recipe = FfnRecipe(keep_fraction=share, **own)
    fit, held = (EVEN, EVEN_HELD) if even else (FIT, HELD)
    return distill_layer(ffn(gated=gated), fit, held, recipe, predictor, share, seed=0)


def ordered(result: LayerResult, *, gated: bool = True) -> FfnWeights:
    """The weights in the order of the result."""
    weights, order = ffn(gated=gated), result.permutation_F
    if order is None:
        return weights
    moved = {
        name: None if tensor is None else tensor[order]
        for name, tensor in vars(weights).items()
        if name != "act"
    }
    return FfnWeights(**moved, act=weights.act)


def kept_numbers(result: LayerResult, x_ND: torch.Tensor, *, gated: bool = True) -> torch.Tensor:
    """How many neurons the shipped code keeps of each row."""
    weights, spec = ordered(result, gated=gated), result.spec
    norm_F = score_norms(weights, spec["score"])
    predictor = Predictor(spec["predictor"], result.tensors, D)
    unit_NS = estimated_units(weights, predictor, x_ND, norm_F, spec)
    score_NF = exact_scores(weights, x_ND, norm_F)
    return kept_mask(spec, candidate_mask(spec, unit_NS), unit_NS, score_NF).sum(1)


# --------------------------------------------------------------------------- rules


def test_standings_of_a_row_by_hand() -> None:
    score, estimate = torch.tensor([[3.0, 0.0, 4.0, 1.0]]), torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    assert torch.equal(standings("threshold", score, estimate), score)
    assert standings("mean_std", score, estimate).tolist() == [[1.0, -2.0, 2.0, -1.0]]
    share = standings("score_mass", score, estimate)
    assert torch.allclose(share, torch.tensor([[10 / 26, 0.0, 1.0, 1 / 26]]))


def test_relative_scores_are_shares_of_what_a_row_comes_to() -> None:
    scale = torch.logspace(-8, 12, 20).unsqueeze(1)
    score, size = drawn(20, 50, seed=3).abs() * scale, drawn(20, 50, seed=4) * scale
    share = relative_scores(score, size)
    expected = score.double() / size.double().square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(share.double(), expected, rtol=1e-5)
    assert torch.equal(share, relative_scores(score * 4, size * 4))
    nothing = relative_scores(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
    assert nothing[0, 0] == 0 and nothing.isfinite().all() and nothing[0, 1] > 1e20


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in LEVEL_RULES])
def test_standings_order_as_scores_do_and_stay_finite(rule: str) -> None:
    score = drawn(20, 50, seed=3).abs() * torch.logspace(-8, 12, 20).unsqueeze(1)
    score[0] = 0
    score[1] = 1.0
    standing = standings(rule, score, score)
    assert standing.isfinite().all()
    order = score[2:].argsort(dim=1)
    assert (standing[2:].gather(1, order).diff(dim=1) >= 0).all()


def test_one_enormous_neuron_leaves_the_mass_of_the_others_exact() -> None:
    score = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    score[0, 17] = 1e4
    share = standings("score_mass", score, score)[0]
    exact = score[0].double().square().sort().values.cumsum(0)
    expected = exact / exact[-1]
    assert torch.allclose(share.sort().values.double(), expected, rtol=1e-4)


# --------------------------------------------------------------------------- fitting


VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "estimated": {"keep": "candidates", "over_select": 1.8},
    "groups": {"group_size": 4, "common_path": 0.125},
    "groups_estimated": {"group_size": 4, "keep": "candidates", "over_select": 1.5},
    "soft": {"soften": True, "bits": 3},
}


@pytest.mark.parametrize(
    ("rule", "variant"),
    [
        (rule, variant)
        for rule in RULES
        for variant, made_with in VARIANTS.items()
        if rule != "relative" or made_with.get("keep") == "candidates"
    ],
)
def test_the_mean_over_calibration_rows_is_the_nominal_number(rule: str, variant: str) -> None:
    result = made(selection=rule, **VARIANTS[variant])
    spec = result.spec
    group = spec["group_size"]
    fitted = kept_numbers(result, FIT).double().mean()
    assert float(fitted) == pytest.approx(spec["num_kept"], abs=2 * group / len(FIT))
    held = kept_numbers(result, HELD)
    assert result.report["kept"] == distribution(held)
    assert spec["selection"]["mean_kept"] == result.report["kept"]["mean"]
    assert result.report["kept"]["max"] <= spec["num_candidates"]
    assert result.report["kept"]["p10"] < spec["num_kept"] < result.report["kept"]["p90"]
    assert 0.85 * spec["num_kept"] < spec["selection"]["mean_kept"] < 1.15 * spec["num_kept"]


def test_an_ungated_layer_does_not_keep_neurons_of_score_zero() -> None:
    result = made(gated=False, share=0.8, over_select=1.25, selection="threshold")
    score_NF = exact_scores(ffn(gated=False), FIT, score_norms(ffn(gated=False), "norm"))
    assert float((score_NF > 0).double().mean()) < 0.8  # ReLU: fewer than are asked for
    number_N = kept_numbers(result, FIT, gated=False)
    assert (number_N <= (score_NF > 0).sum(1)).all() and result.report["recall"] == 1.0


def test_a_distribution_is_counted() -> None:
    count_N = torch.arange(101).flip(0)
    expected = {"mean": 50.0, "p10": 10, "p50": 50, "p90": 90, "max": 100}
    assert distribution(count_N) == expected


def test_a_threshold_serves_loud_rows_better_than_a_fixed_number() -> None:
    """At one mean number, the squared scores left out in all are fewer."""
    fixed, varying = (
        made(bits=8, over_select=2.0, **more) for more in ({}, {"selection": "threshold"})
    )
    left = []
    for result in (fixed, varying):
        spec, weights = result.spec, ffn()
        norm_F = score_norms(weights, "norm")
        unit_NS = estimated_units(
            weights, Predictor(spec["predictor"], result.tensors, D), FIT, norm_F, spec
        )
        score_NF = exact_scores(weights, FIT, norm_F)
        keep_NF = kept_mask(spec, candidate_mask(spec, unit_NS), unit_NS, score_NF)
        left.append(float((score_NF * ~keep_NF).square().sum()))
    assert left[1] < 0.8 * left[0]


def test_nothing_varies_where_every_candidate_is_needed() -> None:
    recipe = FfnRecipe(keep_fraction=0.5, over_select=1.5, selection="threshold")
    as_many = recipe.model_copy(update={"over_select": 1.0})  # as kind auto may find
    assert "selection" not in layer_counts(F, as_many, 0.5)
    whole = FfnRecipe(keep_fraction=1.0, over_select=2.0, selection="mean_std")
    assert "selection" not in layer_counts(F, whole, 1.0)
    planned = layer_counts(F, recipe, 0.5)
    assert planned["selection"] == {"rule": "threshold", "level": None, "mean_kept": 32}


def test_auto_fits_levels_and_errors_too() -> None:
    result = made(kind="auto", target_recall=0.9, selection="threshold", soften=True)
    assert result.report["recall"] >= 0.9 and result.tensors["soft"].shape == (2 * F,)
    if "selection" in result.spec:
        number = float(kept_numbers(result, FIT).double().mean())
        assert number == pytest.approx(result.spec["num_kept"], abs=0.1)


# --------------------------------------------------------------------------- softening


@pytest.mark.parametrize("gated", [True, False])
def test_soft_numbers_are_the_errors_of_the_predictor(gated: bool) -> None:
    weights, result = ffn(gated=gated), made(gated=gated, kind="q", bits=3, soften=True)
    spec = {**result.spec["predictor"], "soften": False}
    z_NM = Predictor(spec, result.tensors, D).estimate(FIT)
    truth_NM = FIT @ weights.up_FD.T + weights.up_bias_F
    if gated:
        truth_NM = torch.cat([FIT @ weights.gate_FD.T + weights.gate_bias_F, truth_NM], dim=1)
    assert result.tensors["soft"].dtype == torch.float16
    expected = (z_NM - truth_NM).std(0, correction=0)
    assert torch.allclose(result.tensors["soft"].float(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "q", "bits": 2},
        {"kind": "lr", "rank": 6},
        {"kind": "q", "bits": 3, "input_keep": 0.5},
        {"kind": "qlr", "bits": 2, "input_keep": 0.6, "rank": 2},
    ],
)
def test_softening_finds_more_of_the_top_set(fields: dict[str, Any]) -> None:
    hard, soft = made(even=True, **fields), made(even=True, soften=True, **fields)
    assert soft.report["recall"] > hard.report["recall"]
    assert soft.tensors.keys() - hard.tensors.keys() == {"soft"}
    assert all(torch.equal(soft.tensors[name], tensor) for name, tensor in hard.tensors.items())


def test_trained_factors_are_softened_by_what_training_left() -> None:
    training = DistillRecipe(loss="listwise", steps=40, batch_rows=128, learning_rate=0.003)
    for fields in ({"kind": "lr", "rank": 6}, {"kind": "qlr", "bits": 2, "rank": 4}):
        settings = {"even": True, "distill": training, "selection": "threshold", **fields}
        hard, soft = made(**settings), made(soften=True, **settings)
        assert torch.equal(hard.tensors["factor_out"], soft.tensors["factor_out"])
        assert soft.report["recall"] > hard.report["recall"]


@pytest.mark.parametrize("gated", [True, False])
def test_a_soft_size_is_the_root_mean_square_of_two_values(gated: bool) -> None:
    result = made(gated=gated, kind="q", bits=3, soften=True)
    predictor, act = Predictor(result.spec["predictor"], result.tensors, D), ffn(gated=gated).act
    z_NM, soft_M = predictor.estimate(HELD), result.tensors["soft"].float()
    above_NM, below_NM = (z_NM + soft_M).double(), (z_NM - soft_M).double()
    if gated:
        above_NM, below_NM = (
            torch.cat([act(z[:, :F]), z[:, F:]], dim=1) for z in (above_NM, below_NM)
        )
    else:
        above_NM, below_NM = act(above_NM), act(below_NM)
    size = ((above_NM.square() + below_NM.square()) / 2).sqrt()
    size = size[:, :F] * size[:, F:] if gated else size
    assert torch.allclose(predictor.sizes(z_NM, act, gated=gated).double(), size, rtol=1e-4)


# --------------------------------------------------------------------------- bytes, config


def test_bytes_count_the_mean_and_the_soft_numbers() -> None:
    plain, soft = made(), made(soften=True)
    assert soft.report["bytes"]["predictor"] - plain.report["bytes"]["predictor"] == 2 * 2 * F
    spec = soft.spec["predictor"]
    assert predictor_table(spec, D, 2 * F)["soft"] == ("F16", (2 * F,))
    assert predictor_bytes(spec, D, 2 * F) == soft.report["bytes"]["predictor"]

    exact = made(selection="threshold")
    mean = exact.spec["selection"]["mean_kept"]
    assert mean != exact.spec["num_kept"] and num_active(exact.spec) == int(mean + 0.5)
    row = 2 * D
    read = exact.report["bytes"]
    assert read == layer_bytes(exact.spec, D, 3, 2)
    assert read["candidates"] == exact.spec["num_candidates"] * 2 * row
    assert read["kept"] == num_active(exact.spec) * row

    estimated = made(selection="threshold", keep="candidates", over_select=1.9)
    read = estimated.report["bytes"]
    assert read["candidates"] == 2 * read["kept"] == num_active(estimated.spec) * 2 * row
    assert total_bytes(read) < total_bytes(made(keep="candidates", over_select=1.9).report["bytes"])
    hire = {"ffn": {"layers": [estimated.spec]}, "layout": {"gate": "gate"}, "head": None}
    (shown,) = layer_rows(hire, D, 2)
    assert shown["selection"] == "threshold" and shown["kept"] == num_active(estimated.spec)
    assert "of their neurons on average" in describe(hire)


def test_a_layer_without_the_new_keys_is_what_it_was() -> None:
    spec = made().spec
    assert "selection" not in spec and "soften" not in spec["predictor"]
    off = {**spec, "selection": None, "predictor": {**spec["predictor"], "soften": False}}
    tensors = made().tensors
    assert measured(ffn(), HELD, off, tensors) == measured(ffn(), HELD, spec, tensors)


@pytest.fixture(scope="module")
def config() -> Any:
    settings = {"selection": "threshold", "predictor": {"soften": True}}
    return hire_model(tiny_model("llama"), ffn=settings).config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rule", "fixed"),
        ("rule", None),
        ("rule", ["threshold"]),
        ("level", None),
        ("level", True),
        ("level", "1"),
        ("level", float("nan")),
        ("level", float("inf")),
        ("level", -1e300),
        ("level", 10**400),
        ("mean_kept", -0.5),
        ("mean_kept", 96.5),
        ("mean_kept", None),
        ("mean_kept", float("nan")),
    ],
)
def test_a_hostile_selection_is_named(config: Any, key: str, value: Any) -> None:
    config = copy.deepcopy(config)
    config.hire["ffn"]["layers"][1]["selection"][key] = value
    with pytest.raises(ValueError, match=rf"ffn\.layers\[1\]\.selection\.{key}"):
        check_hire_config(config)
    del config.hire["ffn"]["layers"][1]["selection"][key]
    with pytest.raises(ValueError, match=rf"selection\.{key}"):
        check_hire_config(config)


def test_hostile_forms_are_refused(config: Any) -> None:
    for value in ("threshold", [], 1, True):
        other = copy.deepcopy(config)
        other.hire["ffn"]["layers"][0]["selection"] = value
        with pytest.raises(ValueError, match=r"layers\[0\]\.selection is"):
            check_hire_config(other)
    mass = copy.deepcopy(config)
    mass.hire["ffn"]["layers"][0]["selection"] |= {"rule": "score_mass", "level": 1.5}
    with pytest.raises(ValueError, match=r"level is 1\.5, expected a number in \[0, 1\]"):
        check_hire_config(mass)
    for value in (1, None, "yes"):
        other = copy.deepcopy(config)
        other.hire["ffn"]["layers"][0]["predictor"]["soften"] = value
        with pytest.raises(ValueError, match=r"predictor\.soften"):
            check_hire_config(other)
    for kind, soften, unselected in (
        ("score", True, None),
        ("score", False, {"error": 0.1}),
        ("error", True, {}),
        ("error", True, {"error": -0.1}),
        ("error", True, {"error": float("nan")}),
    ):
        other = copy.deepcopy(config)
        layer = other.hire["ffn"]["layers"][0]
        layer["predictor"]["soften"] = soften
        copied = {"bits": 4, "block": 16, "symmetric": True}
        layer |= {"score": "error", "unselected": unselected and copied | unselected}
        if unselected == {}:
            layer["unselected"] = copied
        with pytest.raises(ValueError, match=rf"layers\[0\]\.(unselected\.)?{kind} is"):
            check_hire_config(other)
    for key, value in (("soften", True), ("soften", False)):
        other = copy.deepcopy(config)
        layer = other.hire["ffn"]["layers"][0]
        layer["selection"]["rule"] = "threshold" if value else "mean_std"
        layer["predictor"] |= {"groups": True, key: value}
        with pytest.raises(ValueError, match="soften" if value else "rule"):
            check_hire_config(other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["ffn.selection=sometimes"], "ffn.selection"),
        (["ffn.selection=threshold", "ffn.over_select=1"], r"ffn\.over_select: .* more than 1"),
        (["ffn.predictor.soften=1"], "ffn.predictor.soften"),
        (["ffn.unselected=null"], r"ffn\.score: error .* needs ffn\.unselected"),
        (
            ["ffn.predictor={kind: auto, target_recall: 0.9}"],
            r"ffn\.score: error .* predictor\.kind auto",
        ),
        (
            ["ffn.group_size=4", "ffn.predictor.group_scores=true", "ffn.predictor.soften=true"],
            "ffn.predictor.soften",
        ),
        (
            ["ffn.group_size=4", "ffn.predictor.group_scores=true", "ffn.selection=mean_std"],
            "ffn.selection",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        load_recipe("balanced", changes)
    settings = ["ffn.selection=threshold", "ffn.over_select=1.2", "ffn.predictor.soften=true"]
    recipe = load_recipe("balanced", settings)
    assert recipe.ffn is not None and recipe.ffn.selection == "threshold"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_do_not_count_are_zero_whatever_they_were(dtype: torch.dtype) -> None:
    value = drawn(5, F, seed=1).to(dtype)
    value[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    counts = drawn(5, F, seed=2) > 0
    counts[0, :4] = False
    found = zeroed(value, counts)
    assert torch.equal(found, value.where(counts, 0.0)) and found.dtype == dtype
    counts[0, :4] = True
    assert torch.equal(zeroed(value, counts)[0, :4].isnan(), value[0, :4].isnan())
    assert zeroed(value, None) is value


def test_zeroed_values_pass_their_gradient_on() -> None:
    value, counts = drawn(3, F, seed=1).requires_grad_(), drawn(3, F, seed=2) > 0
    zeroed(value, counts).sum().backward()
    assert value.grad is not None and torch.equal(value.grad, counts.float())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_nan_or_inf_are_found(spoilt: float) -> None:
    score = drawn(3, F, seed=1)
    score[1, 7] = spoilt
    assert finite_rows(score).tolist() == [True, False, True]
