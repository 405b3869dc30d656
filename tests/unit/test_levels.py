"""Levels of score for a mean number kept, and the model that goes by them.

Shape suffixes: N rows, F neurons.
"""

from typing import Any

import pytest
import torch

from hireconvert.families import find_layout, num_layers
from hireconvert.levels import LEAST_LEVEL, ScoreLevels
from hireconvert.lowbit import ffn_inputs, live_copies
from hireconvert.masked import MaskedModel, as_selected
from hireconvert.recipe import FfnRecipe
from tests.tiny import NEURONS, tiny_model, tokens

FFN: dict[str, Any] = {
    "keep_fraction": 0.25,
    "keep": "candidates",
    "over_select": 20.0,
    "score": "error",
    "unselected": {"block": 16},
    "predictor": {"block": 16},
}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).exp()


def test_as_many_reach_a_level_as_it_was_asked_for() -> None:
    levels, score_NF = ScoreLevels(2), drawn(300, 200) * torch.logspace(-9, 9, 300)[:, None]
    for rows_NF in score_NF.split(70):
        levels.note(1, rows_NF)
    for number in (1, 3, 50, 117, 199):
        reaching = float((score_NF >= levels.of(1, number)).sum(1).double().mean())
        assert reaching == pytest.approx(number, abs=0.05)
    assert levels.of(1, 200) <= float(score_NF.min())
    assert levels.of(1, 201) == LEAST_LEVEL


def test_scores_of_zero_reach_no_level() -> None:
    levels, score_NF = ScoreLevels(1), drawn(40, 20)
    score_NF[:, ::2] = 0.0
    levels.note(0, score_NF)
    assert levels.of(0, 15) == LEAST_LEVEL
    assert (score_NF >= levels.of(0, 15)).sum() == 400


@pytest.mark.parametrize("rule", ["threshold", "relative"])
def test_a_model_that_goes_by_levels_keeps_as_many_on_average(rule: str) -> None:
    model, ids_WT = tiny_model("gemma3_text"), tokens(6, 20)
    layout, ffn = find_layout(model), FfnRecipe(**{**FFN, "selection": rule})
    copies = live_copies(model, layout, ffn, inputs=ffn_inputs(model, layout, ids_WT))
    settings: dict[str, Any] = {"score": ffn.score, "copies": copies}
    active = (NEURONS // 4,) * num_layers(model)
    with MaskedModel(model, layout, ids_WT, relative=rule == "relative", **settings) as masked:
        fixed, trace = masked.measure(active)
        assert fixed.kept == sum(active)
        as_selected(ffn, [masked])
        varying, again = masked.measure(active)
        resumed, _ = masked.measure((*active[:-1], NEURONS), near=again)
        alone, _ = masked.measure((*active[:-1], NEURONS))
    # The levels are those of dense inputs, which other layers' selections change.
    assert varying.kept == pytest.approx(sum(active), rel=0.05)
    assert len(set(varying.kept_W)) > 1 and varying.kl_W != fixed.kl_W
    assert resumed == alone
    assert [sum(window.values()) / 20 for window in again.kept] == list(varying.kept_W)
    assert all(window == dict.fromkeys(window, 20 * active[0]) for window in trace.kept)


def test_no_row_keeps_more_than_its_candidates() -> None:
    model, ids_WT = tiny_model("llama"), tokens(4, 20)
    layout, ffn = find_layout(model), FfnRecipe(**{**FFN, "selection": "threshold"})
    copies = live_copies(model, layout, ffn, inputs=ffn_inputs(model, layout, ids_WT))
    active, kept = (NEURONS // 4,) * num_layers(model), {}
    for over_select in (20.0, 1.2):
        own = ffn.model_copy(update={"over_select": over_select})
        with MaskedModel.of(model, layout, ids_WT, own, copies) as masked:
            as_selected(own, [masked])
            kept[over_select] = masked.measure(active)[0].kept
            score_NF = drawn(50, NEURONS)
            masked.levels = levels = ScoreLevels(num_layers(model))
            levels.note(0, score_NF)
            number_N = masked._chosen(0, score_NF, 20).sum(1)
            assert (int(number_N.max()) == 24) == (over_select == 1.2)
    assert kept[1.2] < kept[20.0]


def test_exact_scores_among_candidates_are_simulated_with_a_fixed_number() -> None:
    model, ids_WT = tiny_model("llama"), tokens(2, 8)
    layout = find_layout(model)
    ffn = FfnRecipe(**{**FFN, "selection": "threshold", "keep": "top_k", "over_select": 1.25})
    copies = live_copies(model, layout, ffn, inputs=ffn_inputs(model, layout, ids_WT))
    with MaskedModel.of(model, layout, ids_WT, ffn, copies) as masked:
        as_selected(ffn, [masked])
        assert masked.levels is None
        assert masked.measure((20,) * num_layers(model))[0].kept == 20 * num_layers(model)


def test_scores_that_are_no_numbers_count_as_zero() -> None:
    levels = ScoreLevels(1)
    levels.note(0, torch.tensor([[-torch.nan, -1.0, 2.0, 3.0]]))
    assert levels.of(0, 2) == pytest.approx(2.0, rel=0.01)


def test_a_fixed_number_needs_no_levels() -> None:
    model, ids_WT = tiny_model("llama"), tokens(2, 8)
    with MaskedModel(model, find_layout(model), ids_WT) as masked:
        for rule in ("fixed", "mean_std", "score_mass"):
            as_selected(FfnRecipe(keep_fraction=0.5, selection=rule), [masked])
            assert masked.levels is None
