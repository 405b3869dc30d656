"""FFN weights rounded so that fewer bytes hold them: refined rows, or their copies alone.

`attention.py` has the other matrices. The rounded values replace the dense ones in the checkpoint,
so every path computes the same model; the native kernels find the codes again and read those.
Refined rows are the 4-bit copies that the predictor and `ffn.unselected` read anyway, and 4 bits
more of what these leave:

    W = copy + low_scale * (code - 7.5)      all in the copy's own scaling of the columns

Copied rows are the copies, by which every neuron then counts.

Shape suffixes: M rows, D columns, F neurons, P rows of gate and up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hireconvert.families import FfnWeights, Layout, ffn_parts
from hireconvert.quantize import Grid, GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.runtime.hire_config import LOW_BITS
from hireconvert.runtime.hire_predict import decode_blocks, decode_down, is_copied, is_refined


def low_scales(
    weights: FfnWeights, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors `low_scale` and `down_low_scale` of docs/format.md; none for stored rows."""
    if not is_refined(spec):
        return {}
    first_PD = torch.cat([m for m in (weights.gate_FD, weights.up_FD) if m is not None])
    return {
        name: fit_grid(rest_MD, form).scale
        for name, (rest_MD, form) in _left_by_copies(first_PD, weights.down_FD, spec, tensors)
    }


@torch.no_grad()
def round_ffn(
    model: PreTrainedModel,
    layout: Layout,
    index: int,
    spec: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Round one layer's matrices in place: to its copies, or these and grids of `low_scales`."""
    parts = ffn_parts(model, layout, index)
    first = [part.weight_out_in() for part in (parts.gate, parts.up) if part is not None]
    down_FD = parts.down_FD()
    if is_copied(spec):
        first_PD, new_FD = copied_values(down_FD.shape[1], spec, tensors)
    else:
        first_PD = torch.cat([matrix.float() for matrix in first])
        first_PD, new_FD = refined_values(first_PD, down_FD.float(), spec, tensors)
    down_FD.copy_(new_FD)
    for matrix, new_FD in zip(first, first_PD.chunk(len(first)), strict=True):
        matrix.copy_(new_FD)


def copied_values(
    width: int, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the copies stand for, float32: gate and up [P, D], and down [F, D]."""
    first_PD = decode_blocks(tensors, spec["predictor"], width) / tensors["column_scale"].float()
    return first_PD, decode_down(tensors, spec["unselected"], width)


def refined_values(
    first_PD: torch.Tensor,
    down_FD: torch.Tensor,
    spec: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, and down, float32, at the copies and the grids of `low_scales`."""
    rounded = []
    for name, (rest_MD, form) in _left_by_copies(first_PD, down_FD, spec, tensors):
        grid = Grid(form, tensors[name], None)
        rounded.append(decode_codes(round_codes(rest_MD, grid), grid) - rest_MD)
    change_PD, change_FD = rounded
    return first_PD + change_PD / tensors["column_scale"].float(), down_FD + change_FD


def _left_by_copies(
    first_PD: torch.Tensor,
    down_FD: torch.Tensor,
    spec: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> list[tuple[str, tuple[torch.Tensor, GridFormat]]]:
    """(name of the scales, (what the copies leave, float32 [rows, D]; its grid)) of both copies."""
    width = first_PD.shape[1]
    left = {
        "low_scale": first_PD * tensors["column_scale"].float()
        - decode_blocks(tensors, spec["predictor"], width),
        "down_low_scale": down_FD - decode_down(tensors, spec["unselected"], width),
    }
    blocks = (spec["predictor"]["block"], spec["unselected"]["block"])
    forms = [GridFormat(LOW_BITS, block, symmetric=True) for block in blocks]
    return [(name, (rest, form)) for (name, rest), form in zip(left.items(), forms, strict=True)]
