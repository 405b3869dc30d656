"""Budgets: masked scoring against a plain reference, searches, targets, resuming from the memo."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from hireconvert.allocation import Allocation, Trades
from hireconvert.auto import Source, choose
from hireconvert.budget import (
    Bytes,
    Found,
    Memo,
    Trials,
    evenly,
    perplexity_increase,
    search_budget,
)
from hireconvert.errors import UsageError
from hireconvert.families import base_model, ffn_parts, find_layout, num_layers, read_ffn_weights
from hireconvert.lowbit import Estimate, Inputs, LiveCopies, live_copies
from hireconvert.masked import MaskedModel, Score
from hireconvert.measures import hire_scope
from hireconvert.memory import beginnings
from hireconvert.quantize import GridFormat, encode_matrix, fit_grid, round_codes
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.runtime.hire_predict import decode_blocks, expected_errors
from hireconvert.schema import UnselectedRecipe
from hireconvert.schema_budget import BudgetRecipe, BudgetTargetRecipe
from hireconvert.scoring import hidden
from hireconvert.stage_budget import told
from tests.tiny import NEURONS, hire_model, layer_inputs, tiny_model, tokens
from tests.tiny_files import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "gemma3_text", "phi3", "opt", "gpt2")
METHODS = ("evolution", "greedy", "second_order")
FAST = BudgetRecipe(generations=6, offspring=4, sweeps=3, probe_tokens=16, step=0.1)


STEPS: list[tuple[int, int, str]] = []


def reference_logits(model: Any, ids_T: torch.Tensor, active: tuple[int, ...]) -> torch.Tensor:
    """Logits with a top-k mask in every FFN, by torch.topk and a hook of its own."""
    layout, hooks = find_layout(model), []
    for index in range(num_layers(model)):
        norm_F = read_ffn_weights(model, layout, index).down_FD.norm(dim=1)

        def mask(_m: Any, args: Any, norm_F: Any = norm_F, num: int = active[index]) -> Any:
            h = args[0]
            best = (h.abs() * norm_F).topk(num, dim=-1).indices
            return (torch.zeros_like(h).scatter(-1, best, h.gather(-1, best)),)

        down = ffn_parts(model, layout, index).down.module
        hooks.append(down.register_forward_pre_hook(mask))
    try:
        with torch.no_grad():
            return model(ids_T[None], use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------- masked scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_that_of_the_masked_model(family: str) -> None:
    model, ids_WT = tiny_model(family), tokens(2, 24)
    active = tuple([NEURONS // 3, NEURONS // 2, NEURONS][: num_layers(model)])
    with MaskedModel(model, find_layout(model), ids_WT) as masked:
        score, _ = masked.measure(active)
        dense_W = masked.dense_nll_W
    for number, ids_T in enumerate(ids_WT):
        with torch.no_grad():
            dense = model(ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        sparse = reference_logits(model, ids_T, active)[:-1].log_softmax(-1)
        kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
        assert score.kl_W[number] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        for logs, found in ((sparse, score.nll_W), (dense, dense_W)):
            nll = -logs.gather(1, ids_T[1:, None]).mean()
            assert found[number] == pytest.approx(float(nll), rel=1e-4)
    assert score.kl > 1e-3


def test_every_neuron_costs_nothing_and_hooks_are_removed() -> None:
    model, ids_WT = tiny_model("llama"), tokens(1, 16)
    with MaskedModel(model, find_layout(model), ids_WT) as masked:
        score, _ = masked.measure(masked.neurons)
    assert score.kl == 0.0
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_from_a_similar_pass_changes_no_bit(family: str) -> None:
    model, ids_WT = tiny_model(family), tokens(3, 16)
    count = num_layers(model)
    near, active = (48,) * count, (48,) * (count - 1) + (30,)
    with MaskedModel(model, find_layout(model), ids_WT) as masked:
        _, trace = masked.measure(near)
        calls = []
        hook = masked.layers[0].register_forward_hook(lambda *_: calls.append(1))
        attention = next(m for m in masked.layers[0].modules() if "Attention" in type(m).__name__)
        inner = attention.register_forward_hook(lambda *_: calls.append(2))
        resumed, _ = masked.measure(active, num_windows=2, near=trace)
        assert 2 not in calls, "the first layer was run again"
        hook.remove(), inner.remove()
        whole, _ = masked.measure(active)
    assert resumed.kl_W == whole.kl_W[:2] and resumed.nll_W == whole.nll_W[:2]
    assert all("forward" not in vars(layer) for layer in masked.layers)


def test_a_big_vocabulary_is_scored_without_its_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids_WT = tiny_model("gemma2"), tokens(2, 20)
    layout = find_layout(model)
    with MaskedModel(model, layout, ids_WT) as masked:
        expected, _ = masked.measure((30, 30))
    monkeypatch.setattr("hireconvert.masked.PROBABILITIES_KEPT", 0)
    monkeypatch.setattr("hireconvert.masked.LOGITS_AT_ONCE", 500)
    with MaskedModel(model, layout, ids_WT) as masked:
        found, _ = masked.measure((30, 30))
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)


def copies_of(model: Any, bits: int, **changes: Any) -> list[LiveCopies]:
    layout, form = find_layout(model), GridFormat(bits, 16, True)
    parts = [ffn_parts(model, layout, index) for index in range(num_layers(model))]
    return [LiveCopies(part, Estimate(form, **changes)) for part in parts]


def test_copies_with_more_bits_or_more_candidates_choose_more_as_exact_scores_do() -> None:
    model, ids_WT = tiny_model("llama"), tokens(4, 32)
    layout, kl = find_layout(model), {}
    for bits, over in ((None, 1.0), (8, 1.0), (2, 1.0), (2, 1.5)):
        copies = () if bits is None else copies_of(model, bits, over_select=over, selects=True)
        with MaskedModel(model, layout, ids_WT, copies=copies) as masked:
            kl[bits, over] = masked.measure((40, 40, 40))[0].kl
    exact = kl[None, 1.0]
    assert kl[8, 1.0] == pytest.approx(exact, rel=0.1)
    assert kl[2, 1.0] > kl[2, 1.5] > 1.05 * exact


# --------------------------------------------------------------------------- the rest by estimate

UNSELECTED = UnselectedRecipe(bits=4, block=16)
ROUGH = {"over_select": 1.5, "predictor": PredictorRecipe(bits=3, block=16, symmetric=False)}


def stored(weight_AB: torch.Tensor, form: GridFormat) -> torch.Tensor:
    """A rounded copy as it comes back from its stored form."""
    grid = fit_grid(weight_AB, form)
    tensors = encode_matrix(round_codes(weight_AB, grid), grid)
    return decode_blocks(tensors, dataclasses.asdict(form), weight_AB.shape[1])


def expected_to_be_off(
    weights: Any, rounded: Any, copy_FD: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """The score `error` of all neurons for inputs [..., D], from the errors on these."""
    z, soft = [], []
    for name in ("gate", "up") if weights.gate_FD is not None else ("up",):
        bias = getattr(weights, f"{name}_bias_F")
        z.append(linear(x, getattr(rounded, f"{name}_FD"), bias))
        off = z[-1] - linear(x, getattr(weights, f"{name}_FD"), bias)
        soft.append(off.flatten(0, -2).std(0, correction=0))
    length_F = weights.down_FD.norm(dim=1)
    rest_error = float(((weights.down_FD - copy_FD).norm(dim=1) / length_F).mean())
    gated = weights.gate_FD is not None
    given = torch.cat(z, dim=-1), torch.cat(soft), weights.act, rest_error
    return (expected_errors(*given, gated=gated) * length_F).detach()


def estimated_logits(
    model: Any,
    ids_T: torch.Tensor,
    active: tuple[int, ...],
    more: torch.Tensor | None = None,
    *,
    by_error: bool = False,
) -> torch.Tensor:
    """Logits where the best count exactly, candidates by copies of their output vectors, and the
    others by copies of everything; `more` [layers] adds that much of what the 4 next and the 4
    last neurons bring. With few active ones: a ReLU makes many that tie at zero. `by_error` names
    candidates by expected error, as many as are kept."""
    over = 1.0 if by_error else 1.5
    layout, hooks = find_layout(model), []
    form, down_form = GridFormat(3, 16, False), GridFormat(4, 16, False)
    for index in range(num_layers(model)):
        weights, parts = read_ffn_weights(model, layout, index), ffn_parts(model, layout, index)
        rounded = {"up_FD": stored(weights.up_FD, form), "down_FD": weights.down_FD}
        if weights.gate_FD is not None:
            rounded["gate_FD"] = stored(weights.gate_FD, form)
        rounded_weights = dataclasses.replace(weights, **rounded)
        copy_FD, seen = stored(weights.down_FD, down_form), {}

        def see(_m: Any, args: Any, seen: Any = seen) -> None:
            seen["x"] = args[0]

        def replace(_m: Any, args: Any, output: torch.Tensor, index: int = index, seen: Any = seen,
                    weights: Any = weights, rounded: Any = rounded_weights,
                    copy_FD: torch.Tensor = copy_FD) -> torch.Tensor:  # fmt: skip
            h, value = args[0], hidden(rounded, seen["x"])
            score = (h.abs() * weights.down_FD.norm(dim=1)).detach()
            if by_error:
                score = expected_to_be_off(weights, rounded, copy_FD, seen["x"])

            def best(num: int) -> torch.Tensor:
                place = score.topk(min(num, NEURONS), dim=-1).indices
                return torch.zeros_like(score).scatter(-1, place, 1.0)

            num = active[index]
            kept, named = best(num), best(round(over * num))
            rest = (1 - kept) * (named * h + (1 - named) * value)
            found = output + (kept * h - h) @ weights.down_FD + rest @ copy_FD
            if more is not None:
                band = best(num + 4) - best(num - 4)
                found = found + more[index] * ((band * h) @ (weights.down_FD - copy_FD))
                band = best(round(over * (num + 4))) - best(round(over * (num - 4)))
                found = found + more[index] * ((band * (h - value)) @ copy_FD)
            return found

        hooks.append(parts.up.module.register_forward_pre_hook(see))
        hooks.append(parts.down.module.register_forward_hook(replace))
    try:
        return model(ids_T[None], use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", (*FAMILIES, "llama_bias"))
def test_neurons_left_out_count_by_copies(family: str) -> None:
    model, ids_WT = tiny_model(family), tokens(2, 24)
    layout, active = find_layout(model), (24, 20, 18)[: num_layers(model)]
    ffn = FfnRecipe(keep_fraction=0.5, unselected=UNSELECTED, **ROUGH)
    copies = live_copies(model, layout, ffn)
    with MaskedModel(model, layout, ids_WT, copies=copies) as masked:
        score, trace = masked.measure(active)
        assert masked.measure(masked.neurons)[0].kl == 0.0
        again, _ = masked.measure((*active[:-1], 16), near=trace)
        assert again == masked.measure((*active[:-1], 16))[0]
    with MaskedModel(model, layout, ids_WT) as masked:
        assert score.kl < 0.5 * masked.measure(active)[0].kl  # or the copies would say nothing
    for number, ids_T in enumerate(ids_WT):
        with torch.no_grad():
            dense = model(ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            sparse = estimated_logits(model, ids_T, active)[:-1].log_softmax(-1)
        kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
        assert score.kl_W[number] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("score", ["norm", "error"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_slopes_are_the_derivatives_by_the_neurons_at_the_edge(family: str, score: str) -> None:
    model, ids_WT = tiny_model(family), tokens(2, 16)
    layout, count = find_layout(model), num_layers(model)
    active = (16, 20, 18)[:count]
    by_error = {"score": "error", "over_select": 1.0} if score == "error" else {}
    ffn = FfnRecipe(keep_fraction=0.5, unselected=UNSELECTED, **(ROUGH | by_error))
    copies = live_copies(model, layout, ffn)
    with MaskedModel(model, layout, ids_WT, score=score, copies=copies) as masked:
        slopes = masked.slopes(active, (4,) * count)
    model.requires_grad_(False)
    more, kl = torch.zeros(count, requires_grad=True), torch.zeros(())
    for ids_T in ids_WT:
        with torch.no_grad():
            dense = model(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        sparse = estimated_logits(model, ids_T, active, more, by_error=score == "error")
        sparse = sparse[:-1].log_softmax(-1)
        kl = kl + (dense.exp() * (dense - sparse)).sum(-1).mean() / len(ids_WT)
    kl.backward()
    assert more.grad is not None
    assert slopes == pytest.approx((-0.5 * more.grad).tolist(), rel=2e-3, abs=1e-6)
    assert max(map(abs, slopes)) > 1e-4


@pytest.mark.parametrize("over", [1.0, 1.5])
@pytest.mark.parametrize("score", ["norm", "error"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_fitted_copies_cost_what_a_converted_model_does(
    family: str, score: str, over: float
) -> None:
    native, ids_WT = tiny_model(family), tokens(2, 24)
    rest = {"bits": 4, "block": 16}
    settings = {"keep_fraction": 0.25, "over_select": over, "score": score, "unselected": rest}
    settings["predictor"] = {"bits": 3, "block": 16}
    converted = hire_model(native, ffn=settings)
    ffn = FfnRecipe(**settings)
    inputs = [Inputs(x.mean(0), x.T @ x / len(x)) for x in layer_inputs(native)]
    copies = live_copies(native, find_layout(native), ffn, selects=True, inputs=inputs)
    with MaskedModel(native, find_layout(native), ids_WT, score=score, copies=copies) as masked:
        found, _ = masked.measure((round(NEURONS / 4),) * num_layers(native))
    for number, ids_T in enumerate(ids_WT):
        with torch.no_grad(), hire_scope(converted, "all"):
            sparse = converted(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            dense = native(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
        assert found.kl_W[number] == pytest.approx(kl, rel=0.03) and kl > 1e-4


def test_copies_that_select_estimate_the_rest_too() -> None:
    """At 8 bits they are nearly exact; at 3 they lose more, yet less than what counts as zero."""
    model, ids_WT = tiny_model("llama"), tokens(3, 24)
    layout, kl = find_layout(model), {}
    for bits in (8, 3):
        for rest in (None, UnselectedRecipe(bits=8, block=16)):
            predictor = PredictorRecipe(bits=bits, block=16)
            ffn = FfnRecipe(keep_fraction=0.4, unselected=rest, predictor=predictor)
            copies = live_copies(model, layout, ffn, selects=True)
            with MaskedModel(model, layout, ids_WT, copies=copies) as masked:
                kl[bits, rest is None] = masked.measure((38, 38, 38))[0].kl
    assert kl[8, False] < 0.01 * kl[8, True]
    assert 3 * kl[8, False] < kl[3, False] < 0.5 * kl[3, True]


def test_beginnings_of_many_windows() -> None:
    ids_WT = torch.arange(40).view(4, 10)
    assert torch.equal(evenly(ids_WT, 12, 4), ids_WT[:3, :4])
    assert torch.equal(evenly(ids_WT, 32, 4), ids_WT[:, :8])
    assert torch.equal(evenly(ids_WT, 1000, 4), ids_WT)
    assert evenly(ids_WT, 1, 4).shape == (1, 4)
    for num_tokens in (1, 12, 30, 37, 1000):
        shape = beginnings(4, 10, num_tokens, 4)
        assert evenly(ids_WT, num_tokens, 4).shape == shape
        assert abs(shape[0] * shape[1] - num_tokens) < 4 or num_tokens in (1, 1000)


# --------------------------------------------------------------------------- allocations


def recipe(share: Any = 0.5, **changes: Any) -> FfnRecipe:
    return FfnRecipe(keep_fraction=share, **{"over_select": 1.0, **changes})


def test_counts_are_those_of_a_conversion() -> None:
    top_k = Allocation((96, 96), recipe(0.4, over_select=1.25))
    assert top_k.active(top_k.start) == (38, 38)
    candidates = Allocation((96, 96), recipe([0.4, 1.0], over_select=1.25, keep="candidates"))
    assert candidates.active(candidates.start) == (48, 96)
    with pytest.raises(UsageError, match=r"ffn\.keep_fraction: 3 values for 2 layers"):
        _ = Allocation((96, 96), recipe([0.4, 0.5, 0.6])).start


def test_shifting_respects_bounds_and_finds_the_edge() -> None:
    allocation = Allocation((96, 96), recipe([0.2, 0.7], over_select=1.25))
    assert allocation.shifted((0.2, 0.7), 3) == (0.23, 0.73)
    assert allocation.shifted((0.2, 0.7), 50) == (0.7, 0.8)
    assert allocation.shifted((0.2, 0.7), -50) == (0.01, 0.2)
    assert allocation.shift_range((0.2, 0.7)) == (-69, 60)
    total = lambda keeps: round(sum(keeps) * 100)  # noqa: E731
    least = allocation.smallest_shift((0.2, 0.7), lambda keeps: total(keeps) >= 96)
    assert least == 3
    assert allocation.smallest_shift((0.2, 0.7), lambda keeps: False) is None
    assert allocation.smallest_shift((0.2, 0.7), lambda keeps: total(keeps) >= 96, below=2) is None
    assert allocation.largest_shift((0.2, 0.7), total, 95) == 2
    assert allocation.largest_shift((0.2, 0.7), total, 1000) == 60
    assert allocation.largest_shift((0.2, 0.7), total, 1) is None


def test_trades_keep_the_total_and_the_bounds() -> None:
    allocation = Allocation((96, 96, 64, 64), recipe([0.5, 0.5, 0.3, 0.3], over_select=1.25))
    trades = Trades(allocation, allocation.start, 0.05)
    seeded, levels = random.Random(0), trades.none
    for _ in range(200):
        levels = trades.mutant(levels, seeded)
        keeps = trades.keeps(levels)
        assert sum(levels) == 0 and levels[0] + levels[1] == 0  # sizes trade among themselves
        assert min(keeps) >= 0.05 and max(keeps) <= 0.8
    assert levels != trades.none
    alone = Trades(Allocation((96,), recipe()), (0.5,), 0.05)
    assert alone.mutant(alone.none, seeded) == alone.none


# --------------------------------------------------------------------------- searches


def search(
    budget: BudgetRecipe,
    *,
    keep: Any = 0.4,
    path: Path | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[Found, Trials, Trials]:
    """One search on a tiny Llama of three layers, whose bytes are its active neurons."""
    model, ffn = tiny_model("llama"), recipe(keep, **changes)
    layout, allocation = find_layout(model), Allocation((NEURONS,) * 3, ffn)
    memo = Memo(path, {"seed": seed})
    copies = live_copies(model, layout, ffn) if ffn.unselected else ()
    with (
        MaskedModel(model, layout, tokens(4, 16, seed=1), copies=copies) as first,
        MaskedModel(model, layout, tokens(4, 16, seed=2), copies=copies) as second,
    ):
        trials = [
            Trials(name, masked, allocation, memo)
            for name, masked in (("search", first), ("held", second))
        ]
        bytes_ = Bytes(lambda keeps: sum(allocation.active(keeps)), 3 * NEURONS)
        found = search_budget(
            *trials, budget, bytes_=bytes_, seed=seed, progress=lambda *step: STEPS.append(step)
        )
        found.report["increase"] = perplexity_increase(trials[1], tuple(found.keep_fraction))
    return found, trials[0], trials[1]


@pytest.mark.parametrize("method", METHODS)
def test_search_beats_its_start_on_its_own_score_at_the_same_total(method: str) -> None:
    found, _, _ = search(FAST.model_copy(update={"method": method}))
    start, end = found.report["start"], found.report["searched"]
    assert start["keep_fraction"] == [0.4] * 3
    assert end["kl_searched"] < start["kl_searched"]
    assert sum(found.keep_fraction) == pytest.approx(1.2, abs=1e-9)
    assert found.report["mean_keep"] == pytest.approx(0.4, abs=1e-9)
    assert set(end["keep_fraction"]) != {0.4}
    assert sum(end["keep_fraction"]) == pytest.approx(1.2, abs=1e-9)
    assert found.report["reached"]


@pytest.mark.parametrize("method", METHODS)
def test_search_counts_neurons_left_out_by_estimate(method: str) -> None:
    budget = FAST.model_copy(update={"method": method})
    by_estimate = {"unselected": UNSELECTED, **ROUGH, "over_select": 1.25}
    found, _, _ = search(budget, **by_estimate)
    as_zero, _, _ = search(budget, over_select=1.25)
    start, end = found.report["start"], found.report["searched"]
    assert end["kl_searched"] < start["kl_searched"] < 0.5 * as_zero.report["start"]["kl_searched"]
    assert sum(end["keep_fraction"]) == pytest.approx(1.2, abs=1e-9)
    said = {**found.report, "target": {}}
    assert told({**said, "unselected": "estimate"}).startswith(
        "budget search, neurons left out by estimate: mean keep 0.4"
    )
    assert told({**said, "unselected": "zero"}).startswith("budget search: mean keep 0.4")


@pytest.mark.parametrize("worse", [True, False])
def test_held_out_text_decides_whether_the_list_is_taken(
    worse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trials.score

    def score(self: Trials, keeps: Any, **options: Any) -> Any:
        found = real(self, keeps, **options)
        if self.name == "search":
            return found
        equal = len(set(keeps)) == 1
        return Score((1.0 if equal is worse else 2.0,), found.nll_W)

    monkeypatch.setattr(Trials, "score", score)
    found, _, _ = search(FAST)
    assert found.report["agreed"] is not worse
    taken = found.report["start" if worse else "searched"]["keep_fraction"]
    assert found.keep_fraction == found.report["found"]["keep_fraction"] == taken
    assert found.report["searched"]["keep_fraction"] != [0.4] * 3


@pytest.mark.parametrize("method", METHODS)
def test_search_repeats_itself(method: str) -> None:
    budget = FAST.model_copy(update={"method": method})
    assert search(budget)[0] == search(budget)[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "measured"), [("evolution", 4), ("greedy", 4), ("second_order", 2)]
)
def test_a_killed_search_goes_on_and_ends_the_same(
    method: str, measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, memo = FAST.model_copy(update={"method": method}), tmp_path / "memo"
    whole = search(budget, path=tmp_path / "whole")[0]
    real, calls = MaskedModel.measure, []

    def dying(self: MaskedModel, active: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > measured:
            raise Killed
        return real(self, active, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MaskedModel, "measure", dying)
        search(budget, path=memo)
    known = memo.read_text().count("\n") - 1
    assert known >= 3
    with memo.open("a") as file:
        file.write('["search 4 38,38,')  # a line that the kill cut off
    assert search(budget, path=memo)[0] == whole
    lines = memo.read_text().splitlines()
    keys = [json.loads(line)[0] for line in lines[1:]]
    assert len(keys) == len(set(keys)), "something was measured twice"
    assert sorted(lines) == sorted((tmp_path / "whole").read_text().splitlines())


def test_scores_of_another_conversion_are_not_used(tmp_path: Path) -> None:
    search(FAST, path=tmp_path / "memo", seed=1)
    before = (tmp_path / "memo").read_text()
    assert search(FAST, path=tmp_path / "memo", seed=2)[0] == search(FAST, seed=2)[0]
    assert (tmp_path / "memo").read_text().splitlines()[0] != before.splitlines()[0]


# --------------------------------------------------------------------------- targets


def with_target(**target: Any) -> BudgetRecipe:
    return FAST.model_copy(update={"target": BudgetTargetRecipe(**target)})


def test_perplexity_target_is_met_with_no_more_than_uniform_needs() -> None:
    found, _, held = search(with_target(perplexity_increase=0.1), keep=0.5)
    assert found.report["reached"]
    assert found.report["increase"] <= 0.1
    assert found.report["bytes_per_token"] <= sum(
        held.allocation.active(tuple(found.report["start"]["keep_fraction"]))
    )
    assert found.report["start"]["perplexity_increase_held"] <= 0.1


def test_kl_target_is_met_and_a_tighter_one_takes_more() -> None:
    loose, _, _ = search(with_target(kl=0.3), keep=0.5)
    tight, _, _ = search(with_target(kl=0.03), keep=0.5)
    assert loose.report["found"]["kl_held"] <= 0.3
    assert tight.report["found"]["kl_held"] <= 0.03
    assert loose.report["mean_keep"] < tight.report["mean_keep"]


def test_bytes_target_is_met_from_below() -> None:
    found, _, held = search(with_target(bytes_per_token=150), keep=0.5)
    assert found.report["reached"]
    start = tuple(found.report["start"]["keep_fraction"])
    assert sum(held.allocation.active(start)) <= 150
    assert sum(held.allocation.active(held.allocation.shifted(start, 1))) > 150
    assert sum(found.keep_fraction) == pytest.approx(sum(start), abs=1e-9)


def test_what_cannot_be_reached_is_said() -> None:
    found, _, _ = search(with_target(kl=1e-7), keep=0.5)
    assert not found.report["reached"]
    assert found.report["mean_keep"] == pytest.approx(0.99, abs=0.005)
    assert found.report["found"]["kl_held"] > 1e-7
    found, _, _ = search(with_target(bytes_per_token=1), keep=0.5)
    assert not found.report["reached"]
    assert found.report["mean_keep"] == pytest.approx(0.01)


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_met_by_every_method(method: str) -> None:
    changes = {"method": method, "target": BudgetTargetRecipe(kl=0.1)}
    found, _, held = search(FAST.model_copy(update=changes), keep=0.5)
    assert found.report["reached"] and found.report["found"]["kl_held"] <= 0.1
    start = tuple(found.report["start"]["keep_fraction"])
    assert found.report["bytes_per_token"] <= sum(held.allocation.active(start))


@pytest.mark.parametrize(("method", "rounds"), [("evolution", 6), ("greedy", 3)])
def test_progress_is_counted_and_told(method: str, rounds: int) -> None:
    STEPS.clear()
    found, _, _ = search(FAST.model_copy(update={"method": method}))
    assert [step[:2] for step in STEPS] == [(n + 1, rounds) for n in range(len(STEPS))]
    assert STEPS[-1][2] == f"KL {found.report['searched']['kl_searched']:.5f}"


def test_layers_are_those_of_the_base_model() -> None:
    model = tiny_model("opt")
    with MaskedModel(model, find_layout(model), tokens(1, 8)) as masked:
        assert len(masked.layers) == num_layers(model)
        assert masked.layers is base_model(model).decoder.layers


# --------------------------------------------------------------------------- --auto


class Silent:
    """Shows no progress."""

    def note(self, message: str) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Any]:
        yield lambda detail="": None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, str]:
    """A tiny model of four layers on disk, and an override that names a text."""
    folder = tmp_path_factory.mktemp("source")
    text = "\n\n\n".join(f"Note {n}: the quick brown fox, {n * 7} times." for n in range(200))
    (folder / "notes.txt").write_text(text)
    model = save_tiny(folder / "model", num_hidden_layers=4)
    return Source(str(model)), f"data.source={folder / 'notes.txt'}"


def test_auto_tries_neurons_left_out_by_estimate(
    source: tuple[Source, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hireconvert.auto.MOST_TOKENS", 512)
    model, text = source
    kl = []
    for left_out in ("null", "{block: 16}"):
        settings = [text, "ffn.predictor.block=16", "ffn.score=norm"]
        settings.append(f"ffn.unselected={left_out}")
        found = choose(model, settings, Silent(), max_kl=10.0, out=tmp_path / "out")
        kl.append({one.keep: one.kl for one in found.tried if one.keep})
        assert found.chosen.recipe is not None and found.chosen.recipe.ffn is not None
        assert (found.chosen.recipe.ffn.unselected is not None) == (left_out != "null")
    as_zero, by_estimate = kl
    assert by_estimate and all(by_estimate[keep] < 0.5 * as_zero[keep] for keep in by_estimate)


def test_auto_refuses_estimates_that_it_cannot_try(
    source: tuple[Source, str], tmp_path: Path
) -> None:
    model, text = source
    settings = [text, "ffn.unselected={}", "ffn.predictor={kind: lr, rank: 4}"]
    with pytest.raises(UsageError, match=r"--auto simulates .* not predictor\.kind lr\. Change"):
        choose(model, settings, Silent(), max_kl=1.0, out=tmp_path / "out")
