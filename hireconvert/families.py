"""Where the FFN parts of a model lie, and the proof that they are what they seem.

A layout is data: names of modules. `find_layout` takes the first row of the table whose names
exist and whose arithmetic, computed by hand from the weights, equals what the model does with
random input. So a new family is a row here, and a wrong row cannot pass.

Shape suffixes: N rows, D width, F neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hireconvert.errors import InputError
from hireconvert.runtime.hire_ffn import FfnParts

Layout = dict[str, Any]

_KEYS = ("layers", "ffn", "gate", "up", "down", "act")
# layers | FFN module ("" = parts lie in the decoder layer itself) | gate | up | down | activation
_TABLE: tuple[tuple[str, str, str | None, str, str, str], ...] = (
    (
        "layers",
        "mlp",
        "gate_proj",
        "up_proj",
        "down_proj",
        "act_fn",
    ),  # Llama, Mistral, Qwen, Gemma, ...
    (
        "layers",
        "mlp",
        "gate_up_proj:0/2",
        "gate_up_proj:1/2",
        "down_proj",
        "activation_fn",
    ),  # Phi-3
    ("layers", "mlp", None, "fc1", "fc2", "activation_fn"),  # Phi
    ("decoder.layers", "", None, "fc1", "fc2", "activation_fn"),  # OPT
    ("h", "mlp", None, "c_fc", "c_proj", "act"),  # GPT-2
    ("layers", "mlp", None, "c_fc", "c_proj", "act"),  # StarCoder2
    ("layers", "mlp", None, "dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX
    ("layers", "mlp", None, "up_proj", "down_proj", "act_fn"),  # Nemotron and other ungated ones
)
LAYOUTS: tuple[Layout, ...] = tuple(dict(zip(_KEYS, row, strict=True)) for row in _TABLE)

_PROOF_ROWS = 4
# The native forward and ours do the same float32 products, possibly in another order.
_PROOF_TOLERANCE, _PROOF_TOLERANCE_NARROW = 1e-4, 5e-2


@dataclass(frozen=True)
class FfnWeights:
    """One FFN's matrices in float32 on the CPU; row i of each belongs to neuron i."""

    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    down_FD: torch.Tensor
    gate_bias_F: torch.Tensor | None
    up_bias_F: torch.Tensor | None
    act: Callable[[torch.Tensor], torch.Tensor]


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its LM head."""
    return getattr(model, model.base_model_prefix)


def layer_owner(model: PreTrainedModel, layout: Layout, index: int) -> nn.Module:
    """The module that holds the FFN parts of one decoder layer."""
    layers: Any = base_model(model).get_submodule(layout["layers"])
    layer: nn.Module = layers[index]
    return layer.get_submodule(layout["ffn"]) if layout["ffn"] else layer


def ffn_parts(model: PreTrainedModel, layout: Layout, index: int) -> FfnParts:
    """The parts of one decoder layer's FFN."""
    return FfnParts.resolve(layer_owner(model, layout, index), layout)


def num_layers(model: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def is_mixture_of_experts(model: PreTrainedModel) -> bool:
    """Whether any layer routes tokens to experts (only the head of such a model converts)."""
    return any(
        type(module).__name__.endswith(("Experts", "SparseMoeBlock", "MoE"))
        for module in model.modules()
    )


def _names_fit(model: PreTrainedModel, layout: Layout) -> bool:
    try:
        for index in range(num_layers(model)):
            parts = ffn_parts(model, layout, index)
            if not all(part.known for part in parts.matrices()):
                return False
    except (AttributeError, IndexError, TypeError):
        return False
    return True


def read_ffn_weights(model: PreTrainedModel, layout: Layout, index: int) -> FfnWeights:
    """Float32 copies of one layer's FFN weights."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return (
            None
            if tensor is None
            else tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        )

    parts = ffn_parts(model, layout, index)
    gate = parts.gate
    up_FD, down_FD = copy(parts.up.weight_out_in()), copy(parts.down_FD())
    assert up_FD is not None and down_FD is not None
    return FfnWeights(
        gate_FD=None if gate is None else copy(gate.weight_out_in()),
        up_FD=up_FD,
        down_FD=down_FD,
        gate_bias_F=None if gate is None else copy(gate.bias()),
        up_bias_F=copy(parts.up.bias()),
        act=parts.act,
    )


def hidden_activations(weights: FfnWeights, x_ND: torch.Tensor) -> torch.Tensor:
    """act(gate x) * up x, or act(up x) without a gate: float32 [N, F]."""
    up_NF = nn.functional.linear(x_ND.float(), weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        return weights.act(up_NF)
    return (
        weights.act(nn.functional.linear(x_ND.float(), weights.gate_FD, weights.gate_bias_F))
        * up_NF
    )


def _caught_io(model: PreTrainedModel, layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output [N, D] of every FFN in one forward over random embeddings.

    Hooks sit inside the model's own forward, so an FFN that is scaled, gated or bypassed
    elsewhere in its module shows.
    """
    caught: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers(model))]
    hooks = []
    for index, store in enumerate(caught):
        owner, parts = layer_owner(model, layout, index), ffn_parts(model, layout, index)
        first, last = (owner, owner) if layout["ffn"] else (parts.up.module, parts.down.module)

        def before(_m: nn.Module, args: Any, kwargs: Any, store: Any = store) -> None:
            store["x"] = (args or tuple(kwargs.values()))[0]

        def after(_m: nn.Module, _args: Any, out: Any, store: Any = store) -> None:
            store["y"] = out

        hooks.append(first.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(last.register_forward_hook(after))
    embedding: Any = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, _PROOF_ROWS, width, generator=generator).to(model.device, model.dtype)
    try:
        base_model(model)(inputs_embeds=embeds, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (
            store["x"].reshape(_PROOF_ROWS, -1).float().cpu(),
            store["y"].reshape(_PROOF_ROWS, -1).float().cpu(),
        )
        for store in caught
    ]


