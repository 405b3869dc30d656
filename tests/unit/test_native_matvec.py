"""Products of weights where they lie, and what descriptions of decoder layers refuse."""

from typing import Any

import pytest
import torch

from tests import packing_reference
from tests.native import LEVELS, _native, codes_of, short_codes_of

if _native is None:
    pytest.skip("this machine has no compiler", allow_module_level=True)
from hireconvert import _native_step
from hireconvert._native_step import Block, Codes, Matrix, Step, matvec
from hireconvert.attention import round_rows

SHAPES = [(1, 1), (7, 5), (16, 32), (33, 97), (50, 64), (3, 31), (18, 600)]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_what_float64_says_however_many_rows(shape, dtype, level):
    wide = normal(shape[0], shape[1] + 3).to(dtype)
    for weight in (normal(*shape).to(dtype), wide[:, 2:-1], wide[:, 1 : shape[1] + 1]):
        for bias in (None, normal(shape[0], seed=1)):
            x = normal(7, shape[1], seed=2)
            exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
            together = matvec(Matrix(weight, bias), x)
            size = x.abs().double() @ weight.abs().double().t() + 1.0
            assert ((together - exact).abs() <= 1e-6 * size).all()
            for num in (1, 2, 3, 4, 6):
                assert torch.equal(matvec(Matrix(weight, bias), x[:num]), together[:num])


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (96, 0), (70, 32), (70, 64), (33, 33)])
def test_codes_with_scales(inputs, block, level):
    codes = torch.randint(
        -127, 128, (19, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    blocks = -(-inputs // (block or inputs))
    scale = torch.rand(19, blocks, generator=torch.Generator().manual_seed(1)) + 0.1
    spread = scale.repeat_interleave(block or inputs, dim=1)[:, :inputs]
    x = normal(3, inputs)
    exact = x.double() @ (codes.double() * spread.double()).t()
    found = matvec(codes_of(codes, scale, block or inputs), x)
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max() * inputs**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (50, 64), (50, 32), (64, 64)])
def test_codes_of_rounded_weights_are_found_again(inputs, block, bits, dtype):
    source = normal(30, inputs).to(dtype)  # as stored before it was rounded
    weight = round_rows(source.float(), block, bits).to(dtype)
    weight[4] = 0.0
    both = [Matrix(weight), Matrix(source, torch.ones(30))]
    found, other = _native_step.coded(both, block, [bits, bits])
    assert isinstance(found, Codes) and isinstance(other, Matrix) and other.weight_OI is source
    x = normal(2, inputs, seed=1)
    exact = x.double() @ weight.double().t()
    assert (matvec(found, x) - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm() + 1e-5
    given = Matrix(weight)
    assert _native_step.coded([given], 16, [bits])[0] is given  # a block of no kernel


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (70, 64), (33, 33), (130, 32)])
def test_short_codes_with_scales(inputs, block, level):
    """Any codes and scales, and any number of rows gives the bits of one."""
    codes, scale = short_numbers(19, inputs, block)
    weight = packing_reference.short_weights(codes, scale, block)
    x = normal(9, inputs)
    exact = x.double() @ weight.double().t()
    matrix = short_codes_of(codes, scale, block)
    together = matvec(matrix, x)
    assert (together - exact).abs().max() < 1e-6 * exact.abs().max() * inputs**0.5
    for num in (1, 2, 3, 4, 6):
        assert torch.equal(matvec(matrix, x[:num]), together[:num])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_in_its_row(bits, level):
    x = normal(3, 70)
    if bits == 8:
        matrix = codes_of(torch.full((5, 70), 3, dtype=torch.int8), torch.ones(5, 3), 32)
    else:
        matrix = short_codes_of(*short_numbers(5, 70, 32), 32)
    before = matvec(matrix, x)
    x[0, 69], x[2, 1] = float("nan"), float("inf")
    found = matvec(matrix, x)
    assert torch.equal(found[1], before[1])
    assert not found[0].isfinite().any() and not found[2].isfinite().any()


