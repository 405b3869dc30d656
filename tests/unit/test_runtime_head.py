"""The sparse head: its certificate against a float64 reference computed here, its conventions.

All of it on the PyTorch path, which the native one is held against in tests/parity.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hireconvert.runtime.hire_head import SparseHead, exact_rows, soft_cap
from hireconvert.runtime.hire_predict import recall_at, top_k_indices
from tests.tiny import head_spec, hire_model, stepwise, tiny_model, tokens

ROWS, WIDE, TOP = 300, 48, 5


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    monkeypatch.setenv("HIRE_NATIVE", "off")


def draw(kind: str, generator: torch.Generator) -> torch.Tensor:
    """A head weight with the awkward shapes that real ones take."""
    weight = torch.randn(ROWS, WIDE, generator=generator)
    if kind == "uneven":
        weight *= torch.logspace(-3, 2, ROWS)[torch.randperm(ROWS, generator=generator), None]
    if kind == "outlier":
        weight[:, 3] *= 200
    if kind == "ties":
        weight = weight[torch.randint(0, 40, (ROWS,), generator=generator)]
    if kind == "coarse":
        weight = (weight * 2).round() / 2
    if kind == "zeros":
        weight[::3] = 0
    return weight


WEIGHTS = ("plain", "uneven", "outlier", "ties", "coarse", "zeros")
HEADS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8_blocks": {"block": 16},
    "int4": {"bits": 4},
    "int4_blocks": {"bits": 4, "block": 32},
    "low_rank": {"kind": "lr", "rank": 12},
    "low_rank_full": {"kind": "lr", "rank": WIDE},
    "low_rank_oblique": {"kind": "lr", "rank": 20},
}


def sparse_head(
    weight: torch.Tensor, *, cap: float | None = None, bias: bool = False, **changes: Any
) -> tuple[SparseHead, nn.Linear]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    linear.weight.data = weight
    head = SparseHead(head_spec(certify_top=TOP, **changes), cap)
    if changes.get("kind") == "lr":
        generator = torch.Generator().manual_seed(5)
        basis = torch.randn(changes["rank"], weight.shape[1], generator=generator)
        lift = torch.linalg.pinv(basis)
        if changes["rank"] == 20:
            lift = lift + 0.1 * torch.randn(lift.shape, generator=generator)
        head.predictor_tensors = {"head.factor_in": basis, "head.lift": lift.contiguous()}
    head.prepare(linear)
    return head, linear


def reference_logits(x_ND: torch.Tensor, linear: nn.Linear, cap: float | None) -> torch.Tensor:
    """Products summed in float64, rounded once to float32, capped in float32."""
    z_NV = x_ND.double() @ linear.weight.detach().double().T
    if linear.bias is not None:
        z_NV = z_NV + linear.bias.detach().double()
    return soft_cap(z_NV.float(), cap)


def ranked(z_NV: torch.Tensor, num: int) -> torch.Tensor:
    """Ids of the best `num`, ties to the lowest id."""
    return torch.sort(z_NV, dim=-1, descending=True, stable=True).indices[:, :num]


def states(num: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states of many sizes, some nearly flat, some dominated by one channel."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num, WIDE, generator=generator)
    x_ND *= torch.logspace(-4, 3, num)[:, None]
    x_ND[::5, 7] *= 50
    x_ND[1::5] = x_ND[1::5].sign()
    return x_ND.to(dtype)


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("head_kind", HEADS)
@pytest.mark.parametrize("weight_kind", WEIGHTS)
def test_certified_top_is_the_reference(weight_kind, head_kind, cap):
    generator = torch.Generator().manual_seed(len(weight_kind))
    for dtype in (torch.float32, torch.bfloat16):
        weight = draw(weight_kind, generator).to(dtype)
        head, linear = sparse_head(weight, cap=cap, bias=head_kind == "int8", **HEADS[head_kind])
        x_ND = states(20, 1, dtype)
        with torch.no_grad():
            got_NV = soft_cap(head(x_ND, linear, True), cap)
        expected_NV = reference_logits(x_ND, linear, cap)
        assert got_NV.dtype == torch.float32
        best_NT = ranked(expected_NV, TOP)
        assert torch.equal(ranked(got_NV, TOP), best_NT)
        # The sums of both sides are in float64, in another order: equal but for one rounding.
        difference = (got_NV.gather(1, best_NT) - expected_NV.gather(1, best_NT)).abs()
        assert (difference <= 2**-22 * expected_NV.gather(1, best_NT).abs() + 1e-30).all()


@pytest.mark.parametrize("head_kind", HEADS)
def test_hundreds_of_states(head_kind):
    generator = torch.Generator().manual_seed(9)
    head, linear = sparse_head(draw("uneven", generator), **HEADS[head_kind])
    x_ND = states(500, 0, torch.float32)
    with torch.no_grad():
        got_NV = head(x_ND, linear, True)
    assert torch.equal(ranked(got_NV, TOP), ranked(reference_logits(x_ND, linear, None), TOP))
    counts = dict(zip(("calls", "rows", "rescored"), head.counts.tolist(), strict=False))
    assert counts["rows"] == 500 and counts["rescored"] >= 500 * TOP
    if "int8" in head_kind:
        assert counts["rescored"] < 500 * ROWS / 4  # it does save work


@pytest.mark.parametrize("head_kind", HEADS)
def test_bounds_hold_for_every_row_of_the_copy(head_kind):
    """|W x - estimate| <= slack, whatever the direction of x: the error's own is the worst."""
    generator = torch.Generator().manual_seed(2)
    for weight_kind in WEIGHTS:
        head, linear = sparse_head(draw(weight_kind, generator), **HEADS[head_kind])
        prepared = head.prepared
        x_ND = states(30, 4, torch.float32)
        if prepared.codes_VD is not None:
            copy_VD = prepared.codes_VD.float() * prepared.scale_V[:, None]
            x_ND = torch.cat([x_ND, (linear.weight.detach() - copy_VD)[:40]])
        for x_D in x_ND:
            z_V = head._estimate(x_D[None])[0]
            exact_V = (linear.weight.detach().double() @ x_D.double()).float()
            assert (head._upper(x_D, z_V) >= exact_V).all()


