"""Attention matrices rounded to 8 or 4 bits, so that fewer bytes hold them.

The rounded values replace the dense ones in the checkpoint, so every path computes the same model;
the native kernels find the codes again and read those (docs/format.md, `attention`). No scale is
stored: of 8 bits it is the largest weight of a block over 127, of 4 bits a number so short that
the weights tell it, and both survive rounding to bfloat16. Codes of 4 bits are fitted to what the
matrices receive over the calibration text; 8 bits are rounded plainly, which costs little enough.

Shape suffixes: M rows, D columns, W windows, T tokens of a window.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hireconvert.errors import InputError
from hireconvert.families import Layout, base_model, ffn_parts, num_layers
from hireconvert.lowbit import Inputs, received
from hireconvert.quantize import decode_codes, feedback_codes, round_codes, short_grid

TOP_CODE = 127  # of 8 bits, which lie around zero


def attention_matrices(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Names, below a decoder layer, of the linear layers beside its FFN that every layer has.

    Raises InputError when there are none.
    """
    names: list[str] | None = None
    for index in range(num_layers(model)):
        own = {id(part.module) for part in ffn_parts(model, layout, index).matrices()}
        found = [
            name
            for name, module in decoder_layer(model, layout, index).named_modules()
            if isinstance(module, nn.Linear) and id(module) not in own and "attn" in name
        ]
        names = found if names is None else [name for name in names if name in found]
    if not names:
        raise InputError(
            f"model_type {model.config.model_type!r}: no linear layers are known in its "
            "attention. Leave it as it is (--set attention=null)."
        )
    return names


def decoder_layer(model: PreTrainedModel, layout: Layout, index: int) -> nn.Module:
    """One decoder layer."""
    layers: Any = base_model(model).get_submodule(layout["layers"])
    layer: nn.Module = layers[index]
    return layer


def fitted_names(attention: Mapping[str, Any] | None) -> list[str]:
    """The matrices of `config.hire.attention` that are fitted to their inputs: those of 4 bits."""
    return [name for name, bits in (attention or {"matrices": {}})["matrices"].items() if bits == 4]


# --------------------------------------------------------------------------- rounding


@torch.no_grad()
def round_attention(
    model: PreTrainedModel,
    layout: Layout,
    attention: Mapping[str, Any],
    fitted: Callable[[int], Mapping[str, torch.Tensor]] = lambda index: {},
) -> None:
    """Round the matrices that `config.hire.attention` names, in every layer, in place.

    `fitted` gives those of a layer that are rounded already; others are rounded plainly.
    """
    for index in range(num_layers(model)):
        layer, given = decoder_layer(model, layout, index), fitted(index)
        for name, bits in attention["matrices"].items():
            weight: Any = layer.get_submodule(name).weight
            rounded_MD = given.get(name)
            if rounded_MD is None:
                rounded_MD = round_rows(weight.float(), attention["block"], bits)
            weight.copy_(rounded_MD)


def round_rows(weight_MD: torch.Tensor, block: int, bits: int = 8) -> torch.Tensor:
    """float32 [M, D]: every weight at the nearest level of its block of a row.

    8 bits: of 255 around zero; 4 bits: of the sixteen normal levels, scales as `short_grid` has
    them.
    """
    width = weight_MD.shape[1]
    if bits == 4:
        grid = short_grid(weight_MD, block, torch.ones(width))
        return decode_codes(round_codes(weight_MD, grid), grid)
    padded = nn.functional.pad(weight_MD, (0, -width % block)).unflatten(1, (-1, block))
    scale = (padded.abs().amax(-1, keepdim=True) / TOP_CODE).clamp_min(torch.finfo().tiny)
    return ((padded / scale).round() * scale).flatten(1)[:, :width]


def fitted_rows(weight_MD: torch.Tensor, block: int, moment_DD: torch.Tensor) -> torch.Tensor:
    """float32 [M, D]: levels of 4 bits with least error of W x under the inputs' second moment."""
    grid = short_grid(weight_MD, block, moment_DD.diagonal())
    return decode_codes(feedback_codes(weight_MD, grid, moment_DD), grid)


# --------------------------------------------------------------------------- fitting


@torch.no_grad()
def fit_attention(
    model: PreTrainedModel,
    layout: Layout,
    attention: Mapping[str, Any],
    ids_WT: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(layer, its matrices of 4 bits by name, float32) one layer after the other.

    `progress` is called with steps done and steps in all: windows, then layers. Raises InputError
    where a weight or what it receives is not finite.
    """
    names, count = fitted_names(attention), num_layers(model)
    total = len(ids_WT) + count
    modules = {
        (index, name): decoder_layer(model, layout, index).get_submodule(name)
        for index in range(count)
        for name in names
    }
    inputs = received(model, modules, ids_WT, lambda done: progress(done, total))
    for index in range(count):
        fitted = {}
        for name in names:
            weight: Any = modules[index, name].weight
            moment_DD = _moment(inputs, index, name)
            fitted[name] = fitted_rows(weight.cpu().float(), attention["block"], moment_DD)
        yield index, fitted
        progress(len(ids_WT) + index + 1, total)


def _moment(inputs: Mapping[tuple[int, str], Inputs], index: int, name: str) -> torch.Tensor:
    """What a matrix is fitted to. Raises InputError where that is nothing, or not finite."""
    if (index, name) not in inputs:
        raise InputError(
            f"layer {index}: {name} is not called as the model runs, so its codes cannot be "
            f"fitted; keep it in 8 bits (--set attention.int8=[{name.rpartition('.')[2]}, ...])"
        )
    moment_DD = inputs[index, name].moment_DD
    if not bool(torch.isfinite(moment_DD).all()):
        raise InputError(
            f"layer {index}: what {name} receives over the calibration text is not finite; "
            "give attention.weights=int8"
        )
    return moment_DD
