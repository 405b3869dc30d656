"""Rows that go over the weights together: each gets the bits that it gets alone.

Shape suffixes: N rows, D width.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import native_head
from tests.native import CASES, LEVELS, Case, _native, codes_of, rows_of, settings_of, tensors_of

if _native is None:
    pytest.skip("this machine has no compiler", allow_module_level=True)
from hireconvert import _native_step
from hireconvert._native_step import Matrix, matvec
from hireconvert.runtime import hire_cache, hire_native

NATIVE = Path(_native.__file__).parent / "native"
TOGETHER = _native.ROWS_TOGETHER
MOST = hire_native.MOST_ROWS
# Every number up to the next after a full group, then the last of several groups.
COUNTS = (*range(1, TOGETHER + 2), 2 * TOGETHER + 3, MOST)
# (rows, threads): two threads, which wait for each other on a busy machine, for the edges alone.
CALLS = [*((num, 1) for num in COUNTS), *((num, 2) for num in (2, TOGETHER + 1))]
EXTRA = {
    "refined_bfloat16": Case(
        90, 131, 60, 60, dtype=torch.bfloat16, symmetric=False, rest=(4, 48, False), refined=True
    ),
    "many_spans": Case(1100, 50, 20, 12, block=96, rest=(4, 16, False)),
}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


def on_threads(number: int, call: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        return call()
    finally:
        torch.set_num_threads(before)


def layer_of(case: Case):
    tensors = tensors_of(case)
    for name in ("gate", "up", "down"):  # refined ones are made in float32
        tensors[name] = None if tensors[name] is None else tensors[name].to(case.dtype)
    return _native.FfnLayer.pack(settings_of(case), tensors)


def test_the_python_side_knows_how_many_go_together():
    def defined(name: str, file: str) -> str:
        return re.search(rf"#define {name} (\d+)", (NATIVE / file).read_text())[1]

    assert int(defined("HIRE_ROWS", "kernels.h")) == TOGETHER
    most = int(defined("HIRE_STEP_ROWS", "step.h"))
    assert most == _native_step.MOST_ROWS == hire_cache.MOST_NEW == MOST


@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_an_ffn_gives_each_row_the_bits_it_gets_alone(name, level):
    case = (CASES | EXTRA)[name]
    layer, x_ND = layer_of(case), rows_of(case, MOST)
    alone_ND = torch.cat([layer.run(row_1D)[0] for row_1D in x_ND.split(1)])
    for num, threads in CALLS:
        y_ND, finite_N = on_threads(threads, lambda n=num: layer.run(x_ND[:n]))
        assert finite_N is None and torch.equal(y_ND, alone_ND[:num]), (num, threads)


@pytest.mark.parametrize("name", ["fused", "all_candidates", "odd", "refined", "refined_fused"])
def test_a_row_with_nan_or_inf_leaves_the_others_alone(name, level):
    case = CASES[name]
    layer, x_ND = layer_of(case), rows_of(case, 11)
    expected_ND = layer.run(x_ND)[0]
    x_ND[2, -1], x_ND[10, 0] = float("nan"), float("inf")
    for threads in (1, 2):
        counts = torch.zeros(5, dtype=torch.int64)
        y_ND, finite_N = on_threads(threads, lambda c=counts: layer.run(x_ND, c))
        assert (~finite_N).nonzero().flatten().tolist() == [2, 10]
        assert torch.equal(y_ND[finite_N], expected_ND[finite_N])
        assert counts.tolist() == [1, 11, 9 * case.kept, 9 * case.candidates, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_matrix_gives_each_row_the_bits_it_gets_alone(dtype, level):
    weight, scale = (torch.randn(37, 71) * 20).to(dtype), torch.rand(37, 3)
    matrix = codes_of(weight, scale, 32) if dtype == torch.int8 else Matrix(weight)
    x_ND = torch.randn(MOST, 71)
    alone_NO = torch.cat([matvec(matrix, row_1D) for row_1D in x_ND.split(1)])
    for num, threads in [*((num, 1) for num in range(1, MOST + 1)), (2, 2), (MOST, 2)]:
        found_NO = on_threads(threads, lambda n=num: matvec(matrix, x_ND[:n]))
        assert torch.equal(found_NO, alone_NO[:num])


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("name", ["narrow", "odd", "block_and_a_half", "four_bits", "near"])
def test_a_head_gives_each_row_the_bits_it_gets_alone(name, certify):
    case = native_head.CASES[name]
    weight_VD, bias_V = native_head.weight_of(case)
    head = native_head._native_head.HeadLayer(weight_VD, bias_V, bits=case.bits)
    x_ND = native_head.states(19, case.width, 3).to(case.dtype)
    x_ND[5, 0] = float("nan")

    def asked(x_ND: torch.Tensor):
        return head.run(x_ND, 4, certify=certify, cap=case.cap, mask=True)

    for number in native_head.HEAD_LEVELS:
        head.level_number = number
        alone = [asked(row_1D) for row_1D in x_ND.split(1)]
        for num, threads in ((2, 1), (5, 1), (6, 1), (TOGETHER, 1), (TOGETHER + 1, 2), (19, 1)):
            call = on_threads(threads, lambda n=num: asked(x_ND[:n]))
            good = [row for row in range(num) if row != 5]
            assert (call.finite_N is None) == (num < 6)
            for row in good:
                assert torch.equal(call.logits_NV[row], alone[row].logits_NV[0])
                assert torch.equal(call.rescored_NV[row], alone[row].rescored_NV[0])
            assert call.num_rescored == sum(alone[row].num_rescored for row in good)
            assert call.num_refined == sum(alone[row].num_refined for row in good)
