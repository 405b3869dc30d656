"""Layers packed by the library against their slow twin, PyTorch: the same bytes.

Shape suffixes: D width, F neurons.
"""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from hireconvert.attention import round_rows
from tests import packing_reference
from tests.native import CASES, LEVELS, Case, _native, normal_rest, settings_of, tensors_of

if _native is not None:
    from hireconvert import _native_step
    from hireconvert._native_head import HeadLayer
pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
FORMS = {
    f"{bits}_{block}_{rest_bits}": Case(
        width, neurons, 5, 5, bits=bits, block=block, symmetric=bool(bits % 2),
        rest=(rest_bits, rest_block, bool(rest_bits % 2)),
    )
    for width, neurons, bits, block, rest_bits, rest_block in [
        (1, 5, 2, 1, 2, 16), (7, 16, 3, 3, 3, 16), (31, 17, 4, 5, 4, 16), (32, 31, 2, 16, 8, 32),
        (33, 32, 3, 32, 2, 16), (63, 33, 4, 33, 3, 48), (64, 65, 2, 64, 4, 64),
        (65, 48, 3, 40, 8, 80), (159, 47, 4, 7, 2, 32), (260, 9, 3, 100, 3, 112),
        (577, 70, 4, 32, 4, 32), (1100, 20, 2, 24, 8, 1100), (513, 6, 3, 1000, 4, 1000),
    ]
}  # fmt: skip
REFINED = {
    f"refined_{width}_{block}": Case(
        width, neurons, 5, 5, block=block, symmetric=symmetric, rest=(4, rest, not symmetric),
        gated=gated, refined=True, bias=gated,
    )
    for width, neurons, block, rest, symmetric, gated in [
        (16, 5, 16, 16, False, True), (40, 33, 32, 16, True, True), (97, 48, 48, 200, False, True),
        (250, 64, 300, 32, True, False), (577, 37, 32, 32, False, True),
    ]
}  # fmt: skip
NORMAL = {
    f"normal_{width}_{block}": Case(
        width, neurons, 5, 5, block=block, levels="normal", rest=normal_rest(rest), gated=gated,
        refined=refined,
    )
    for width, neurons, block, rest, gated, refined in [
        (1, 5, 1, 16, True, False), (31, 17, 5, 16, True, False), (33, 32, 32, 64, False, False),
        (65, 48, 40, 80, False, False), (260, 9, 100, 112, True, False),
        (1100, 20, 32, 1100, True, False), (513, 6, 1000, 1000, True, False),
        (577, 37, 32, 32, True, True), (40, 33, 16, 32, False, True),
    ]
}  # fmt: skip
COPIES = {
    f"copies_{width}_{block}": Case(
        width, neurons, 5, 5, block=block, rest=rest, gated=gated, copies=True, bias=gated, **form,
    )
    for width, neurons, block, rest, gated, form in [
        (1, 5, 1, normal_rest(16), True, {"levels": "normal", "soft": True, "error": 0.1}),
        (40, 33, 12, (4, 16, False), True, {"symmetric": False}),
        (97, 48, 48, (4, 200, True), False, {}),
        (577, 37, 32, normal_rest(32), True, {"levels": "normal"}),
        (260, 70, 1000, (4, 32, False), False, {"levels": "normal", "soft": True}),
    ]
}  # fmt: skip
ALL = {**CASES, **FORMS, **REFINED, **NORMAL, **COPIES}


def same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        pair = [t.contiguous().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*pair), name


def check(settings: dict[str, Any], tensors: dict[str, Any]) -> Any:
    packed = packing_reference.pack(settings, tensors)
    layer = _native.FfnLayer.pack(settings, tensors)
    if packed is None:
        assert layer is None
        return None
    numbers, expected = packed
    assert layer.numbers == numbers
    same_bytes(layer.tensors, expected)
    return layer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ALL)
def test_every_byte_is_the_twins(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    layer = check(settings_of(ALL[name]), tensors_of(ALL[name]))
    assert ("low" in layer.tensors) == ALL[name].refined
    assert ("rows" in layer.tensors) == (not ALL[name].refined and not ALL[name].copies)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["refined", "refined_all", "refined_577_32", "normal_577_32"])
