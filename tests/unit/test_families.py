"""Layouts: found, proved, and refused when the arithmetic is another."""

import pytest
import torch
from torch import nn

from hireconvert.errors import InputError
from hireconvert.families import (
    ffn_parts,
    find_layout,
    is_mixture_of_experts,
    num_layers,
    permute_ffn,
    read_ffn_weights,
)
from tests.tiny import FAMILIES, NEURONS, WIDTH, tiny_model, tokens

GATED = {"gate_proj", "gate_up_proj:0/2"}
UNGATED = {"opt", "opt_post_norm", "gpt2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_found_and_read(family):
    model = tiny_model(family)
    layout = find_layout(model)
    assert (layout["gate"] in GATED) == (family not in UNGATED)
    for index in range(num_layers(model)):
        weights = read_ffn_weights(model, layout, index)
        assert weights.up_FD.shape == weights.down_FD.shape == (NEURONS, WIDTH)
        assert weights.up_FD.dtype == torch.float32 and weights.up_FD.is_contiguous()
        assert (weights.up_bias_F is not None) == (family in UNGATED | {"llama_bias"})
        before = weights.up_FD.clone()
        ffn_parts(model, layout, index).up.module.weight.data.add_(1.0)
        assert torch.equal(weights.up_FD, before)  # a copy, not a view


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layout_is_proved_in_narrow_types(dtype):
    assert find_layout(tiny_model("llama").to(dtype))["up"] == "up_proj"


def scale_output(model, layer, layout):
    native = type(layer).forward

    def forward(hidden_states):
        return native(layer, hidden_states) * 1.01

    layer.forward = forward


def add_input(model, layer, layout):
    native = type(layer).forward

    def forward(hidden_states):
        return native(layer, hidden_states) + hidden_states

    layer.forward = forward


def swap_gate_and_up(model, layer, layout):
    def forward(x):
        return layer.down_proj(layer.gate_proj(x) * layer.act_fn(layer.up_proj(x)))

    layer.forward = forward


def clamp_hidden(model, layer, layout):
    def forward(x):
        return layer.down_proj((layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)).clamp(-1, 1))

    layer.forward = forward


@pytest.mark.parametrize("broken", [scale_output, add_input, swap_gate_and_up, clamp_hidden])
@pytest.mark.parametrize("index", [0, 2])
def test_an_ffn_that_computes_something_else_is_refused(broken, index):
    model = tiny_model("llama")
    layout = find_layout(model)
    broken(model, model.model.layers[index].mlp, layout)
    with pytest.raises(InputError, match=f"layer {index} differs") as caught:
        find_layout(model)
    assert "lossless" in str(caught.value) and caught.value.exit_code == 4


def test_a_stateful_activation_is_refused():
    model = tiny_model("llama")

    class Drifting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Drifting.calls += 1
            return torch.sigmoid(x) * Drifting.calls

    model.model.layers[1].mlp.act_fn = Drifting()
    with pytest.raises(InputError, match="layer 1 differs"):
        find_layout(model)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma2", "phi3"])
def test_a_scaled_last_matrix_elsewhere_in_the_forward_is_refused(family):
    model = tiny_model(family)
    down = ffn_parts(model, find_layout(model), 1).down.module
    down.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(InputError, match="layer 1 differs"):
        find_layout(model)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_something_between_first_matrix_and_last_is_refused(family):
    model = tiny_model(family)
    down = ffn_parts(model, find_layout(model), 0).down.module
    down.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(InputError, match="layer 0 differs"):
        find_layout(model)


def test_experts_convert_their_head_only():
    model = tiny_model("mixtral")
    assert is_mixture_of_experts(model)
    with pytest.raises(InputError, match=r"mixtral.*head only"):
        find_layout(model)
    assert not is_mixture_of_experts(tiny_model("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_neurons_compute_the_same(family):
    model, ids = tiny_model(family), tokens(1, 16)
    layout = find_layout(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = model(ids).logits
        for index in range(num_layers(model)):
            order = torch.randperm(NEURONS, generator=generator)
            native = read_ffn_weights(model, layout, index).up_FD
            permute_ffn(model, layout, index, order)
            assert torch.equal(read_ffn_weights(model, layout, index).up_FD, native[order])
        after = model(ids).logits
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    assert find_layout(model) == layout
