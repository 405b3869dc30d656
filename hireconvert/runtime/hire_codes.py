"""Attention matrices that lie on a grid of 8 or 4 bits, found again as codes for the kernels.

`config.hire.attention` (docs/format.md) says which, of how many bits and in what blocks; the dense
weights hold the rounded values, so that the PyTorch path computes the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any


def coded_names(base: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Those of `names`, the attention's modules by their names in a block, that lie on a grid."""
    attention = base.config.hire.get("attention")
    if attention is None:
        return {}
    return {k: name for k, name in names.items() if f"self_attn.{name}" in attention["matrices"]}


def with_codes(base: Any, blocks: list[Any], steps: Any, names: Mapping[str, str]) -> list[Any]:
    """The blocks of a model's layers with the attention's matrices as codes where they can be.

    `steps` is the library's module; matrices that were trained or merged since stay as they are.
    """
    keys = coded_names(base, names)
    if not keys:
        return blocks
    attention = base.config.hire["attention"]
    bits = [attention["matrices"][f"self_attn.{name}"] for name in keys.values()]
    given = [block.matrices[key] for block in blocks for key in keys]
    codes = iter(steps.coded(given, attention["block"], bits * len(blocks)))
    return [
        replace(block, matrices={**block.matrices, **{key: next(codes) for key in keys}})
        for block in blocks
    ]
