"""Refined FFN rows and 8-bit attention: what is rounded, how far, and that it can be found again.

Shape suffixes: M rows, D columns, F neurons.
"""

import copy
from typing import Any

import pytest
import torch

from hireconvert.attention import (
    attention_matrices,
    decoder_layer,
    fit_attention,
    fitted_names,
    round_attention,
    round_rows,
)
from hireconvert.errors import InputError, UsageError
from hireconvert.families import find_layout, read_ffn_weights
from hireconvert.quantize import GridFormat, encode_down
from hireconvert.recipe import load_recipe
from hireconvert.rounding import low_scales
from hireconvert.runtime.hire_config import down_tensors
from hireconvert.runtime.hire_predict import decode_blocks, decode_down
from hireconvert.scoring import hidden, hidden_moment
from tests.tiny import base_of, hire_model, tiny_model, tokens

FORM = {"bits": 4, "block": 16, "symmetric": False}
REFINED: dict[str, Any] = {"predictor": FORM, "unselected": FORM, "rows": "refined"}


@pytest.fixture(scope="module")
def native() -> Any:
    return tiny_model("llama")


def refined(native: Any, dtype: torch.dtype = torch.float32) -> Any:
    return hire_model(native.to(dtype), ffn=REFINED)


def test_refined_weights_are_eight_bits_near_the_source(native: Any) -> None:
    model = refined(native)
    for index, layer in base_of(model).hire_layers.items():
        source = read_ffn_weights(native, model.config.hire["layout"], index)
        parts = layer.parts
        pairs = [
            (source.gate_FD, parts.gate.weight_out_in()),
            (source.up_FD, parts.up.weight_out_in()),
            (source.down_FD, parts.down_FD()),
        ]
        for dense_FD, rounded_FD in pairs:
            assert dense_FD is not None
            blocks = dense_FD.unflatten(1, (-1, 16))
            span = (blocks.amax(-1) - blocks.amin(-1)).repeat_interleave(16, dim=1)
            error = (rounded_FD - dense_FD).abs()
            assert error.max() > 0
            # 16 levels of 16, and a margin for codes that error feedback put off the nearest.
            assert (error <= span / 15 / 6).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_found_again_from_the_stored_weights(native: Any, dtype: torch.dtype) -> None:
    model = refined(copy.deepcopy(native), dtype)
    for layer in base_of(model).hire_layers.values():
        tensors, width = layer.predictor_tensors, layer.parts.up.weight_out_in().shape[1]
        first = torch.cat([p.weight_out_in() for p in (layer.parts.gate, layer.parts.up)]).float()
        copies = {
            "low_scale": (
                first * tensors["column_scale"],
                decode_blocks(tensors, layer.spec["predictor"], width),
            ),
            "down_low_scale": (
                layer.parts.down_FD().float(),
                decode_down(tensors, layer.spec["unselected"], width),
            ),
        }
        for name, (weight_MD, copy_MD) in copies.items():
            step_MD = tensors[name].float().repeat_interleave(16, dim=1)
            code_MD = (weight_MD - copy_MD) / step_MD + 7.5
            off = (code_MD - code_MD.round()).abs()
            # Rounding to bfloat16 moves the largest weights of a block by up to half a step.
            assert off.max() < 1e-2 if dtype == torch.float32 else off.mean() < 0.15
            assert code_MD.min() > -0.6 and code_MD.max() < 15.6


def test_stored_rows_have_no_scales(native: Any) -> None:
    model = hire_model(native, ffn={"predictor": FORM, "unselected": FORM})
    layer = base_of(model).hire_layers[0]
    weights = read_ffn_weights(native, find_layout(native), 0)
    assert low_scales(weights, layer.spec, layer.predictor_tensors) == {}
    assert "rows" not in layer.spec


