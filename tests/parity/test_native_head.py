"""The native head against the float64 reference and against itself at other levels and threads."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hireconvert.runtime import hire_head_native
from hireconvert.runtime.hire_head import SparseHead, exact_rows, soft_cap
from hireconvert.runtime.hire_predict import head_copy_bytes
from tests import fuzz_certificate
from tests.native import LEVELS
from tests.native_head import (
    CASES,
    HEAD_LEVELS,
    Case,
    _native_head,
    adversarial,
    ranked,
    reference_of,
    states,
    weight_of,
)
from tests.tiny import head_spec, hire_model, stepwise, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native_head is None, reason="no native library")


HEADER = Path(__file__).resolve().parents[2] / "hireconvert" / "native" / "head.h"


def packed(case: Case, level: int | None = None) -> Any:
    weight_VD, bias_V = weight_of(case)
    head = _native_head.HeadLayer(weight_VD, bias_V, bits=case.bits)
    if level is not None:
        head.level_number = level
    return head


def asked(head: Any, x_ND: torch.Tensor, count: int, case: Case, certify: bool = True) -> Any:
    return head.run(x_ND, count, certify=certify, cap=case.cap, mask=True)


@pytest.mark.parametrize("name", CASES)
def test_the_certified_rows_are_the_reference_bit_for_bit(name):
    case = CASES[name]
    head, (weight_VD, bias_V) = packed(case), weight_of(case)
    x_ND = states(40, case.width, 1).to(case.dtype)
    expected_NV = reference_of(case, weight_VD, bias_V, x_ND)
    for count in (1, 5, case.rows + 3):
        call = asked(head, x_ND, count, case)
        best_NT = ranked(expected_NV, count, case.cap)
        assert torch.equal(ranked(call.logits_NV, count, case.cap), best_NT)
        assert call.rescored_NV.gather(1, best_NT).all() and call.finite_N is None
        assert torch.equal(call.logits_NV[call.rescored_NV], expected_NV[call.rescored_NV])
        assert call.num_rescored == call.rescored_NV.sum()


@pytest.mark.parametrize("name", CASES)
def test_the_best_by_estimate_are_exact_and_all_others_below(name):
    case = CASES[name]
    head, (weight_VD, bias_V) = packed(case), weight_of(case)
    x_ND = states(40, case.width, 2).to(case.dtype)
    expected_NV = reference_of(case, weight_VD, bias_V, x_ND)
    for count in (1, 8, case.rows):
        call = asked(head, x_ND, count, case, certify=False)
        mask_NV = call.rescored_NV
        assert (mask_NV.sum(1) == min(count, case.rows)).all()
        assert torch.equal(call.logits_NV[mask_NV], expected_NV[mask_NV])
        least_N = call.logits_NV.masked_fill(~mask_NV, torch.inf).amin(1)
        others_N = call.logits_NV.masked_fill(mask_NV, -torch.inf).amax(1)
        assert (others_N < least_N).all()


@pytest.mark.parametrize("name", CASES)
def test_bits_depend_on_neither_level_nor_threads_nor_other_rows(name):
    case = CASES[name]
    x_ND = states(6, case.width, 3).to(case.dtype)
    expected = None
    threads = torch.get_num_threads()
    try:
        for level in HEAD_LEVELS:
            head = packed(case, level)
            for number in (1, 3) if level else (1,):
                torch.set_num_threads(number)
                for certify in (True, False):
                    calls = [asked(head, x_ND, 4, case, certify)]
                    calls.append(asked(head, x_ND[4:5], 4, case, certify))
                    found = [(call.logits_NV, call.rescored_NV) for call in calls]
                    assert torch.equal(found[0][0][4:5], found[1][0])
                    expected = expected or {}
                    first = expected.setdefault(certify, found[0])
                    assert all(map(torch.equal, first, found[0])), (level, number)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["plain", "near", "coarse", "ties"])
def test_ten_thousand_states_whose_best_nearly_tie(kind):
    dice = torch.Generator().manual_seed(5)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        case = Case(90, 40, dtype, kind=kind, cap=8.0 if seed else None)
        weight_VD, bias_V = weight_of(case, seed)
        head = _native_head.HeadLayer(weight_VD, bias_V, bits=8)
        drawn = list(adversarial(weight_VD, 1300, dice))
        x_ND = torch.stack([x_D for x_D, _ in drawn])
        product_NVD = weight_VD.double() * x_ND.double()[:, None]
        expected_NV = _by_halves(product_NVD).float()
        for count in (1, 3):
            call = asked(head, x_ND, count, case)
            best_NT = ranked(expected_NV, count, case.cap)
            assert torch.equal(ranked(call.logits_NV, count, case.cap), best_NT)
            exact_NT = expected_NV.gather(1, best_NT)
            assert torch.equal(call.logits_NV.gather(1, best_NT), exact_NT)


def _by_halves(product: torch.Tensor) -> torch.Tensor:
    """The reference's sum written once more: zeros up to a power of two, then halves."""
    size = 1
    while size < product.shape[-1]:
        size *= 2
    product = F.pad(product, (0, size - product.shape[-1]))
    while product.shape[-1] > 1:
        product = product.unflatten(-1, (2, -1)).sum(-2)
    return product[..., 0]


