"""Layers for the native kernels, and what they must compute, in float64.

Shape suffixes: N rows, D width, F neurons, M predictor outputs, C candidates.
"""

import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from hireconvert.quantize import (
    GridFormat,
    decode_codes,
    encode_down,
    encode_matrix,
    fit_grid,
    round_codes,
)
from hireconvert.runtime.hire_predict import top_k_indices
from tests import packing_reference
from tests.decoding import decode_matrix

try:
    from hireconvert import _native, _native_step
except ImportError:
    # A machine without a compiler has no library; one with a compiler must have built it.
    assert shutil.which("cc") is None and shutil.which("gcc") is None
    _native = None

LEVELS = () if _native is None else _native.LEVELS[: _native.LEVELS.index(_native.level()) + 1]
ACTS: dict[str, Any] = {
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu_quick": lambda z: z * torch.sigmoid(1.702 * z),
}


def codes_of(codes_OI: torch.Tensor, scale_OG: torch.Tensor, block: int) -> Any:
    """A matrix of the native step, from codes of 8 bits and their scales."""
    tiles, scales = packing_reference.code_tiles(codes_OI, scale_OG, block)
    return _native_step.Codes(*codes_OI.shape, block, tiles, scales)


def short_codes_of(codes_OI: torch.Tensor, scale_OG: torch.Tensor, block: int) -> Any:
    """The same of codes of 4 bits."""
    tiles = packing_reference.short_code_tiles(codes_OI, scale_OG, block)
    return _native_step.Codes(*codes_OI.shape, block, tiles, None)


@dataclass(frozen=True)
class Case:
    """One layer: sizes and settings."""

    width: int
    neurons: int
    candidates: int
    kept: int
    gated: bool = True
    dtype: torch.dtype = torch.float32
    bits: int = 4
    block: int = 32
    symmetric: bool = True
    levels: str = "even"
    rest: tuple[Any, ...] | None = None  # as GridFormat takes them
    act: str = "silu"
    bias: bool = False
    soft: bool = False
    error: float | None = None  # of copied output vectors, where scores are expected errors
    refined: bool = False
    copies: bool = False  # every neuron counts by its copies, whatever the numbers say
    level: float | None = None  # kept is what reaches it
    relative: bool = False  # as a share of what the row's estimated outputs come to

    @property
    def form(self) -> GridFormat:
        return GridFormat(self.bits, self.block, self.symmetric, levels=self.levels)


def normal_rest(block: int) -> tuple[Any, ...]:
    return (4, block, True, False, "normal")


CASES = {
    "plain": Case(64, 96, 60, 40),
    "fused": Case(64, 96, 48, 48, rest=(4, 32, False)),
    "odd": Case(50, 77, 41, 30, bits=3, block=12, rest=(3, 16, True), bias=True),
    "long_block": Case(33, 70, 30, 20, bits=2, block=1000, symmetric=False, rest=(8, 1000, False)),
    "one_of_each": Case(1, 1, 1, 1, rest=(2, 16, True)),
    "one_kept": Case(97, 131, 5, 1, symmetric=False, rest=(4, 48, False), act="gelu_tanh"),
    "all_candidates": Case(96, 100, 100, 33, rest=(4, 32, True), act="relu", bias=True),
    "ungated": Case(72, 161, 80, 50, gated=False, act="relu2", rest=(2, 16, False), bias=True),
    "ungated_erf": Case(40, 64, 20, 20, gated=False, act="gelu_erf", bits=3, block=7),
    "soft": Case(60, 90, 45, 30, bits=2, soft=True, rest=(4, 16, False), act="gelu_quick"),
    "soft_ungated": Case(60, 90, 45, 30, bits=2, soft=True, gated=False, act="gelu_erf"),
    "error": Case(60, 90, 45, 45, soft=True, error=0.1, rest=(4, 16, False)),
    "error_ungated": Case(
        60, 90, 45, 30, soft=True, gated=False, error=0.1, rest=(4, 16, True), act="gelu_erf"
    ),
    "bfloat16": Case(96, 200, 90, 60, dtype=torch.bfloat16, rest=(4, 96, False), bias=True),
    "float16": Case(95, 200, 90, 90, dtype=torch.float16, symmetric=False, rest=(3, 32, False)),
    "wide": Case(576, 320, 150, 150, block=96, rest=(4, 32, False)),
    "refined": Case(90, 131, 60, 40, symmetric=False, rest=(4, 48, True), bias=True, refined=True),
    "refined_all": Case(48, 40, 40, 12, block=16, rest=(4, 16, False), refined=True),
    "refined_fused": Case(
        260, 70, 30, 30, gated=False, block=500, rest=(4, 64, False), act="relu", refined=True
    ),
    "normal": Case(96, 100, 60, 40, levels="normal", rest=normal_rest(32), bias=True),
    "normal_odd": Case(61, 77, 41, 30, levels="normal", block=7, rest=normal_rest(16), act="relu"),
    "normal_ungated": Case(
        100, 90, 45, 45, gated=False, levels="normal", block=48, rest=(4, 48, False), soft=True,
        error=0.1,
    ),
    "normal_rest": Case(
        200, 131, 60, 60, rest=normal_rest(200), dtype=torch.bfloat16, act="gelu_tanh"
    ),
    "normal_refined": Case(
        160, 131, 60, 60, levels="normal", rest=normal_rest(32), bias=True, refined=True
    ),
    "normal_refined_fused": Case(
        97, 70, 30, 12, gated=False, levels="normal", block=16, rest=normal_rest(48), refined=True
    ),
}  # fmt: skip