@torch.no_grad()
def _proof_errors(model: PreTrainedModel, layout: Layout) -> list[float]:
    """Largest relative difference per layer between the FFN as it runs and as the layout says."""
    errors = []
    for index, (x_ND, y_ND) in enumerate(_caught_io(model, layout)):
        weights = read_ffn_weights(model, layout, index)
        expected_ND = hidden_activations(weights, x_ND) @ weights.down_FD
        bias = ffn_parts(model, layout, index).down.bias()
        if bias is not None:
            expected_ND = expected_ND + bias.detach().float().cpu()
        scale = y_ND.abs().max().clamp(min=1e-30)
        errors.append(float((expected_ND - y_ND).abs().max() / scale))
    return errors


def find_layout(model: PreTrainedModel) -> Layout:
    """The layout whose parts exist and prove, numerically, to be the model's FFN in every layer.

    `model` must be in evaluation mode. Raises InputError saying what did not match.
    """
    tolerance = _PROOF_TOLERANCE if model.dtype == torch.float32 else _PROOF_TOLERANCE_NARROW
    tried = []
    for layout in LAYOUTS:
        if not _names_fit(model, layout):
            continue
        errors = _proof_errors(model, layout)
        if max(errors) <= tolerance:
            return dict(layout)
        worst = max(range(len(errors)), key=errors.__getitem__)
        tried.append(
            f"{layout['gate']}/{layout['up']}/{layout['down']}: "
            f"layer {worst} differs by {errors[worst]:.2g}"
        )
    kind = model.config.model_type
    if tried:
        raise InputError(
            f"model_type '{kind}': the FFN has known names but does not compute "
            f"act(gate x) * up x -> down ({'; '.join(tried)}). "
            "Convert the head only (recipe lossless)."
        )
    raise InputError(
        f"model_type '{kind}': no FFN of the form act(gate x) * up x -> down or act(up x) -> down "
        "was found in its layers. Convert the head only (recipe lossless)."
    )


@torch.no_grad()
def permute_ffn(
    model: PreTrainedModel, layout: Layout, index: int, permutation_F: torch.Tensor
) -> None:
    """Reorder the neurons of one layer in place: gate and up rows, down columns, biases."""
    parts = ffn_parts(model, layout, index)
    for part in (parts.gate, parts.up):
        if part is None:
            continue
        weight = part.weight_out_in()
        weight.copy_(weight[permutation_F])
        bias = part.bias()
        if bias is not None:
            bias.copy_(bias[permutation_F])
    down_FD = parts.down_FD()
    down_FD.copy_(down_FD[permutation_F])


def permuted(weights: FfnWeights, order_F: torch.Tensor) -> FfnWeights:
    """The same FFN with its neurons in another order (old numbers, int64 [F])."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[order_F].contiguous()

    return replace(
        weights,
        gate_FD=moved(weights.gate_FD),
        up_FD=weights.up_FD[order_F].contiguous(),
        down_FD=weights.down_FD[order_F].contiguous(),
        gate_bias_F=moved(weights.gate_bias_F),
        up_bias_F=moved(weights.up_bias_F),
    )