def test_the_order_of_the_sum_can_decide_a_float32():
    """Why the order is fixed: sums of the same products that round to neighbouring numbers."""
    weight_VD, x_D = torch.tensor([[1.0, 2.0**-24, 2.0**-53, 2.0**-53]]), torch.ones(4)
    # By halves each small one is lost, and half a unit in the last place goes to even; the small
    # ones first are enough to go past it.
    product_VD = weight_VD.double() * x_D.double()
    other = product_VD[0, 2] + product_VD[0, 3] + product_VD[0, 1] + product_VD[0, 0]
    assert float(_by_halves(product_VD).float()) == 1.0 < float(other.float())
    head = _native_head.HeadLayer(weight_VD, None)
    assert float(asked(head, x_D[None], 1, Case(1, 4)).logits_NV) == 1.0
    assert float(exact_rows(x_D, weight_VD, None)) == 1.0


def test_a_bound_too_small_is_caught_by_these_tests():
    case = CASES["plain"]
    weight_VD, bias_V = weight_of(case)
    head = _native_head.HeadLayer(weight_VD, bias_V, bits=4)
    head.tensors["scales"][:, 2] *= 0.05
    x_ND = states(300, case.width, 4)
    expected_NV = reference_of(case, weight_VD, bias_V, x_ND)
    call = asked(head, x_ND, 5, case)
    assert not torch.equal(ranked(call.logits_NV, 5, None), ranked(expected_NV, 5, None))


@pytest.mark.parametrize("bits", [8, 4])
def test_bounds_hold_in_the_worst_direction(bits):
    """x along a row's own error, where |W x - estimate| is as large as the bound allows."""
    for kind in ("plain", "uneven", "outlier"):
        weight_VD, _ = weight_of(Case(60, 200, kind=kind), 1)
        head = _native_head.HeadLayer(weight_VD, None, bits=bits)
        eye_ND = torch.eye(200)
        # With every row asked for by estimate alone the logits of one-hot states are the copy.
        copy_VD = head.run(eye_ND, 1, certify=False, cap=None, mask=True)
        copy_VD = copy_VD.logits_NV.t()
        x_ND = weight_VD - copy_VD
        expected_NV = torch.stack([_by_halves(weight_VD.double() * x.double()) for x in x_ND])
        call = head.run(x_ND, 3, certify=True, cap=None, mask=True)
        expected_NV = expected_NV.float()
        assert torch.equal(ranked(call.logits_NV, 3, None), ranked(expected_NV, 3, None))


def test_heads_and_states_of_every_kind_the_fuzzer_draws():
    """Some of what `tools/fuzz.py --certificate` does, and that it would notice."""
    check, dice = fuzz_certificate.Check(), torch.Generator().manual_seed(3)
    for _ in range(6):
        head = fuzz_certificate.draw_head(dice)
        for kind in fuzz_certificate.STATES:
            x_ND = fuzz_certificate.states_of(head, kind, 24, dice)
            fuzz_certificate.ask(check, head, kind, x_ND, fuzz_certificate.exact(head, x_ND))
    assert not check.wrong, check.shown
    assert len(check.states) == 2 * len(fuzz_certificate.STATES) and 0 < check.worst_share < 1
    head = fuzz_certificate.make_head(CASES["plain"], *weight_of(CASES["plain"]), 5)
    head.native.tensors["scales"][:, 2] *= 0.02
    head.sparse.prepared.bound_V *= 0.02
    x_ND = fuzz_certificate.states_of(head, "near ties", 200, dice)
    fuzz_certificate.ask(check, head, "spoilt", x_ND, fuzz_certificate.exact(head, x_ND))
    assert set(check.wrong) == {"native, spoilt", "PyTorch, spoilt"}


def test_rows_that_are_not_finite_are_left_to_the_caller():
    case = CASES["odd"]
    head = packed(case)
    x_ND = states(4, case.width, 3)
    x_ND[0, 0], x_ND[2, 5], x_ND[3, 7] = float("nan"), float("-inf"), 3e38
    call = asked(head, x_ND, 5, case)
    assert call.finite_N.tolist() == [False, True, False, False]
    assert not call.rescored_NV[[0, 2, 3]].any()
    good = asked(head, x_ND[1:2], 5, case)
    assert torch.equal(call.logits_NV[1:2], good.logits_NV) and good.finite_N is None


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25])
def test_weights_and_states_of_any_size(size):
    weight_VD, _ = weight_of(Case(80, 48), 3)
    weight_VD = weight_VD * size
    head = _native_head.HeadLayer(weight_VD, None)
    x_ND = torch.cat([states(20, 48, 1), states(20, 48, 2) * 1e-30, torch.full((1, 48), 1e29)])
    expected_NV = reference_of(Case(80, 48), weight_VD, None, x_ND)
    call = asked(head, x_ND, 5, Case(80, 48))
    assert torch.equal(ranked(call.logits_NV, 5, None), ranked(expected_NV, 5, None))