COPIES: dict[str, Any] = {**REFINED, "rows": "copies", "keep_fraction": 1.0, "score": "error"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt2"])
def test_weights_become_their_copies(family: str, dtype: torch.dtype) -> None:
    source = tiny_model(family).to(dtype)
    model = hire_model(source, ffn=COPIES)
    layout = model.config.hire["layout"]
    for index, layer in base_of(model).hire_layers.items():
        parts, tensors, width = layer.parts, layer.predictor_tensors, layer.parts.down_FD().shape[1]
        gates = [part for part in (parts.gate, parts.up) if part is not None]
        first_MD = torch.cat([part.weight_out_in() for part in gates])
        copy_MD = decode_blocks(tensors, layer.spec["predictor"], width) / tensors["column_scale"]
        assert torch.equal(first_MD, copy_MD.to(dtype))
        down_FD = decode_down(tensors, layer.spec["unselected"], width)
        assert torch.equal(parts.down_FD(), down_FD.to(dtype))
        # Estimates are the layer's own values: nothing is subtracted, and no error corrected.
        weights = read_ffn_weights(source, layout, index)
        biases = [weights.gate_bias_F] if parts.gate is not None else []
        zeros_F = torch.zeros(layer.spec["num_neurons"])
        bias_M = torch.cat([zeros_F if b is None else b for b in (*biases, weights.up_bias_F)])
        assert torch.equal(tensors["bias"], bias_M) and not tensors["mean"].any()
        assert "soft" not in tensors and layer.spec["score"] == "norm"
        assert layer.spec["num_kept"] == layer.spec["num_candidates"] == layer.spec["num_neurons"]


@torch.no_grad()
def test_copies_of_down_err_least_under_the_hidden_values(native: Any) -> None:
    weights = read_ffn_weights(native, find_layout(native), 0)
    x_ND = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x_ND += 2 * x_ND[:, :4] @ x_ND[:4]  # a few directions are loud, as in models
    h_NF = hidden(weights, x_ND)
    moment_FF = hidden_moment(weights, x_ND)
    assert torch.allclose(moment_FF, h_NF.T @ h_NF / 400, atol=1e-5)
    for form in (GridFormat(4, 16, True, levels="normal"), GridFormat(4, 12, False)):
        spec = {"bits": 4, "block": form.block, "symmetric": form.symmetric, "levels": form.levels}
        errors = []
        for moment in (None, moment_FF):
            tensors = encode_down(weights.down_FD, form, moment)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            assert shapes == down_tensors(spec, *weights.down_FD.shape)
            off_FD = decode_down(tensors, spec, 32) - weights.down_FD
            errors.append(float((h_NF @ off_FD).norm()))
        assert errors[1] < 0.8 * errors[0]


def test_rows_round_to_the_nearest_level_and_stay_there() -> None:
    weight_MD = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    weight_MD[2, :16] = 0
    rounded_MD = round_rows(weight_MD, 16)
    for start in range(0, 50, 16):
        block, was = rounded_MD[:, start : start + 16], weight_MD[:, start : start + 16]
        step = was.abs().amax(1, keepdim=True) / 127
        assert ((block - was).abs() <= step * 0.5001).all()
        assert torch.equal(block.abs().amax(1), was.abs().amax(1))  # so the grid is found again
    assert torch.equal(round_rows(rounded_MD, 16), rounded_MD)
    stored = rounded_MD.bfloat16().float()
    codes = stored.unflatten(0, (7,))[:, :16] / (weight_MD[:, :16].abs().amax(1, True) / 127)
    again = round_rows(stored, 16)[:, :16] / (stored[:, :16].abs().amax(1, True) / 127)
    keep = weight_MD[:, :16].abs().amax(1) > 0
    assert torch.equal(codes[keep].round(), again[keep].round())


def test_attention_matrices_are_those_beside_the_ffn(native: Any) -> None:
    layout = find_layout(native)
    names = attention_matrices(native, layout)
    assert names == [f"self_attn.{name}_proj" for name in "qkvo"]
    rounded = copy.deepcopy(native)
    round_attention(rounded, layout, {"block": 16, "matrices": dict.fromkeys(names, 8)})
    before, after = native.state_dict(), rounded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name and name.endswith("weight")}


