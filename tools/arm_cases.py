"""Layers, heads and matrices of the tests with what they give: `write FILE` on x86, `compare FILE`
on ARM, whose portable level must give the portable bits and whose NEON levels those of AVX2.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from hireconvert import _native, _native_head, _native_step
from hireconvert._native import LEVELS, VARIABLE, FfnLayer
from hireconvert.attention import round_rows
from tests.native import BY_LEVEL, CASES, COPIES, settings_of, tensors_of

TWINS = {"portable": "portable", "neon": "avx2", "dotprod": "avx2"}
MATRICES = (
    (96, 32, torch.float32, 8), (70, 64, torch.bfloat16, 8), (96, 32, torch.bfloat16, 4),
    (70, 64, torch.float16, 4), (576, 32, torch.float32, 4),
)  # fmt: skip
HEADS = ((64, 40, torch.float32, 8), (97, 333, torch.bfloat16, 8), (576, 1000, torch.float16, 4))


def outputs(cases: dict[str, Any], level: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What every case gives on a level, by name."""
    os.environ[VARIABLE] = level
    for name, (numbers, tensors, x_ND) in cases["layers"].items():
        for row in range(len(x_ND)):
            layer = FfnLayer(numbers, tensors)
            yield f"{name}/y", layer.run(x_ND[row : row + 1])[0]
            for part, value in layer.last().items():
                yield f"{name}/{part}", value
        yield f"{name}/rows", layer.run(x_ND)[0]
    for name, (weight_VD, bias_V, bits, x_ND) in cases["heads"].items():
        head = _native_head.HeadLayer(weight_VD, bias_V, bits=bits)
        for certify in (True, False):
            found = head.run(x_ND, 5, certify=certify, cap=None, mask=False)
            yield f"{name}/{certify}", found.logits_NV
    for name, (weight_OI, block, bits, x_ND) in cases["matrices"].items():
        codes = _native_step.coded([_native_step.Matrix(weight_OI)], block, [bits])[0]
        assert isinstance(codes, _native_step.Codes)
        yield f"{name}/codes", codes.tiles_TWB
        yield f"{name}/y", _native_step.matvec(codes, x_ND)


def new_cases() -> dict[str, Any]:
    """Packed layers with inputs, heads, and matrices that lie on a grid."""
    dice = torch.Generator().manual_seed(5)
    layers, heads = {}, {}
    by_level = {f"{name}/by_level": case for name, case in BY_LEVEL.items()}
    for name, case in {**CASES, **by_level, **COPIES}.items():
        layer = FfnLayer.pack(settings_of(case), tensors_of(case))
        x_ND = torch.randn(4, case.width, generator=dice).to(case.dtype)
        tensors = {key: tensor.clone() for key, tensor in layer.tensors.items()}
        layers[name] = (layer.numbers, tensors, x_ND)
    for width, rows, dtype, bits in HEADS:
        weight_VD = torch.randn(rows, width, generator=dice).to(dtype)
        bias_V = torch.randn(rows, generator=dice)
        x_ND = torch.randn(3, width, generator=dice).to(dtype)
        heads[f"head_{width}"] = (weight_VD, bias_V, bits, x_ND)
    matrices = {}
    for inputs, block, dtype, bits in MATRICES:
        weight_OI = torch.randn(37, inputs, generator=dice).to(dtype).float()
        rounded_OI = round_rows(weight_OI, block, bits).to(dtype)
        x_ND = torch.randn(6, inputs, generator=dice)
        matrices[f"matrix_{inputs}_{bits}"] = (rounded_OI, block, bits, x_ND)
    return {"layers": layers, "heads": heads, "matrices": matrices}


def compare(expected: dict[str, list[torch.Tensor]], cases: dict[str, Any]) -> int:
    """Prints, level by level, how many of the outputs have the same bits; returns the others."""
    wrong = 0
    for level in LEVELS[: LEVELS.index(_native.level() or LEVELS[0]) + 1]:
        found = list(outputs(cases, level))
        equal = [
            torch.equal(value.view(torch.uint8), other.view(torch.uint8))
            for (_, value), other in zip(found, expected[TWINS[level]], strict=True)
        ]
        names = sorted({name for (name, _), same in zip(found, equal, strict=True) if not same})
        print(f"{level}: {sum(equal)} of {len(equal)} as {TWINS[level]} on x86", *names, flush=True)
        wrong += len(names)
        os.environ.pop(VARIABLE)
    return wrong


def main() -> None:
    """As the first argument says."""
    what, path = sys.argv[1:]
    if what == "write":
        cases = new_cases()
        expected = {
            level: [value for _, value in outputs(cases, level)] for level in ("portable", "avx2")
        }
        torch.save((cases, expected), path)
    else:
        cases, expected = torch.load(path)
        sys.exit(int(compare(expected, cases) > 0))


if __name__ == "__main__":
    main()