def test_what_cannot_be_packed_is_refused():
    for weight_VD, bias_V, said in (
        (torch.randn(3, 4).double(), None, "weight is torch.float64"),
        (torch.randn(3, 0), None, "weight is"),
        (torch.randn(3), None, "weight is"),
        (torch.randn(4, 6)[:, ::2], None, "strides"),
        (torch.randn(4, 6).expand(4, 6)[:1].expand(4, 6), None, "strides"),
        (torch.randn(4, 6), torch.randn(5), "bias"),
        (torch.randn(4, 6), torch.randn(4).double(), "bias"),
    ):
        with pytest.raises(ValueError, match=f"native: the head's .*{said}"):
            _native_head.HeadLayer(weight_VD, bias_V)
    with pytest.raises(ValueError, match="bits are 5"):
        _native_head.HeadLayer(torch.randn(4, 6), None, bits=5)
    head = _native_head.HeadLayer(torch.randn(4, 6), None)
    for x_ND, count in ((torch.randn(2, 5), 1), (torch.randn(6), 1), (torch.randn(2, 6), 0)):
        with pytest.raises(ValueError, match="native: x is"):
            head.run(x_ND, count, certify=True, cap=None, mask=False)


def test_a_weight_in_rows_of_a_wider_matrix():
    wide = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    x_ND = states(6, 48, 1)
    apart, inside = (
        _native_head.HeadLayer(weight_VD, None).run(x_ND, 4, certify=True, cap=None, mask=True)
        for weight_VD in (wide[:, 3:51].contiguous(), wide[:, 3:51])
    )
    assert torch.equal(apart.logits_NV, inside.logits_NV)


def fields(struct: str) -> list[str]:
    header = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    body = re.search(r"typedef struct \{([^}]*)\} " + struct + ";", header)[1]
    return re.findall(r"(\w+);", body)


def test_both_sides_mean_the_same_structs():
    assert fields("hire_head") == [name for name, _ in _native_head._Struct._fields_]
    assert fields("hire_head_call") == [name for name, _ in _native_head._Call._fields_]


@pytest.mark.parametrize("name", CASES)
def test_the_copy_is_as_large_as_is_said(name):
    case, head = CASES[name], packed(CASES[name])
    every, read_on = head_copy_bytes((head.tensors["tiles"].shape[0] * 16, case.width), case.bits)
    assert head.tensors["tiles"].nbytes + head.tensors["scales"].nbytes == every
    low = [head.tensors[key].nbytes for key in ("low", "low_error") if key in head.tensors]
    assert sum(low) == read_on * case.rows


def test_the_level_is_bounded_by_the_environment():
    assert [_native_head.head_level(level) for level in LEVELS[:2]] == list(range(len(LEVELS[:2])))
    assert _native_head.head_level(None) == 0 <= max(HEAD_LEVELS)


# ------------------------------------------------------------------------- inside SparseHead


def sparse_head(weight_VD: torch.Tensor, **changes: Any) -> tuple[SparseHead, nn.Linear]:
    linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, dtype=weight_VD.dtype)
    linear.weight.data = weight_VD
    head = SparseHead(head_spec(certify_top=6, **changes), None)
    head.prepare(linear)
    return head, linear


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_both_paths_give_the_same_best_rows_and_count_alike(bits, certify, monkeypatch):
    weight_VD, _ = weight_of(CASES["bfloat16"])
    x_ND = states(30, weight_VD.shape[1], 6).to(weight_VD.dtype)
    x_ND[4, 4] = float("nan")
    changes = {"bits": bits, "unselected": "-inf", "num_candidates": 9}
    native, linear = sparse_head(weight_VD, **changes)
    assert native.prepared.native is not None and native.prepared.bound_V is None
    monkeypatch.setenv("HIRE_NATIVE", "off")
    twin, _ = sparse_head(weight_VD, **changes)
    assert twin.prepared.native is None
    fine = [i for i in range(30) if i != 4]
    with torch.no_grad():
        got_NV, expected_NV = (head(x_ND, linear, certify) for head in (native, twin))
    if certify:
        best_NT = ranked(expected_NV[fine], 6, None)
        assert torch.equal(ranked(got_NV[fine], 6, None), best_NT)
        assert torch.equal(got_NV[fine].gather(1, best_NT), expected_NV[fine].gather(1, best_NT))
    else:  # each has candidates of its own
        both_NV = ~(native.unselected | twin.unselected)[fine]
        assert both_NV.any(1).sum() > 20
        assert torch.equal(got_NV[fine][both_NV], expected_NV[fine][both_NV])
    assert got_NV[4].isnan().all() and not native.unselected[4].any()
    for index in (0, 1, 3, 4, 5):  # calls, rows, dense, uncertified and overflowing rows
        assert native.counts[index] == twin.counts[index]
    assert int((~native.unselected).sum()) == int(native.counts[2])