@torch.no_grad()
def test_short_codes_are_fitted_to_what_matrices_receive(native: Any) -> None:
    layout, model = find_layout(native), copy.deepcopy(native)
    names = attention_matrices(native, layout)
    attention = {"block": 32, "matrices": dict(zip(names, (4, 8, 4, 4), strict=True))}
    assert fitted_names(attention) == [names[0], *names[2:]]
    ids_WT = tokens(4, 60)
    layers = dict(fit_attention(native, layout, attention, ids_WT))
    round_attention(model, layout, attention, layers.__getitem__)
    received: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        decoder_layer(native, layout, index)
        .get_submodule(name)
        .register_forward_pre_hook(lambda _, args, n=name: received[n].append(args[0]))
        for index in range(len(layers))
        for name in names
    ]
    native(ids_WT)
    for hook in hooks:
        hook.remove()
    for index, fitted in layers.items():
        assert list(fitted) == fitted_names(attention)
        for name in names:
            was = decoder_layer(native, layout, index).get_submodule(name).weight
            now = decoder_layer(model, layout, index).get_submodule(name).weight
            plain = round_rows(was, 32, attention["matrices"][name])
            x_ND = received[name][index].flatten(0, 1)
            off, plainly_off = ((x_ND @ (w - was).T).norm() for w in (now, plain))
            assert off < 0.95 * plainly_off if name in fitted else torch.equal(now, plain)


@torch.no_grad()
def test_a_matrix_that_is_not_called_cannot_be_fitted(monkeypatch: Any) -> None:
    native = tiny_model("llama")
    layout = find_layout(native)
    attention = {"block": 32, "matrices": {"self_attn.q_proj": 4}}
    q = decoder_layer(native, layout, 0).get_submodule("self_attn.q_proj")
    monkeypatch.setattr(q, "_call_impl", q.forward)  # as code that uses its weight alone
    with pytest.raises(InputError, match=r"layer 0: self_attn\.q_proj is not called"):
        dict(fit_attention(native, layout, attention, tokens(1, 30)))


def test_attention_without_linear_layers_is_refused() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(InputError, match="attention=null"):
        attention_matrices(gpt2, find_layout(gpt2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["ffn.unselected=null"], "refined needs unselected.bits 4"),
        (["ffn.unselected.bits=3"], "refined needs unselected.bits 4"),
        (["ffn.predictor.bits=3"], "kind q of 3 bits"),
        (["ffn.predictor.kind=qlr"], "kind qlr of 4 bits"),
        (["ffn.predictor.input_keep=0.5"], "input_keep 0.5"),
    ],
)
def test_refined_rows_need_copies(changes: list[str], said: str) -> None:
    base = ["ffn.unselected={bits: 4}", "ffn.rows=refined"]
    with pytest.raises(UsageError, match=said):
        load_recipe("tiny-ci", [*base, *changes])
    assert load_recipe("tiny-ci", base).rounds_weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["ffn.keep_fraction=0.5"], r"ffn.keep_fraction: 0.5, but .* none is selected; give 1"),
        (["ffn.keep_fraction=[1, 1]"], "ffn.keep_fraction"),
        (["ffn.group_size=4"], "ffn.group_size: 4, but .* give 1"),
        (["ffn.common_path=0.25"], "ffn.common_path: 0.25, but .* give 0"),
        (["ffn.budget={}"], "ffn.budget: mode search, but .* give null"),
        (["ffn.predictor.soften=true"], "ffn.predictor.soften: true, but .* give false"),
        (["ffn.unselected=null"], "copies needs unselected.bits 4: its copy of down is what"),
        (["ffn.predictor.input_keep=0.5"], "copies needs predictor to be kind q of 4 bits"),
        (["finetune={}"], "finetune: trains a model that selects.*finetune: null"),
    ],
)
def test_rows_of_copies_leave_nothing_to_select(changes: list[str], said: str) -> None:
    base = ["ffn.rows=copies", "ffn.keep_fraction=1"]
    with pytest.raises(UsageError, match=said):
        load_recipe("fast", [*base, *changes])
    recipe = load_recipe("fast", [*base, "ffn.over_select=2", "ffn.budget={mode: uniform}"])
    assert recipe.rounds_weights


def test_attention_needs_an_ffn_that_selects() -> None:
    with pytest.raises(UsageError, match="beside an FFN that selects"):
        load_recipe("lossless", ["attention={}"])