def test_narrow_weights_find_the_same_codes(
    name: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    case = ALL[name]
    tensors = tensors_of(case)
    for matrix in ("gate", "up", "down"):
        tensors[matrix] = tensors[matrix].to(dtype)
    assert "low" in check(settings_of(case), tensors).tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["refined_97_48", "bfloat16", "copies_577_32"])
def test_matrices_may_lie_anyhow(name: str, dtype: torch.dtype) -> None:
    case = ALL[name] if ALL[name].refined else replace(ALL[name], dtype=dtype)
    tensors = tensors_of(case)
    plain = _native.FfnLayer.pack(settings_of(case), tensors)
    across = {n: tensors[n].t().contiguous().t() for n in ("gate", "up", "down")}
    for changed in (
        across,
        {name: torch.stack([tensors[name], tensors[name]], 2)[..., 0] for name in across},
        {name: torch.cat([tensors[name]] * 2, 1)[:, : case.width] for name in across},
    ):
        layer = _native.FfnLayer.pack(settings_of(case), {**tensors, **changed})
        same_bytes(layer.tensors, plain.tensors)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["refined", "fused", "refined_577_32", "copies_577_32"])
def test_bytes_do_not_depend_on_threads(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(settings_of(ALL[name]), tensors_of(ALL[name]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
@pytest.mark.parametrize("change", [0.01, torch.nan, torch.inf, -torch.inf])
def test_weights_off_the_grid_are_kept_as_they_are(
    matrix: str, change: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    case = ALL["refined_577_32"]
    tensors = tensors_of(case)
    tensors[matrix][case.neurons - 1, 3] += change
    assert "low" not in check(settings_of(case), tensors).tensors


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COPIES)
def test_weights_that_are_not_their_copies_are_not_packed(
    name: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    case = replace(COPIES[name], dtype=dtype)
    tensors = tensors_of(case)
    assert check(settings_of(case), tensors) is not None
    for matrix in ("gate", "up", "down") if case.gated else ("up", "down"):
        for change in (2.0, torch.nan, torch.inf):
            other = tensors[matrix].clone()
            largest = int(other[-1].abs().argmax())
            other[-1, largest] *= change
            assert check(settings_of(case), {**tensors, matrix: other}) is None


@pytest.mark.parametrize("name", ["fused", "refined"])
def test_other_counts_share_the_memory(name: str) -> None:
    case = ALL[name]
    tensors = tensors_of(case)
    layer = _native.FfnLayer.pack(settings_of(case), tensors)
    other = layer.counting(20, 7)
    for key, tensor in layer.tensors.items():
        assert other.tensors[key].data_ptr() == tensor.data_ptr()
    packed = _native.FfnLayer.pack(
        settings_of(case) | {"num_candidates": 20, "num_kept": 7}, tensors
    )
    x_ND = torch.randn(3, case.width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other.run(x_ND)[0], packed.run(x_ND)[0])
    for candidates, kept in ((0, 0), (5, 6), (case.neurons + 1, 5)):
        with pytest.raises(ValueError, match="candidates are kept"):
            layer.counting(candidates, kept)


def test_a_pickled_layer_holds_its_own_tensors_alone() -> None:
    case = ALL["refined"]
    layer = _native.FfnLayer.pack(settings_of(case), tensors_of(case))
    written = pickle.dumps(layer)
    assert len(written) < 2 * sum(t.nbytes for t in layer.tensors.values()) + 20_000
    x_ND = torch.randn(2, case.width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pickle.loads(written).run(x_ND)[0], layer.run(x_ND)[0])


# --------------------------------------------------------------------------- attention, head


def on_the_grid(
    outputs: int, inputs: int, block: int, dtype: torch.dtype, bits: int = 8
) -> torch.Tensor:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    weight_OI[0, : inputs // 2] = 0
    weight_OI[-1] = 0
    return round_rows(weight_OI.to(dtype).float(), block, bits).to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"), [(3, 1, 32), (5, 31, 64), (7, 97, 32), (9, 576, 64)]
)
def test_codes_of_attention_are_the_twins(
    outputs: int, inputs: int, block: int, dtype: torch.dtype, level: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    weight_OI = on_the_grid(outputs, inputs, block, dtype)
    wide = torch.cat([weight_OI, weight_OI], dim=1)[:, :inputs]
    expected = packing_reference.codes(weight_OI, block)
    for given in (weight_OI, wide):
        found = _native_step.coded([_native_step.Matrix(given)], block, [8])[0]
        assert expected is not None and isinstance(found, _native_step.Codes)
        tiles, scales = packing_reference.code_tiles(*expected, min(block, inputs))
        assert torch.equal(found.tiles_TWB, tiles)
        assert torch.equal(found.scale_TGL, scales)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"), [(3, 64, 32), (5, 31, 64), (21, 108, 32), (9, 576, 64)]
)
def test_short_codes_of_attention_are_found_from_the_weights(
    outputs: int, inputs: int, block: int, dtype: torch.dtype, level: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    dice = torch.Generator().manual_seed(inputs)
    codes_OI = torch.randint(0, 16, (outputs, inputs), generator=dice)
    # Bounds, not the largest level: half of the blocks do without the outermost ones.
    codes_OI[::2] = codes_OI[::2].clamp(2, 13)
    scale_OG = torch.randn(outputs, -(-inputs // block), generator=dice).bfloat16()
    weight_OI = packing_reference.short_weights(codes_OI, scale_OG, block).to(dtype)
    found = _native_step.coded([_native_step.Matrix(weight_OI)], block, [4])[0]
    assert isinstance(found, _native_step.Codes) and found.bits == 4
    tiles = packing_reference.short_code_tiles(codes_OI, scale_OG, min(block, inputs))
    assert torch.equal(found.tiles_TWB, tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_codes_are_found_whatever_was_rounded(dtype: torch.dtype) -> None:
    """Of many blocks, some of which hold one level, zeros or numbers of every size."""
    dice = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(600, 96, generator=dice)
    weight_OI *= 10.0 ** (4 * torch.rand(600, 1, generator=dice) - 2)
    weight_OI[5::7, :32] *= 1e-2  # some that float16 holds with few digits
    weight_OI[::7, :32] = 0
    weight_OI[1::7, 32:64] = weight_OI[1::7, 32:33]
    weight_OI[2::7, 1:64] = 0
    rounded_OI = round_rows(weight_OI.to(dtype).float(), 32, 4).to(dtype)
    found = _native_step.coded([_native_step.Matrix(rounded_OI)], 32, [4])[0]
    assert isinstance(found, _native_step.Codes)
    product = _native_step.matvec(found, torch.eye(96)[:32])
    expected = rounded_OI[:, :32].float().T
    # What the kernels read rounds to the weights, none excepted (sums have 24 bits).
    finest = 2.0**-25 if dtype == torch.float16 else 0.0
    most = (expected.abs() * torch.finfo(dtype).eps / 2).clamp_min(finest) + expected.abs() * 1e-6
    assert ((product - expected).abs() <= most).all()
    assert (rounded_OI[::7, :32] == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("change", [torch.nan, torch.inf, 0.3])
def test_one_weight_off_its_grid_leaves_a_matrix_as_it_is(change: float, bits: int) -> None:
    weight_OI = on_the_grid(9, 576, 64, torch.float32, bits)
    on = _native_step.Matrix(weight_OI.clone())
    assert _native_step.coded([on], 64, [bits])[0] is not on
    weight_OI[4, 5] += change
    assert bits == 4 or packing_reference.codes(weight_OI, 64) is None
    given = _native_step.Matrix(weight_OI)
    assert _native_step.coded([given], 64, [bits])[0] is given


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 1, torch.float32), (17, 70, torch.bfloat16), (33, 129, torch.float16),
     (100, 577, torch.bfloat16)],
)  # fmt: skip
def test_a_head_is_packed_alike_at_every_level_and_on_any_threads(
    rows: int, width: int, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_VD = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight_VD[rows // 2] = 0
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for level in LEVELS:
                monkeypatch.setenv(_native.VARIABLE, level)
                head = HeadLayer(weight_VD, None, bits=bits)
                assert head.finite
                found.append({**head.tensors, "ratio": torch.tensor([head._struct.loud_ratio])})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        same_bytes(other, found[0])
