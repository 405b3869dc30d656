"""Attention matrices that lie on an 8-bit grid, found again as codes for the native kernels.

`config.hire.attention` (docs/format.md) says which and in what blocks; the dense weights hold the
rounded values, so that the PyTorch path computes the same. Shape suffixes: O outputs, I inputs,
G blocks of a row.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

TOP_CODE = 127
WHOLE_BLOCKS = 32  # what the kernels take whole


def with_codes(base: Any, blocks: list[Any], steps: Any, names: Mapping[str, str]) -> list[Any]:
    """The blocks of a model's layers with the attention's matrices as codes where they can be.

    `names` are the attention's modules by their names in a block; `steps` makes matrices.
    """
    attention = base.config.hire.get("attention")
    if attention is None:
        return blocks
    done = []
    for layer, block in zip(base.layers, blocks, strict=True):
        coded = {
            key: _coded(getattr(layer.self_attn, name), attention["block"], steps)
            for key, name in names.items()
            if f"self_attn.{name}" in attention["matrices"]
        }
        found = {key: matrix for key, matrix in coded.items() if matrix is not None}
        done.append(replace(block, matrices={**block.matrices, **found}))
    return done


@torch.no_grad()
def _coded(module: Any, block: int, steps: Any) -> Any:
    """The matrix as codes and scales, None where its weights or blocks do not allow it."""
    weight_OI = module.weight.detach().float()
    inputs = weight_OI.shape[1]
    if block % WHOLE_BLOCKS and block < inputs:
        return None
    block = min(block, inputs)
    blocks_OGB = F.pad(weight_OI, (0, -inputs % block)).unflatten(1, (-1, block))
    scale_OG = (blocks_OGB.abs().amax(-1) / TOP_CODE).clamp_min(torch.finfo().tiny)
    code_OGB = (blocks_OGB / scale_OG[..., None]).round()
    value_OI = (code_OGB * scale_OG[..., None]).flatten(1)[:, :inputs]
    if not torch.equal(value_OI.to(module.weight.dtype), module.weight):
        return None  # trained or merged since: no longer on the grid
    code_OI = code_OGB.flatten(1)[:, :inputs].to(torch.int8).contiguous()
    return steps.Matrix(code_OI, module.bias, scale_OG, block)
