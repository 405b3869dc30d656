"""Heads for the native kernels, and what they must compute.

Run as a module by tests/unit/test_native_build.py, over a library with sanitizers: every mutation
of what a head is packed from or asked is refused with ValueError or runs. Prints both numbers.

Shape suffixes: N rows, D width, V vocabulary.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hireconvert.runtime.hire_head import exact_rows, soft_cap
from tests.native import LEVELS, _native

_native_head: Any = None
if _native is not None:
    from hireconvert import _native_head

# What heads know beyond the levels of the library: with and without VNNI.
HEAD_LEVELS = range(_native_head.head_level(_native.LEVELS[-1]) + 1) if LEVELS else range(0)


@dataclass(frozen=True)
class Case:
    """One head: sizes and what its weight looks like."""

    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    kind: str = "plain"
    bias: bool = False
    cap: float | None = None
    bits: int = 8


CASES = {
    "plain": Case(300, 48),
    "one": Case(1, 1),
    "narrow": Case(77, 3, bias=True),
    "odd": Case(131, 61, kind="outlier", bias=True),
    "half_block": Case(97, 130, torch.float16, kind="uneven"),
    "block_and_a_half": Case(80, 238, torch.bfloat16, kind="ties", cap=20.0),
    "bfloat16": Case(513, 576, torch.bfloat16, kind="outlier"),
    "four_bits": Case(200, 96, torch.bfloat16, kind="uneven", bits=4, cap=30.0),
    "coarse": Case(250, 64, kind="coarse"),
    "zeros": Case(64, 40, kind="zeros", bias=True),
    "near": Case(400, 72, kind="near", cap=15.0),
    "saturated": Case(120, 32, kind="outlier", cap=0.5),
}


def weight_of(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, D], bias [V] or None) with the awkward shapes that real ones take."""
    dice = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(case.rows, case.width, generator=dice)
    if case.kind == "uneven":
        size_V = torch.logspace(-3, 2, case.rows)[torch.randperm(case.rows, generator=dice)]
        weight_VD *= size_V[:, None]
    if case.kind == "outlier":
        weight_VD[:, case.width // 3] *= 200
    if case.kind == "ties":
        weight_VD = weight_VD[torch.randint(0, min(20, case.rows), (case.rows,), generator=dice)]
    if case.kind == "coarse":
        weight_VD = (weight_VD * 2).round() / 2
    if case.kind == "zeros":
        weight_VD[::3] = 0
    if case.kind == "near":  # rows that differ in their last bits
        weight_VD = weight_VD[:1] * (1 + 2**-21 * weight_VD)
    bias_V = torch.randn(case.rows, generator=dice).to(case.dtype) if case.bias else None
    return weight_VD.to(case.dtype), bias_V


def states(num: int, width: int, seed: int) -> torch.Tensor:
    """Hidden states of many sizes, some nearly flat, some of one loud channel, some zero."""
    dice = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num, width, generator=dice)
    x_ND *= torch.logspace(-4, 3, num)[torch.randperm(num, generator=dice), None]
    x_ND[::5, width // 3] *= 50
    x_ND[1::5] = x_ND[1::5].sign()
    x_ND[2::17] = 0
    return x_ND.clamp(-6e4, 6e4)  # what float16 can hold


def adversarial(
    weight_VD: torch.Tensor, num: int, dice: torch.Generator
) -> Iterator[tuple[torch.Tensor, int]]:
    """(x, certified rows): states for which the best rows nearly tie.

    x is taken off the differences of some rows, so that their products agree up to rounding.
    """
    rows, width = weight_VD.shape
    for _ in range(num):
        x_D = torch.randn(width, generator=dice)
        size = min(1 + int(torch.randint(0, 6, (1,), generator=dice)), rows, width)
        some_CD = weight_VD[torch.randperm(rows, generator=dice)[:size]].float()
        x_D = x_D + some_CD.mean(0) * 2 / some_CD.mean(0).norm().clamp(min=1e-6)
        if size > 1:
            basis_DC = torch.linalg.qr((some_CD[1:] - some_CD[0]).t())[0]
            x_D = x_D - basis_DC @ (basis_DC.t() @ x_D)
        exponent = float(torch.randint(-12, 12, (1,), generator=dice))
        yield (x_D * 2**exponent).to(weight_VD.dtype), size


def reference_of(
    case: Case, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, x_ND: torch.Tensor
) -> torch.Tensor:
    """Reference logits float32 [N, V], before soft-capping."""
    del case
    return torch.stack([exact_rows(x_D, weight_VD, bias_V) for x_D in x_ND])


def ranked(z_NV: torch.Tensor, num: int, cap: float | None) -> torch.Tensor:
    """Ids of the best `num` after soft-capping, ties to the lowest id."""
    z_NV = soft_cap(z_NV, cap)
    return torch.sort(z_NV, dim=-1, descending=True, stable=True).indices[:, :num]


# --------------------------------------------------------------------------- under sanitizers


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in memory of exactly its size, where the sanitizer sees its end."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _changed(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    noise = torch.full_like(tensor, dice.choice([0.0, 3e38, float("nan"), float("inf"), 1e-40]))
    return dice.choice(
        [
            noise,
            tensor[: max(tensor.shape[0] - 1, 0)],
            torch.cat([tensor, tensor[:1]]),
            tensor[None],
            tensor.flatten(),
            tensor.to(dice.choice([torch.float64, torch.int64, torch.float16, torch.uint8])),
            tensor.transpose(0, -1),
            tensor[:, ::2] if tensor.dim() > 1 else tensor[::2],
        ]
    )


def _run(
    weight_VD: torch.Tensor, bias_V: torch.Tensor | None, x_ND: torch.Tensor, dice: random.Random
) -> None:
    head = _native_head.HeadLayer(weight_VD, bias_V, bits=dice.choice([8, 8, 4, 5]))
    for certify in (True, False):
        count = dice.choice([1, 2, 7, 64, 10**6, 0])
        cap = dice.choice([None, 5.0, 1e-3])
        head.run(x_ND, count, certify=certify, cap=cap, mask=dice.random() < 0.5)


def main(number: int) -> None:
    _native_head.together = _apart
    torch.set_num_threads(2)
    dice, refused, ran = random.Random(0), 0, 0
    for _ in range(number):
        case = dice.choice(list(CASES.values()))
        weight_VD, bias_V = weight_of(case, dice.randrange(9))
        x_ND = states(3, case.width, dice.randrange(9)).clone()
        changes = dice.randrange(4)
        if changes == 1:
            weight_VD = _changed(weight_VD, dice)
        elif changes == 2 and bias_V is not None:
            bias_V = _changed(bias_V, dice)
        elif changes == 3:
            x_ND = _changed(x_ND, dice)
        try:
            _run(weight_VD, bias_V, x_ND, dice)
            ran += 1
        except ValueError as error:
            assert str(error).startswith("native: "), error
            refused += 1
    print(refused, ran)


if __name__ == "__main__":
    main(int(sys.argv[1]))