@pytest.mark.parametrize("head_kind", HEADS)
def test_bounds_hold_where_numbers_become_too_small(head_kind):
    """In x, in products or in sums: relative roundings do not cover what is lost there."""
    weight = draw("plain", torch.Generator().manual_seed(2))
    for exponents in ((-148.0, -120.0), (-60.0, -30.0)):
        head, linear = sparse_head(weight, **HEADS[head_kind])
        size_N1 = torch.exp2(torch.linspace(*exponents, 300))[:, None]
        x_ND = torch.randn(300, WIDE, generator=torch.Generator().manual_seed(6)) * size_N1
        estimate_NV = head._estimate(x_ND)
        for x_D, z_V in zip(x_ND, estimate_NV, strict=True):
            exact_V = linear.weight.detach().double() @ x_D.double()
            assert (head._upper(x_D, z_V).double() >= exact_V).all()
        weight = weight * 2.0**-90


@pytest.mark.parametrize("head_kind", HEADS)
def test_products_rounded_to_bfloat16_are_not_used(head_kind, monkeypatch):
    head, _ = sparse_head(draw("plain", torch.Generator().manual_seed(3)), **HEADS[head_kind])
    x = torch.randn(4, WIDE, generator=torch.Generator().manual_seed(4))
    expected = head._estimate(x)
    # What CPUs with bfloat16 units do to float32 products under this setting.
    monkeypatch.setattr(
        "hireconvert.runtime.hire_head.F.linear",
        lambda a, b: (a.bfloat16() @ b.bfloat16().t()).float(),
    )
    assert not torch.allclose(head._estimate(x), expected, rtol=0, atol=1e-3)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.allclose(head._estimate(x), expected, rtol=0, atol=1e-3)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_bound_too_small_is_caught_by_these_tests():
    generator = torch.Generator().manual_seed(9)
    head, linear = sparse_head(draw("plain", generator), bits=4)
    head.prepared.bound_V.mul_(0.05)
    x_ND = states(500, 0, torch.float32)
    with torch.no_grad():
        got_NV = head(x_ND, linear, True)
    assert not torch.equal(ranked(got_NV, TOP), ranked(reference_logits(x_ND, linear, None), TOP))


def test_certify_top_beyond_the_vocabulary_rescores_everything():
    weight = draw("plain", torch.Generator().manual_seed(0))[:3]
    head, linear = sparse_head(weight)
    x_ND = states(4, 0, torch.float32)
    with torch.no_grad():
        assert torch.allclose(head(x_ND, linear, True), reference_logits(x_ND, linear, None))


def test_estimates_stay_below_the_lowest_rescored():
    weight = draw("plain", torch.Generator().manual_seed(1))
    head, linear = sparse_head(weight, bits=4, num_candidates=20, certified=False)
    x_ND = states(60, 3, torch.float32)
    with torch.no_grad():
        got_NV = head(x_ND, linear, False)
    exact_NV = reference_logits(x_ND, linear, None)
    rescored_NV = torch.isclose(got_NV, exact_NV, rtol=1e-6, atol=0)
    for got_V, exact_V in zip(got_NV, exact_NV, strict=True):
        best = ranked(got_V[None], 20)[0]
        assert torch.allclose(got_V[best], exact_V[best], rtol=1e-6)
        others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, best, False)
        assert got_V[others].max() < got_V[best].min()
    assert rescored_NV.sum() < got_NV.numel() / 4
    assert int(head.counts[4]) == 60  # uncertified rows


def test_a_row_with_nan_runs_dense_and_is_counted():
    head, linear = sparse_head(draw("plain", torch.Generator().manual_seed(1)))
    x_ND = states(3, 3, torch.float32)
    x_ND[1, 0] = float("nan")
    with torch.no_grad():
        got_NV = head(x_ND, linear, True)
    assert got_NV[1].isnan().all() and got_NV[[0, 2]].isfinite().all()
    assert int(head.counts[3]) == 1