def test_threads_change_no_bit(level):
    weight, x, before = normal(75, 130), normal(2, 130, seed=1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = matvec(Matrix(weight), x)
        torch.set_num_threads(3)
        assert torch.equal(one, matvec(Matrix(weight), x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (Matrix(torch.zeros(4, 4, dtype=torch.float64)), "torch.float64"),
        (Matrix(torch.zeros(4, 4, dtype=torch.int8)), "torch.int8"),
        (Matrix(torch.zeros(4)), "a matrix is"),
        (Matrix(torch.zeros(4, 0)), "a matrix is"),
        (Matrix(torch.zeros(4, 4).t()[:, ::2]), "strides"),
        (Matrix(torch.zeros(4, 6).t()), "strides"),
        (Matrix(torch.zeros(1, 4).expand(3, 4)), "strides"),
        (Matrix(torch.zeros(4, 4), torch.zeros(3)), "bias"),
        (Matrix(torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)), "bias"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(matrix, said):
    with pytest.raises(ValueError, match=f"native: .*{said}"):
        matvec(matrix, torch.zeros(1, matrix.weight_OI.shape[-1]))


def short_numbers(outputs: int, inputs: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 4 bits and scales for them."""
    dice = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), generator=dice)
    return codes, torch.randn(outputs, -(-inputs // block), generator=dice).bfloat16()


def block(**changes: Any) -> Block:
    """A layer 6 wide with 4 heads of 2 over 2 pairs, and 5 neurons."""
    shapes = {"q": (8, 6), "k": (4, 6), "v": (4, 6), "o": (6, 8), "gate": (5, 6), "up": (5, 6)}
    shapes["down"] = (6, 5)
    settings: dict[str, Any] = {
        "matrices": {name: Matrix(normal(*shape)) for name, shape in shapes.items()},
        "norms": {"attention_norm": torch.ones(6), "ffn_norm": torch.ones(6)},
        "head_dim": 2,
        "rotary": 2,
        "eps": 1e-6,
        "scaling": 0.5,
        "activation": "silu",
    }
    for key, value in changes.items():
        settings[key] = settings[key] | value if key in ("matrices", "norms") else value
    return Block(**settings)


def sixes(outputs: int, block: int) -> Codes:
    """6 inputs wide."""
    scale = torch.ones(outputs, -(-6 // block))
    return codes_of(torch.ones(outputs, 6, dtype=torch.int8), scale, block)


@pytest.mark.parametrize(
    "changes",
    [
        {"matrices": {"q": sixes(8, 6), "v": sixes(4, 4)}},
        {"matrices": {"gate": sixes(5, 6)}},
        {"matrices": {"o": Matrix(normal(6, 4))}},
        {"matrices": {"k": Matrix(normal(6, 6))}},
        {"matrices": {"down": Matrix(normal(6, 6))}},
        {"matrices": {"gate": Matrix(normal(6, 6))}},
        {"matrices": {"q": Matrix(normal(8, 5))}},
        {"norms": {"ffn_norm": torch.ones(5)}},
        {"norms": {"q_norm": torch.ones(6)}},
        {"norms": {"k_norm": torch.ones(2, 1)}},
        {"head_dim": 0},
        {"head_dim": 3},
        {"rotary": 3},
        {"rotary": 4},
        {"rope": -1},
        {"window": -1},
        {"softcap": float("nan")},
        {"eps": -1.0},
        {"activation": "tanh"},
        {"cache_type": torch.float64},
        {"counts": torch.zeros(4, dtype=torch.int64)},
    ],
)
def test_layers_that_do_not_fit_are_refused(changes):
    Step([block()])
    Step([block(matrices={"q": sixes(8, 6), "v": sixes(4, 6)})])
    with pytest.raises(ValueError, match="native: "):
        Step([block(**changes)])


def test_layers_must_fit_each_other():
    narrow = {"attention_norm": torch.ones(5), "ffn_norm": torch.ones(5)}
    shapes = {"q": (8, 5), "k": (4, 5), "v": (4, 5), "o": (5, 8), "gate": (5, 5), "up": (5, 5)}
    shapes["down"] = (5, 5)
    matrices = {name: Matrix(normal(*shape)) for name, shape in shapes.items()}
    for second in (block(matrices=matrices, norms=narrow), block(rotary=0)):
        with pytest.raises(ValueError, match="native: layers"):
            Step([block(), second])
    with pytest.raises(ValueError, match="native: layers"):
        Step([])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(_native_step.MOST_ROWS + 1, 6),
        torch.zeros(0, 6),
        torch.zeros(1, 5),
        torch.zeros(1, 6, dtype=torch.float64),
        torch.zeros(6, 2).t(),
    ],
)
def test_calls_that_do_not_fit_are_refused(x):
    step, angles = Step([block()]), [torch.zeros(1, 2)] * 2
    with pytest.raises(ValueError, match="native: x is"):
        step.run(x, step.past(), angles, 8)
    with pytest.raises(ValueError, match="native: x is"):
        step.run(torch.zeros(1, 6), step.past()[:, :4], angles, 8)
    with pytest.raises(ValueError, match="native: x is"):
        step.run(torch.zeros(1, 6), step.past(), angles[:1], 8)
    for odd in (torch.zeros(2, 2), torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="native: angles are"):
            step.run(torch.zeros(1, 6), step.past(), [angles[0], odd], 8)