# Layers whose neurons all count by their copies.
COPIES = {
    "narrow": Case(1, 1, 1, 1, block=1, rest=(4, 16, True), copies=True),
    "odd": Case(50, 77, 5, 5, block=12, rest=(4, 16, False), bias=True, copies=True),
    "normal": Case(
        577, 131, 5, 5, levels="normal", rest=normal_rest(32), bias=True, copies=True
    ),
    "ungated": Case(
        260, 70, 5, 5, gated=False, block=1000, symmetric=False, rest=(4, 64, True), act="relu",
        copies=True,
    ),
    "many spans": Case(
        1100, 50, 5, 5, levels="normal", block=96, rest=normal_rest(16), copies=True, act="gelu_erf"
    ),
}  # fmt: skip


# All reach a level that may reach it: as many candidates as neurons.
BY_LEVEL = {
    name: replace(CASES[name], candidates=count, kept=count, level=level)
    for name, count, level in (
        ("plain", 96, 0.5), ("fused", 96, 0.5), ("odd", 77, 0.2), ("long_block", 70, 0.5),
        ("one_of_each", 1, 0.01), ("one_kept", 131, 1.0), ("ungated", 161, 2.0),
        ("error", 90, 0.1), ("error_ungated", 90, 0.1), ("bfloat16", 200, 1.0),
        ("float16", 200, 1.0), ("wide", 320, 20.0), ("refined", 131, 1.0),
        ("refined_fused", 70, 1.0), ("normal", 100, 1.0), ("normal_refined", 131, 2.0),
        ("normal_refined_fused", 70, 1.0),
    )
}  # fmt: skip
BY_LEVEL |= {
    f"{name}_relative": replace(BY_LEVEL[name], level=level, relative=True)
    for name, level in (
        ("plain", 0.05), ("odd", 0.02), ("one_of_each", 0.01), ("ungated", 0.05), ("error", 0.01),
        ("bfloat16", 0.03), ("wide", 0.05), ("refined_fused", 0.05), ("normal_refined", 0.05),
    )
}  # fmt: skip


def tensors_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """Weights and a quantized predictor, as FfnLayer.pack takes them."""
    dice = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=dice) * scale).to(case.dtype)

    width, neurons = case.width, case.neurons
    tensors: dict[str, Any] = {"gate": None, "down": normal(neurons, width)}
    names = ["gate", "up"] if case.gated else ["up"]
    for name in names:
        tensors[name] = normal(neurons, width, scale=width**-0.5)
        tensors[f"{name}_bias"] = normal(neurons, scale=0.3) if case.bias else None
    tensors["down_bias"] = normal(width) if case.bias else None
    weight_MD = torch.cat([tensors[name].float() for name in names])
    column_scale = torch.rand(width, generator=dice) + 0.5
    grid = fit_grid(weight_MD * column_scale, case.form)
    tensors |= encode_matrix(round_codes(weight_MD * column_scale, grid), grid)
    mean = normal(width, scale=0.1).float()
    bias = weight_MD @ mean
    if case.bias:
        bias = bias + torch.cat([tensors[f"{name}_bias"].float() for name in names])
    tensors |= {"column_scale": column_scale, "mean": mean, "bias": bias}
    tensors["norm"] = tensors["down"].float().norm(dim=1)
    if case.soft:
        tensors["soft"] = (torch.rand(len(names) * neurons, generator=dice) * 0.2).half()
    if case.error is not None:
        tensors["rest_error"] = torch.tensor([case.error])
    if case.rest is not None:
        tensors |= encode_down(tensors["down"].float(), GridFormat(*case.rest))
    if case.refined:
        refine(case, tensors, names)
    if case.copies:
        round_to_copies(case, tensors, names)
    return tensors


def round_to_copies(case: Case, tensors: dict[str, Any], names: list[str]) -> None:
    """The weights become what the copies stand for, in the case's type."""
    assert case.rest is not None
    outputs, shape = len(names) * case.neurons, (case.neurons, case.width)
    first_MD = decode_matrix(tensors, case.form, (outputs, case.width)) / tensors["column_scale"]
    down = {k.removeprefix("down_"): t for k, t in tensors.items() if k.startswith("down_")}
    tensors["down"] = decode_matrix(down, GridFormat(*case.rest), shape).to(case.dtype)
    for name, matrix in zip(names, first_MD.chunk(len(names)), strict=True):
        tensors[name] = matrix.to(case.dtype)