@pytest.mark.parametrize("head_kind", HEADS)
def test_logits_beyond_float32_are_the_references(head_kind):
    """Infinite ones rank alike; an estimate may be NaN where they meet."""
    weight = draw("plain", torch.Generator().manual_seed(1))
    weight[:, 3] *= 1e12
    weight[:, 9] *= 1e12
    head, linear = sparse_head(weight, **HEADS[head_kind])
    x_ND = states(20, 3, torch.float32).sign() * torch.logspace(24, 28, 20)[:, None]
    expected_NV = reference_logits(x_ND, linear, None)
    assert expected_NV.isinf().any(1).sum() > 5
    with torch.no_grad():
        got_NV = head(x_ND, linear, True)
        estimated_NV = head(x_ND, linear, False)
    assert torch.equal(ranked(got_NV, TOP), ranked(expected_NV, TOP))
    assert not estimated_NV.isnan().any()


def test_exact_rows_round_once():
    weight = torch.tensor([[1.0, 2.0**-24, 2.0**-24]])
    assert float(exact_rows(torch.ones(3), weight, None)) == 1.0 + 2.0**-23


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_post_norm", "llama_bias", "gpt2"])
def test_minus_infinity_marks_the_unselected_even_after_soft_capping(family):
    native = tiny_model(family)
    model = hire_model(native, head={"unselected": "-inf", "certify_top": 3})
    ids = tokens(1, 8)
    sparse, dense = stepwise(model, ids)[0, 1:], stepwise(native, ids)[0, 1:]
    assert sparse.isneginf().any(-1).all() and not sparse.isnan().any()
    assert (sparse.isfinite().sum(-1) >= 3).all()
    kept = sparse.isfinite()
    assert torch.allclose(sparse[kept], dense[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.argmax(-1), dense.argmax(-1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        first = model(ids[:, :1], past_key_values=cache, return_dict=False)[0]
        assert first.isneginf().any()
        # A call that the head does not serve is not marked with what an earlier one left.
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gemma2", "llama", "opt"])
def test_a_model_with_certified_head_predicts_what_dense_does(family):
    native = tiny_model(family)
    model = hire_model(native, head={"certify_top": 8})
    ids = tokens(2, 12)
    sparse, dense = stepwise(model, ids), stepwise(native, ids)
    assert torch.equal(sparse.argmax(-1), dense.argmax(-1))
    top = sparse[:, 1:].topk(8)
    assert torch.allclose(top.values, dense[:, 1:].topk(8).values, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-6)  # the rest is estimated
    assert model.hire_stats()["head"]["rows"] == 2 * 11


def test_a_float64_model_keeps_its_dense_head():
    model = hire_model(tiny_model("llama").double(), head={})
    stepwise(model, tokens(1, 4))
    counts = model.hire_stats()["head"]
    assert counts["dense_rows"] == counts["rows"] == 3


# ------------------------------------------------------------------------------- selection


def test_ties_go_to_the_lowest_index():
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, -0.0, 0.0]])
    assert top_k_indices(score, 2).tolist() == [[1, 2]]
    assert top_k_indices(score, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert top_k_indices(score, 6).tolist() == [[0, 1, 2, 3, 4, 5]]  # -0.0 ties with 0.0
    assert top_k_indices(torch.zeros(2, 1000), 7).tolist() == [list(range(7))] * 2
    assert top_k_indices(score, 0).shape == (1, 0)
    assert top_k_indices(score, 7).tolist() == [list(range(7))]


def test_top_k_orders_like_floats():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-40, 1.0, 1e30):
        score = torch.randn(50, 300, generator=generator) * scale
        score[:, ::7] = score[:, 1::7][:, : score[:, ::7].shape[1]]  # ties
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :60]
        assert torch.equal(top_k_indices(score, 60), order.sort(-1).values)
    ends = torch.tensor([[math.inf, -math.inf, 0.0, -1.0]])
    assert top_k_indices(ends, 3).tolist() == [[0, 2, 3]]


def test_recall_counts_every_tie_of_the_kth_score():
    score = torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, False, False, True, False]])
    assert recall_at(score, mask, 2).tolist() == [1.0]
    assert recall_at(score, mask, 3).tolist() == pytest.approx([2 / 3])
    assert recall_at(score, ~mask, 2).tolist() == [1.0]
    assert recall_at(score, torch.ones_like(mask), 5).tolist() == [1.0]
    assert recall_at(score, torch.zeros_like(mask), 1).tolist() == [0.0]


def test_a_deep_copy_is_a_model_of_its_own():
    model = hire_model(tiny_model("llama"), head={}, ffn={})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = tokens(1, 5)
    assert stepwise(model, ids).abs().max() > 0
    assert stepwise(twin, ids).abs().max() == 0
    assert twin.hire_stats()["head"]["calls"] == 4 == model.hire_stats()["head"]["calls"]
    twin.set_hire_scope("off")
    assert model.hire_state.scope == "decode"
