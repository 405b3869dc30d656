from dataclasses import replace

import pytest
import torch

from hireconvert import _packing, schema
from hireconvert.errors import InputError
from hireconvert.quantize import (
    GridFormat,
    column_scales,
    decode_codes,
    encode_down,
    encode_factor,
    encode_matrix,
    feedback_codes,
    fit_grid,
    fitted_codes,
    pack_planes,
    round_codes,
)
from hireconvert.runtime import hire_predict
from hireconvert.runtime.hire_config import down_tensors
from hireconvert.runtime.hire_predict import (
    NORMAL_LEVELS,
    Predictor,
    decode_blocks,
    decode_down,
)
from tests.decoding import decode_factor, decode_matrix, unpack_planes

M, D = 22, 37


def matrix(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, D, generator=generator) * 0.05


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_hold_every_code_little_endian(bits):
    codes = torch.randint(0, 2**bits, (5, 19), generator=torch.Generator().manual_seed(bits))
    planes = pack_planes(codes, bits)
    assert planes.shape == (bits, 5, 3) and planes.dtype == torch.uint8
    assert torch.equal(unpack_planes(planes, 19), codes.to(torch.uint8))
    first = sum(((int(codes[0, j]) >> 1) & 1) << j for j in range(8))
    assert int(planes[1, 0, 0]) == first
    assert int(planes[0, 0, 2]) < 2**3  # the padding is zero


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channel_major", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_copy_survives_its_tensors(bits, symmetric, channel_major):
    weight, form = matrix(), GridFormat(bits, 8, symmetric, channel_major)
    grid = fit_grid(weight, form)
    codes = round_codes(weight, grid)
    tensors = encode_matrix(codes, grid)
    rows, length = (D, M) if channel_major else (M, D)
    assert tensors["planes"].shape == (bits, rows, -(-length // 8))
    assert tensors["scale"].shape == (rows, -(-length // 8))
    assert tensors["scale"].dtype == torch.float16 and ("offset" in tensors) == (not symmetric)
    decoded = decode_matrix(tensors, form, (M, D))
    assert torch.equal(decoded, decode_codes(codes, grid))
    assert relative(decoded, weight) < {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.01}[bits]


@pytest.mark.parametrize("channel_major", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_runtime_decodes_the_same_numbers(symmetric, channel_major):
    weight, form = matrix(), GridFormat(3, 8, symmetric, channel_major)
    grid = fit_grid(weight, form)
    codes = round_codes(weight, grid)
    vectors = {"mean": torch.zeros(D), "bias": torch.zeros(M), "column_scale": torch.ones(D)}
    num_inputs = D - 1 if channel_major else D
    spec = {"kind": "q", "bits": 3, "block": 8, "symmetric": symmetric, "num_inputs": num_inputs}
    predictor = Predictor(spec, {**encode_matrix(codes, grid), **vectors}, D)
    copy = predictor.copy.T if channel_major else predictor.copy
    assert torch.allclose(copy, decode_codes(codes, grid), rtol=1e-6, atol=1e-8)


NORMAL = GridFormat(4, 8, symmetric=True, levels="normal")


@pytest.mark.parametrize("channel_major", [True, False])
def test_normal_levels_survive_their_tensors_and_the_runtime_agrees(channel_major):
    weight, form = matrix(), replace(NORMAL, channel_major=channel_major)
    grid = fit_grid(weight, form)
    codes = round_codes(weight, grid)
    tensors = encode_matrix(codes, grid)
    rows, length = (D, M) if channel_major else (M, D)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "planes": (torch.uint8, (4, rows, -(-length // 8))),
        "scale_codes": (torch.int8, (rows, -(-length // 8))),
        "scale_unit": (torch.float32, (rows,)),
    }
    assert int(tensors["scale_codes"].abs().min()) > 0
    decoded = decode_matrix(tensors, form, (M, D))
    assert torch.equal(decoded, decode_codes(codes, grid))
    spec = {"bits": 4, "block": 8, "symmetric": True, "levels": "normal"}
    runtime = decode_blocks(tensors, spec, length)
    assert torch.equal(runtime.T if channel_major else runtime, decoded)


def test_codes_of_normal_levels_are_the_nearest():
    grid = fit_grid(matrix(), replace(NORMAL, block=D))
    level = torch.tensor(NORMAL_LEVELS) * grid.scale_AG[..., None]
    nearest = (matrix()[..., None] - level).abs().argmin(-1)
    assert torch.equal(round_codes(matrix(), grid).long(), nearest)


def test_normal_levels_are_as_near_as_offsets_in_fewer_bytes():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    errors, sizes = [], []
    for form in (GridFormat(4, 32, False), replace(NORMAL, block=32)):
        grid = fit_grid(weight, form)
        tensors = encode_matrix(round_codes(weight, grid), grid)
        errors.append(relative(decode_codes(round_codes(weight, grid), grid), weight))
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert errors[1] < 1.005 * errors[0] and sizes[1] < 0.87 * sizes[0]


def test_normal_levels_hold_zeros_and_one_value():
    for value in (0.0, 0.25, -3.0):
        weight = torch.full((M, D), value)
        grid = fit_grid(weight, NORMAL)
        decoded = decode_codes(round_codes(weight, grid), grid)
        assert float((decoded - value).abs().max()) <= 1e-6 * max(1.0, abs(value))


def test_a_block_of_zeros_beside_others_stays_zero():
    weight = matrix()
    weight[:, 8:16] = 0.0
    weight[3, 16:24] *= 1e-2
    grid = fit_grid(weight, NORMAL)
    decoded = decode_codes(round_codes(weight, grid), grid)
    assert not decoded[:, 8:16].any()
    assert relative(decoded[3, 16:24], weight[3, 16:24]) < 0.5


@pytest.mark.parametrize("size", [1e-6, 1e19, 1e36])
def test_normal_levels_fit_weights_of_any_size(size):
    weight = matrix() * (size / 0.05)
    grid = fit_grid(weight, NORMAL)
    decoded = decode_codes(round_codes(weight, grid), grid)
    assert decoded.isfinite().all()
    assert float((decoded - weight).abs().max()) < 0.2 * float(weight.abs().max())


def test_weights_that_training_broke_have_codes():
    """The loss that they give is what stops a finetune."""
    grid = fit_grid(matrix(), NORMAL)
    broken = matrix()
    broken[2, 2], broken[3, 3] = torch.nan, torch.inf
    assert int(round_codes(broken, grid).max()) < 16


def test_the_longest_block_is_the_same_everywhere():
    known = (hire_predict.LONGEST_NORMAL_BLOCK, _packing.LONGEST_NORMAL_BLOCK)
    assert set(known) == {schema.LONGEST_NORMAL_BLOCK}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_factors_survive_and_the_runtime_agrees(bits):
    factor_in, factor_out = matrix(1)[:9], matrix(2)[:, :9]
    tensors = encode_factor(factor_in, bits, "factor_in") | encode_factor(
        factor_out, bits, "factor_out"
    )
    decoded = decode_factor(tensors, bits, "factor_in", width=D)
    assert relative(decoded, factor_in) < {16: 1e-3, 8: 1e-2, 4: 0.15}[bits]
    vectors = {"mean": torch.zeros(D), "bias": torch.zeros(M)}
    spec = {"kind": "lr", "rank": 9, "factor_bits": bits, "num_inputs": D}
    predictor = Predictor(spec, {**tensors, **vectors}, D)
    assert torch.equal(predictor.factor_in_RD, decoded)
    out = decode_factor(tensors, bits, "factor_out", width=9)
    assert torch.equal(predictor.factor_out_MR, out)


def test_low_nibble_comes_first():
    factor = torch.tensor([[7.0, -7.0, 3.0]])
    packed = encode_factor(factor, 4, "factor_in")["factor_in_codes"].view(torch.uint8)
    assert packed.tolist() == [[(7 + 8) | ((-7 + 8) << 4), (3 + 8) | (8 << 4)]]


def test_searched_clipping_beats_the_full_range():
    weight = matrix()
    weight[:, 3] *= 8
    for symmetric in (True, False):
        form = GridFormat(2, D, symmetric)
        middle = (weight.amax(1, keepdim=True) + weight.amin(1, keepdim=True)) / 2
        spread = weight.abs().amax(1, keepdim=True) * 2 if symmetric else None
        spread = (
            weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
            if spread is None
            else spread
        )
        low = -spread / 2 if symmetric else middle - spread / 2
        widest = ((weight - low) / (spread / 3)).round().clamp(0, 3) * (spread / 3) + low
        grid = fit_grid(weight, form)
        assert relative(decode_codes(round_codes(weight, grid), grid), weight) < relative(
            widest, weight
        )


def test_columns_that_matter_are_rounded_better():
    weight, importance = matrix(), torch.ones(D)
    importance[:5] = 1e4
    form = GridFormat(2, D, True)
    plain, aware = fit_grid(weight, form), fit_grid(weight, form, importance_D=importance)
    errors = [
        relative(decode_codes(round_codes(weight, grid), grid)[:, :5], weight[:, :5])
        for grid in (plain, aware)
    ]
    assert errors[1] < errors[0]


def test_feedback_lowers_the_error_of_products():
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(D, D, generator=generator) * torch.linspace(2, 0.05, D).unsqueeze(1)
    inputs = torch.randn(400, D, generator=generator) @ mixing
    weight, moment = matrix(), inputs.T @ inputs / 400
    grid = fit_grid(weight, GridFormat(3, 16, True), importance_D=moment.diagonal())
    errors = [
        relative(inputs @ decode_codes(codes, grid).T, inputs @ weight.T)
        for codes in (round_codes(weight, grid), feedback_codes(weight, grid, moment))
    ]
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("levels", ["even", "normal"])
def test_scales_of_columns_serve_columns_of_unequal_size(levels):
    """The copy of a matrix into which a norm's weights are folded is the copy folded likewise."""
    dice = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 64, generator=dice)
    inputs = torch.randn(500, 64, generator=dice) @ torch.randn(64, 64, generator=dice)
    gain = (1.5 * torch.randn(64, generator=dice)).exp()
    form = GridFormat(4, 32, symmetric=True, levels=levels)

    def copied(folded: torch.Tensor, *, column_scale: bool) -> torch.Tensor:
        x = inputs / folded
        moment = x.T @ x / len(x)
        scale = column_scales(weight * folded, moment) if column_scale else torch.ones(64)
        codes, grid = fitted_codes(weight * folded, form, moment, scale)
        return decode_codes(codes, grid) / scale / folded

    plain, folded = (copied(g, column_scale=True) for g in (torch.ones(64), gain))
    if levels == "normal":  # even steps have float16 scales, whose roundings differ
        assert torch.allclose(plain, folded, atol=1e-5)
    dead = gain.clone()
    dead[::3] = 0  # columns of nothing leave the others' scales alone
    x = inputs / gain
    scale = column_scales(weight * dead, x.T @ x / len(x))
    assert (scale[::3] == 1).all() and 0.99 < scale[dead > 0].log().mean().exp() < 1.01
    products = weight @ inputs.T
    off = (folded @ inputs.T - products).norm()
    assert off < 0.8 * (copied(gain, column_scale=False) @ inputs.T - products).norm()


def test_feedback_works_with_fewer_rows_than_columns():
    inputs = torch.randn(4, D, generator=torch.Generator().manual_seed(5))
    grid = fit_grid(matrix(), GridFormat(4, 16, True))
    codes = feedback_codes(matrix(), grid, inputs.T @ inputs / 4)
    assert relative(decode_codes(codes, grid), matrix()) < 0.5


def test_matrices_of_zeros_and_of_one_value_are_representable():
    for value, symmetric in ((0.0, True), (0.25, False)):
        weight = torch.full((M, D), value)
        grid = fit_grid(weight, GridFormat(2, 16, symmetric))
        decoded = decode_codes(round_codes(weight, grid), grid)
        assert float((decoded - value).abs().max()) < 1e-6


def test_values_that_are_no_numbers_are_refused():
    weight = matrix()
    weight[2, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        fit_grid(weight, GridFormat(4, 16, True))
    with pytest.raises(InputError, match="factor_in"):
        encode_factor(weight, 16, "factor_in")


@pytest.mark.parametrize("channel_major", [True, False])
def test_a_block_longer_than_the_row_is_one_block_and_costs_no_memory(channel_major):
    weight = matrix()
    length = M if channel_major else D
    tensors = []
    for block in (length, 2**40):
        grid = fit_grid(weight, GridFormat(4, block, False, channel_major))
        tensors.append(encode_matrix(round_codes(weight, grid), grid))
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_low_bit_down_is_near_and_decoded_alike(bits, symmetric):
    down, form = matrix(), GridFormat(bits, 8, symmetric)
    tensors = encode_down(down.bfloat16(), form)
    spec = {"bits": bits, "block": 8, "symmetric": symmetric}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == down_tensors(spec, M, D)
    own = {name.removeprefix("down_"): tensor for name, tensor in tensors.items()}
    decoded = decode_down(tensors, spec, D)
    assert torch.equal(decoded, decode_matrix(own, form, (M, D)))
    assert relative(decoded, down) < {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.01}[bits]


def test_a_down_matrix_that_is_not_finite_is_refused():
    down = matrix()
    down[3, 4] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        encode_down(down, GridFormat(4, 8, False))