def refine(case: Case, tensors: dict[str, Any], names: list[str]) -> None:
    """Round the weights to the copies and 4 bits more; the scales are added."""
    assert case.rest is not None
    first_MD = torch.cat([tensors[name] for name in names]) * tensors["column_scale"]
    down = {key.removeprefix("down_"): value for key, value in tensors.items()}
    copies = {
        "low_scale": (first_MD, tensors, case.form),
        "down_low_scale": (tensors["down"], down, GridFormat(*case.rest)),
    }
    rounded = []
    for name, (weight_MD, copy, form) in copies.items():
        left_MD = weight_MD - decode_matrix(copy, form, tuple(weight_MD.shape))
        grid = fit_grid(left_MD, GridFormat(4, form.block, symmetric=True))
        tensors[name] = grid.scale
        rounded.append(weight_MD - left_MD + decode_codes(round_codes(left_MD, grid), grid))
    tensors["down"] = rounded[1]
    for name, matrix in zip(
        names, (rounded[0] / tensors["column_scale"]).chunk(len(names)), strict=True
    ):
        tensors[name] = matrix


def settings_of(case: Case) -> dict[str, Any]:
    names = ("bits", "block", "symmetric", "channel_major", "levels")
    rest = None if case.rest is None else dict(zip(names, case.rest, strict=False))
    return {
        "activation": case.act,
        "num_candidates": case.candidates,
        "num_kept": case.kept,
        "bits": case.bits,
        "block": case.block,
        "symmetric": case.symmetric,
        "levels": case.levels,
        "rest": rest,
        "refined": case.refined,
        "copies": case.copies,
        "level": case.level,
        "relative": case.relative,
    }


def rows_of(case: Case, num: int = 3, seed: int = 1) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(num, case.width, generator=dice).to(case.dtype)


def estimates(case: Case, tensors: dict[str, Any], x_D: torch.Tensor, dtype: Any) -> torch.Tensor:
    """z [M] from the tensors on disk, in the arithmetic of `dtype`."""
    outputs = tensors["bias"].shape[0]
    copy_MD = decode_matrix(tensors, case.form, (outputs, case.width)).to(dtype)
    u_D = (x_D.to(dtype) - tensors["mean"].to(dtype)) / tensors["column_scale"].to(dtype)
    return tensors["bias"].to(dtype) + copy_MD @ u_D


def hidden(case: Case, z_M: torch.Tensor) -> torch.Tensor:
    act = ACTS[case.act]
    return act(z_M[: case.neurons]) * z_M[case.neurons :] if case.gated else act(z_M)


def sizes(case: Case, tensors: dict[str, Any], z_M: torch.Tensor) -> torch.Tensor:
    """What scores are made of, softened where the case says so."""
    if not case.soft:
        return hidden(case, z_M).abs()
    act, soft_M = ACTS[case.act], tensors["soft"].to(z_M.dtype)
    first, s = z_M[: case.neurons], soft_M[: case.neurons]
    above, below = act(first + s), act(first - s)
    size = ((above.square() + below.square()) / 2).sqrt()
    if case.error is not None:
        rest = hidden(case, z_M) * case.error
        if not case.gated:
            return ((above - act(first)).square() + rest.square()).sqrt()
        by_gate = (above - act(first)) * z_M[case.neurons :]
        by_up = act(first) * soft_M[case.neurons :]
        return (by_gate.square() + by_up.square() + rest.square()).sqrt()
    if case.gated:
        size = size * (z_M[case.neurons :].square() + soft_M[case.neurons :].square()).sqrt()
    return size


def row_level(case: Case, tensors: dict[str, Any], z_M: torch.Tensor) -> float:
    """The score that a row's neurons must reach."""
    assert case.level is not None
    if not case.relative:
        return case.level
    return case.level * float((hidden(case, z_M.double()) * tensors["norm"]).norm())


def exact_hidden(case: Case, tensors: dict[str, Any], x_D: torch.Tensor) -> torch.Tensor:
    """float64 [F]."""
    products = []
    for name in ["gate", "up"] if case.gated else ["up"]:
        bias = tensors[f"{name}_bias"]
        product = tensors[name].double() @ x_D.double()
        products.append(product if bias is None else product + bias.double())
    return hidden(case, torch.cat(products))


def output(
    case: Case, tensors: dict[str, Any], x_D: torch.Tensor, index: Any, kept: Any
) -> torch.Tensor:
    """float64 [D]: the output when `index` are the candidates and `kept` those of them kept."""
    h_F = exact_hidden(case, tensors, x_D)
    y_D = h_F[kept] @ tensors["down"].double()[kept]
    if case.rest is not None:
        value_F = hidden(case, estimates(case, tensors, x_D, torch.float64))
        value_F[index] = h_F[index]
        value_F[kept] = 0.0
        own = {k.removeprefix("down_"): t for k, t in tensors.items() if k.startswith("down_")}
        shape = (case.neurons, case.width)
        y_D = y_D + value_F @ decode_matrix(own, GridFormat(*case.rest), shape).double()
    return y_D if tensors["down_bias"] is None else y_D + tensors["down_bias"].double()


def selected(score_F: torch.Tensor, num: int) -> torch.Tensor:
    """The runtime's own selection."""
    return top_k_indices(score_F[None], num)[0]
