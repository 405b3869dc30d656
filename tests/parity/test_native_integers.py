"""The low-bit products in whole numbers: layouts, precision, and equal bits at every level.

Shape suffixes: N rows, D width, F neurons, M predictor outputs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import packing_reference
from tests.ffn_reference import relative
from tests.native import (
    LEVELS,
    Case,
    _native,
    estimates,
    normal_rest,
    output,
    rows_of,
    settings_of,
    tensors_of,
)

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
FUSED = [level for level in LEVELS if level != "portable"]  # levels that multiply and add in one
PREDICTORS = {
    f"{bits}_bits_{block}": Case(150, 100, 30, 30, bits=bits, block=block, symmetric=symmetric)
    for bits, block, symmetric in [
        (2, 32, False),
        (2, 13, True),
        (3, 32, False),
        (3, 70, False),
        (3, 5, True),
        (4, 32, False),
        (4, 9, False),
        (4, 1000, True),
    ]
}
PREDICTORS |= {
    f"normal_{block}": Case(150, 100, 30, 30, levels="normal", block=block)
    for block in (32, 9, 1000)
}
RESTS = {
    f"rest_{width}_{block}": Case(width, 700, 20, 20, rest=(4, block, symmetric))
    for width, block, symmetric in [
        (1, 16, False),
        (31, 32, True),
        (128, 16, False),
        (130, 48, True),
        (255, 64, False),
        (576, 32, False),
        (1030, 16, True),
        (1100, 48, False),
        (1100, 1100, False),
    ]
}


RESTS |= {
    f"normal_rest_{width}_{block}": Case(width, 700, 20, 20, rest=normal_rest(block))
    for width, block in [(1, 16), (130, 48), (576, 32), (1030, 16), (1100, 1100)]
}


def layer_at(level: str, case: Case, tensors: dict[str, Any], monkeypatch: Any) -> Any:
    monkeypatch.setenv(_native.VARIABLE, level)
    return _native.FfnLayer.pack(settings_of(case), tensors)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("number", [1, 4, 7, 8, 31, 32, 33, 96])
def test_quads_hold_every_code_at_its_place(bits, number):
    dice = torch.Generator().manual_seed(number)
    codes = torch.randint(0, 2**bits, (3, number, 16), generator=dice, dtype=torch.uint8)
    packed = packing_reference.pack_quads(codes, bits)
    per_unit, size = {2: (16, 64), 3: (32, 192), 4: (8, 64)}[bits]
    assert packed.shape == (3, -(-number // per_unit) * size)
    for input_ in range(number):
        unit, place = packed[:, input_ // per_unit * size :], input_ % per_unit
        quad, byte = place // 4, place % 4 + 4 * torch.arange(16)
        if bits == 3:
            low = unit[:, quad // 4 * 64 + byte] >> quad % 4 * 2 & 3
            found = low | (unit[:, 128 + byte] >> quad & 1) << 2
        else:
            found = unit[:, byte] >> quad * bits & 2**bits - 1
        assert torch.equal(found, codes[:, input_])


@pytest.mark.parametrize("name", PREDICTORS)
def test_estimates_err_little_more_than_float32_sums(name, monkeypatch):
    case = PREDICTORS[name]
    tensors, x_ND = tensors_of(case), rows_of(case, 8)
    exact_NM = torch.stack([estimates(case, tensors, x_D, torch.float64) for x_D in x_ND])
    torch_NM = torch.stack([estimates(case, tensors, x_D, torch.float32) for x_D in x_ND])
    for level in LEVELS:
        layer, rows = layer_at(level, case, tensors, monkeypatch), []
        for x_1D in x_ND.split(1):
            layer.run(x_1D)
            rows.append(layer.last()["z"].flatten())
        error = (torch.stack(rows) - exact_NM).norm()
        assert error <= 2 * (torch_NM - exact_NM).norm()


@pytest.mark.parametrize("name", [*PREDICTORS, *RESTS])
def test_levels_that_fuse_give_equal_bits(name, monkeypatch):
    case = {**PREDICTORS, **RESTS}[name]
    tensors = tensors_of(case)
    tensors["down"].zero_()  # exact rows are summed in an order of the level's own
    found = []
    for level in FUSED:
        layer = layer_at(level, case, tensors, monkeypatch)
        y_ND = torch.cat([layer.run(x_1D)[0] for x_1D in rows_of(case).split(1)])
        found.append((y_ND, layer.last()["z"]))
    for y_ND, z_PF in found:
        assert torch.equal(z_PF, found[0][1]) and torch.equal(y_ND, found[0][0])


@pytest.mark.parametrize("name", RESTS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_rest_is_what_float64_says(name, level, monkeypatch):
    case = RESTS[name]
    tensors = tensors_of(case)
    tensors["down"].zero_()
    layer = layer_at(level, case, tensors, monkeypatch)
    for x_1D in rows_of(case).split(1):
        y_1D, index = layer.run(x_1D)[0], layer.last()["index"].long()
        assert relative(y_1D[0], output(case, tensors, x_1D[0], index, index)) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
def test_one_neuron_a_thousand_times_the_others_takes_nothing_from_the_sum(level, monkeypatch):
    """Such neurons are kept as a rule; where they are not, they share a scale with the others."""
    case = replace(RESTS["rest_576_32"], act="relu")
    tensors = tensors_of(case)
    tensors["down"].zero_()
    tensors["norm"][5] = 0.0  # so that it is not selected
    for part in (5, case.neurons + 5):
        tensors["bias"][part] += 1e3
    layer = layer_at(level, case, tensors, monkeypatch)
    x_1D = rows_of(case, 1)
    y_1D, index = layer.run(x_1D)[0], layer.last()["index"].long()
    assert 5 not in index
    assert relative(y_1D[0], output(case, tensors, x_1D[0], index, index)) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37, 1e-20, 1e20, 1e30])
def test_inputs_of_any_size_keep_their_precision(size, level, monkeypatch):
    case = replace(PREDICTORS["4_bits_32"], act="relu")
    tensors = tensors_of(case)
    tensors["mean"].zero_()
    tensors["bias"].zero_()
    layer = layer_at(level, case, tensors, monkeypatch)
    x_1D = rows_of(case, 1)
    x_1D[:, :64] *= size
    layer.run(x_1D)
    found_M = layer.last()["z"].flatten()
    exact_M = estimates(case, tensors, x_1D[0], torch.float64)
    assert (found_M - exact_M).abs().max() < 1e-6 * exact_M.abs().max()


@pytest.mark.parametrize("level", LEVELS)
def test_a_loud_block_leaves_the_others_their_precision(level, monkeypatch):
    case = PREDICTORS["4_bits_32"]
    tensors = tensors_of(case)
    tensors["scale"][:, 0], tensors["offset"][:, 0] = 0.0, 0.0  # nobody listens to block 0
    layer = layer_at(level, case, tensors, monkeypatch)
    x_1D = rows_of(case, 1)
    x_1D[:, :32] *= 1e8
    layer.run(x_1D)
    exact_M = estimates(case, tensors, x_1D[0], torch.float64)
    assert (layer.last()["z"].flatten() - exact_M).abs().max() < 3e-6


def test_a_row_too_wide_for_32_bits_is_refused():
    case = Case(1, 1, 1, 1)
    tensors = tensors_of(case)
    tensors["up"] = torch.zeros(1, 2**19 + 1)
    with pytest.raises(ValueError, match="is too large"):
        _native.FfnLayer.pack(settings_of(case), tensors)
