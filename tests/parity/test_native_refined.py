"""Refined rows: the kernels over 4 and 4 bits against PyTorch over the dense rounded weights.

Shape suffixes: N rows, D width.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from hireconvert.families import FfnWeights
from hireconvert.quantize import GridFormat, encode_down, encode_matrix, fit_grid, round_codes
from hireconvert.rounding import low_scales
from hireconvert.runtime.hire_native import pack
from hireconvert.runtime.hire_predict import decode_blocks, decode_down
from tests import packing_reference
from tests.decoding import decode_matrix
from tests.ffn_reference import relative
from tests.native import (
    LEVELS,
    Case,
    _native,
    estimates,
    hidden,
    normal_rest,
    output,
    rows_of,
    settings_of,
    tensors_of,
)
from tests.tiny import hire_model, sparse_layers, tiny_model

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
ASYMMETRIC = {"bits": 4, "block": 16, "symmetric": False}
SYMMETRIC = {"bits": 4, "block": 16, "symmetric": True}
NORMAL = {"bits": 4, "block": 16, "symmetric": True, "levels": "normal"}
LONG = {"bits": 4, "block": 96, "symmetric": False}  # longer than a row
SETTINGS: dict[str, dict[str, Any]] = {
    "top_k": {"predictor": ASYMMETRIC, "unselected": ASYMMETRIC, "over_select": 1.5},
    "candidates": {"predictor": SYMMETRIC, "unselected": ASYMMETRIC, "keep": "candidates"},
    "as many": {"predictor": ASYMMETRIC, "unselected": SYMMETRIC, "over_select": 1.0},
    "whole rows": {"predictor": LONG, "unselected": LONG, "keep_fraction": 0.2},
    "softened": {"predictor": ASYMMETRIC | {"soften": True}, "unselected": ASYMMETRIC},
    "plain": {"predictor": ASYMMETRIC, "unselected": LONG, "score": "plain"},
    "error": {"predictor": ASYMMETRIC, "unselected": ASYMMETRIC, "score": "error"},
    "normal": {"predictor": NORMAL, "unselected": NORMAL, "score": "error"},
    "normal predictor": {"predictor": NORMAL, "unselected": ASYMMETRIC, "over_select": 1.5},
}
FAMILIES = ("llama", "llama_bias", "gemma3_text", "opt")


def layers(family: str, setting: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    ffn = {"keep_fraction": 0.4, **SETTINGS[setting], "rows": "refined"}
    return sparse_layers(hire_model(tiny_model(family).to(dtype), ffn=ffn))


def rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x_ND = torch.randn(6, width, generator=torch.Generator().manual_seed(3)) * 1.5
    x_ND[4] = 0
    return x_ND.to(dtype)


@torch.no_grad()
def expected(layer: Any, x_ND: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.gathered(x_1D) for x_1D in x_ND.split(1)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_refined_rows_compute_what_dense_weights_do(
    family: str, setting: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    for layer in layers(family, setting):
        native = layer.prepared.native
        assert "low" in native.tensors and "rows" not in native.tensors
        x_ND = rows(native.numbers["width"])
        found_ND, finite_N = native.run(x_ND)
        assert finite_N is None
        assert relative(found_ND, expected(layer, x_ND)) < 2e-5


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("width", "block"), [(576, 32), (100, 32), (16, 16), (2112, 32), (1100, 16), (40, 64)]
)
@pytest.mark.parametrize("levels", ["even", "normal"])
def test_odd_widths_and_many_blocks(
    width: int, block: int, level: str, levels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    neurons, kept, form = 37, 12, GridFormat(4, block, levels == "normal", levels=levels)
    first_MD, down_FD = drawn(2 * neurons, width, seed=1), drawn(neurons, width, seed=2)
    grid = fit_grid(first_MD, form)
    tensors = {
        **encode_matrix(round_codes(first_MD, grid), grid),
        **encode_down(down_FD, form),
        "column_scale": torch.ones(width),
        "mean": drawn(width, seed=3) / 4,
        "bias": drawn(2 * neurons, seed=4),
    }
    copy_spec = {"bits": 4, "block": block, "symmetric": form.symmetric, "levels": levels}
    spec = {"predictor": copy_spec, "unselected": copy_spec, "rows": "refined"}
    weights = FfnWeights(*first_MD.chunk(2), down_FD, None, None, torch.nn.SiLU())
    tensors |= low_scales(weights, spec, tensors)
    first_copy_MD = decode_blocks(tensors, copy_spec, width)
    down_copy_FD = decode_down(tensors, copy_spec, width)
    pairs = ((first_MD, first_copy_MD, "low_scale"), (down_FD, down_copy_FD, "down_low_scale"))
    for matrix_MD, copy_MD, name in pairs:
        step_MD = tensors[name].float().repeat_interleave(min(block, width), dim=1)[:, :width]
        code_MD = ((matrix_MD - copy_MD) / step_MD + 7.5).round().clamp(0, 15)
        matrix_MD.copy_(copy_MD + step_MD * (code_MD - 7.5))
    gate_FD, up_FD = first_MD.chunk(2)
    native = _native.FfnLayer.pack(
        {
            "activation": "silu", "num_candidates": kept, "num_kept": kept, "refined": True,
            "rest": copy_spec, **copy_spec,
        },
        {**tensors, "gate": gate_FD, "up": up_FD, "down": down_FD, "norm": down_FD.norm(dim=1)},
    )  # fmt: skip
    assert "low" in native.tensors
    x_ND = drawn(3, width, seed=5)
    found_ND, _ = native.run(x_ND)
    for x_D, found_D in zip(x_ND.double(), found_ND.double(), strict=True):
        z_M = first_copy_MD.double() @ (x_D - tensors["mean"]) + tensors["bias"]
        value_F = torch.nn.functional.silu(z_M[:neurons]) * z_M[neurons:]
        best_K = (value_F.abs() * down_FD.norm(dim=1)).topk(kept).indices
        h_F = torch.nn.functional.silu(gate_FD.double() @ x_D) * (up_FD.double() @ x_D)
        exact_D = value_F @ down_copy_FD.double()
        exact_D += h_F[best_K] @ down_FD[best_K].double()
        exact_D -= value_F[best_K] @ down_copy_FD[best_K].double()
        assert relative(found_D, exact_D) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", ["candidates", "normal"])
def test_narrow_weights_are_found_again(dtype: torch.dtype, setting: str) -> None:
    for layer in layers("llama", setting, dtype):
        native = layer.prepared.native
        assert "low" in native.tensors
        x_ND = rows(native.numbers["width"], dtype)
        found_ND, _ = native.run(x_ND)
        assert relative(found_ND.float(), expected(layer, x_ND).float()) < 0.03


@torch.no_grad()
def plain(case: Case, tensors: dict[str, Any], x_D: torch.Tensor, kept: Any) -> torch.Tensor:
    """The output in the arithmetic of x, rounded after every operation."""
    gate_FD, up_FD, down_FD = (tensors[name].to(x_D.dtype) for name in ("gate", "up", "down"))
    copy = {name.removeprefix("down_"): each for name, each in tensors.items() if "down_" in name}
    form = GridFormat(*case.rest)
    rest_FD = decode_matrix(copy, form, (case.neurons, case.width)).to(x_D.dtype)
    value_F = hidden(case, estimates(case, tensors, x_D, x_D.dtype))
    value_F[kept] = 0.0
    h_K = hidden(replace(case, neurons=len(kept)), torch.cat([gate_FD[kept], up_FD[kept]]) @ x_D)
    return h_K @ down_FD[kept] + value_F @ rest_FD


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loud", [1.0, 10.0])
def test_the_error_is_at_most_twice_that_of_plain_pytorch(
    loud: float, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and hidden values have fewer digits with narrow weights; some inputs are loud."""
    monkeypatch.setenv(_native.VARIABLE, level)
    case = Case(
        576, 320, 80, 80, levels="normal", rest=normal_rest(32), refined=True, dtype=torch.float32
    )
    tensors = tensors_of(case)
    narrow = {name: tensors[name].to(dtype) for name in ("gate", "up", "down")}
    native = _native.FfnLayer.pack(settings_of(case), tensors | narrow)
    assert "low" in native.tensors
    own, plainly = [], []
    for x_1D in rows_of(case, 8).split(1):
        x_1D[:, ::50] *= loud
        x_1D = x_1D.to(dtype)
        found_1D, _ = native.run(x_1D)
        kept = native.last()["index"].long()
        exact_D = output(case, tensors, x_1D[0], kept, kept)
        own.append((found_1D[0].double() - exact_D).norm() / exact_D.norm())
        plainly.append(
            (plain(case, tensors, x_1D[0], kept).double() - exact_D).norm() / exact_D.norm()
        )
    assert sum(own) <= 2 * sum(plainly)