def test_as_many_rows_are_certified_as_are_read():
    weight_VD, _ = weight_of(CASES["bfloat16"])
    head, linear = sparse_head(weight_VD)
    x_ND = states(30, weight_VD.shape[1], 6).to(weight_VD.dtype)
    counts = []
    for top in (None, 1, 99):
        with torch.no_grad():
            logits_NV = head(x_ND, linear, True, top)
        counts.append(int(head.counts[2]))
        head.counts.zero_()
        expected_NV, number = head.reference(x_ND, linear), top or head.spec["certify_top"]
        assert torch.equal(ranked(logits_NV, number, None), ranked(expected_NV, number, None))
    assert counts[1] < counts[0] < counts[2]


def test_the_copy_of_the_other_path_is_built_when_it_is_asked_for():
    weight_VD, _ = weight_of(CASES["plain"])
    head, linear = sparse_head(weight_VD)
    x_ND = states(5, 48, 1)
    with torch.no_grad():
        native_NV = head(x_ND, linear, True)
    assert head.prepared.bound_V is None
    tracked_NV = head(x_ND.clone().requires_grad_(), linear, True)
    assert tracked_NV.requires_grad and head.prepared.bound_V is not None
    assert torch.equal(ranked(native_NV, 6, None), ranked(tracked_NV.detach(), 6, None))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not hire_head_native.serves(head.prepared.native, x_ND)


def test_a_weight_with_nan_takes_the_other_path():
    weight_VD, _ = weight_of(CASES["plain"])
    weight_VD[7, 7] = float("nan")
    head, linear = sparse_head(weight_VD)
    assert head.prepared.native is None
    with torch.no_grad():
        assert head(states(2, 48, 1), linear, True)[:, 7].isnan().all()


def test_a_copied_or_stored_head_packs_its_own():
    weight_VD, _ = weight_of(CASES["plain"])
    head, linear = sparse_head(weight_VD)
    for twin, other in (
        copy.deepcopy((head, linear)),
        pickle.loads(pickle.dumps((head, linear))),
    ):
        with torch.no_grad():
            other.weight.zero_()
            twin.prepare(other)
            assert twin(states(2, 48, 1), other, True).abs().max() == 0
            assert head(states(2, 48, 1), linear, True).abs().max() > 0


def test_a_model_says_what_runs_its_head(monkeypatch):
    model = hire_model(tiny_model("llama"), head={})
    head = model.get_output_embeddings()
    spec = model.config.hire["head"]
    assert hire_head_native.path(spec, head).startswith("native head kernels (")
    low_rank = {**spec, "kind": "lr"}
    assert hire_head_native.path(low_rank, head) == ("PyTorch path for the head (head of kind lr)")
    monkeypatch.setenv("HIRE_NATIVE", "off")
    assert "HIRE_NATIVE is off" in hire_head_native.path(spec, head)


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
def test_a_model_predicts_what_the_reference_does(family):
    native = tiny_model(family)
    model = hire_model(native, head={"certify_top": 8})
    ids = tokens(2, 10)
    sparse, dense = stepwise(model, ids), stepwise(native, ids)
    assert model.get_output_embeddings().hire.prepared.native is not None
    assert torch.equal(sparse.argmax(-1), dense.argmax(-1))
    top = sparse[:, 1:].topk(8)
    assert torch.allclose(top.values, dense[:, 1:].topk(8).values, rtol=1e-4, atol=1e-5)
    stats = model.hire_stats()["head"]
    assert stats["rows"] == 18 and stats["refined"] > 0 and stats["dense_rows"] == 0


def test_greedy_decoding_certifies_one_row():
    model = hire_model(tiny_model("llama"), head={"certify_top": 40})
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    model.generate(tokens(1, 5), do_sample=False, **settings)
    greedy = model.hire_stats(reset=True)["head"]
    model.generate(tokens(1, 5), do_sample=True, top_k=40, **settings)
    sampled = model.hire_stats(reset=True)["head"]
    assert greedy["rows"] == sampled["rows"] == 6
    assert greedy["rescored"] < 6 * 40 <= sampled["rescored"]
    assert model.hire_state.head_top is None
    assert soft_cap(torch.ones(1), None) == 1