@pytest.mark.parametrize("setting", ["top_k", "normal"])
def test_bits_depend_on_neither_threads_nor_other_rows(setting: str) -> None:
    native = layers("llama", setting)[0].prepared.native
    x_ND = rows(native.numbers["width"])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.run(x_ND)[0])
            found.append(torch.cat([native.run(x_1D)[0] for x_1D in x_ND.split(1)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_nan_and_inf_are_told() -> None:
    native = layers("llama", "as many")[0].prepared.native
    x_ND = rows(native.numbers["width"])
    x_ND[1, 3], x_ND[2, 0] = torch.nan, torch.inf
    _, finite_N = native.run(x_ND)
    assert finite_N is not None and finite_N.tolist() == [True, False, False, True, True, True]


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_weights_off_the_grid_are_read_as_they_are(matrix: str) -> None:
    layer = layers("llama", "candidates")[0]
    with torch.no_grad():
        getattr(layer.parts, matrix).module.weight[3, 5] += 0.01
    layer.prepare()
    native = layer.prepared.native
    assert "rows" in native.tensors and "low" not in native.tensors
    x_ND = rows(native.numbers["width"])
    assert relative(native.run(x_ND)[0], expected(layer, x_ND)) < 2e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low_scale": torch.ones(3, 2)}, "low_scale is"),
        ({"low_scale": None}, "low_scale is missing"),
        ({"down_low_scale": torch.ones(96, 1)}, "down_low_scale is"),
        ({"down_low_scale": torch.ones(96, 2, dtype=torch.uint8)}, "floating-point"),
    ],
)
def test_scales_of_other_shapes_are_refused(change: dict[str, Any], said: str) -> None:
    layer = layers("llama", "candidates")[0]
    tensors = copy.copy(layer.predictor_tensors) | change
    with pytest.raises(ValueError, match=said):
        pack(layer.spec, layer.parts, tensors, layer.prepared.norm_F)


def test_a_value_between_two_codes_may_have_been_either_of_them() -> None:
    """Above a power of two bfloat16 is coarser: half a step there is more than one below it."""
    value_MD = torch.tensor([[2.0**-5 - 2.0**-13, 1.0]])
    up, beyond = torch.tensor([[2.0**-5, 1.0]]), torch.tensor([[2.0**-5 + 2.0**-12, 1.0]])
    assert packing_reference._is_rounded(value_MD, up, torch.bfloat16)
    assert not packing_reference._is_rounded(value_MD, beyond, torch.bfloat16)
