"""Neurons that are left out but count by estimate, against the twin of tests/ffn_reference.py."""

from typing import Any

import pytest
import torch

from tests.ffn_reference import (
    TOLERANCE,
    VARIANTS,
    check_graph,
    gathered_rows,
    masked_output,
    output_with_rest,
    reference_masks,
    relative,
)
from tests.tiny import (
    FAMILIES,
    WIDTH,
    base_of,
    hire_model,
    layer_inputs,
    sparse_layers,
    stepwise,
    tiny_model,
    tokens,
)

RESTS: dict[str, dict[str, Any]] = {
    "2_bits": {"unselected": {"bits": 2, "block": 12}},
    "3_bits_symmetric": {"unselected": {"bits": 3, "symmetric": True}},
    "8_bits_long_block": {"unselected": {"bits": 8, "block": 1000}},
    "kept_are_candidates": {"over_select": 1.0, "unselected": {}},
    "nothing_to_choose": {"over_select": 2.0, "unselected": {}},
    "error": {"score": "error", "unselected": {}, "over_select": 1.0},
    "error_top_k": {"score": "error", "unselected": {"block": 16}, "predictor": {"bits": 3}},
    "error_groups_common": {
        "score": "error",
        "unselected": {"bits": 2, "block": 16},
        "group_size": 4,
        "common_path": 0.125,
        "keep": "candidates",
    },
    "error_threshold": {
        "score": "error",
        "unselected": {"block": 16},
        "selection": "threshold",
        "keep": "candidates",
        "over_select": 1.6,
    },
} | {
    name: {**settings, "unselected": {"block": 16}}
    for name, settings in VARIANTS.items()
    if not settings.get("predictor", {}).get("group_scores")
}


@pytest.mark.parametrize("variant", RESTS)
def test_neurons_left_out_count_by_estimate(variant):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.4, **RESTS[variant]})
    inputs = layer_inputs(native)
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = inputs[index][:24]
        expected = output_with_rest(model, index, x_ND, layer)
        with torch.no_grad():
            twin = layer.masked(x_ND)
        assert relative(twin, expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE
        keep_NF, _ = reference_masks(model, index, x_ND, layer)
        assert int(layer.counts[2]) == 2 * int(keep_NF.sum())  # they are not counted as kept
        without = masked_output(model, index, x_ND, keep_NF)
        dense = masked_output(model, index, x_ND, torch.tensor(True))
        assert relative(without, expected) > 100 * TOLERANCE
        assert (expected - dense).norm() < (without - dense).norm()


def test_expected_errors_name_better_candidates_than_sizes():
    native = tiny_model("llama")
    inputs = layer_inputs(native)
    off = {}
    for score in ("norm", "error"):
        settings = {"score": score, "unselected": {"block": 16}, "predictor": {"bits": 3}}
        model = hire_model(native, ffn={"keep_fraction": 0.3, "over_select": 1.0, **settings})
        off[score] = 0.0
        for index, layer in enumerate(sparse_layers(model)):
            with torch.no_grad():
                gap_ND = layer.masked(inputs[index]) - layer.dense(inputs[index])
            off[score] += float(gap_ND.square().sum())
    assert 0 < off["error"] < 0.95 * off["norm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_left_out_count_in_every_family(family):
    native = tiny_model(family)
    model = hire_model(native, ffn={"keep_fraction": 0.4, "unselected": {}})
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = layer_inputs(native)[index][:24]
        expected = output_with_rest(native, index, x_ND, layer)
        with torch.no_grad():
            assert relative(layer.masked(x_ND), expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE


@pytest.mark.parametrize("part", ["down_planes", "down_scale", "down_offset"])
def test_every_tensor_of_the_copy_counts(part):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.4, "unselected": {}})
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = layer_inputs(native)[index][:24]
        with torch.no_grad():
            before = layer.masked(x_ND)
            layer.predictor_tensors[part] = layer.predictor_tensors[part].roll(1, dims=-2)
            layer.prepared = None
            layer.prepare()
            assert relative(layer.masked(x_ND), before) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llama", "llama_bias", "opt", "phi3", "gpt2"])
def test_good_estimates_of_all_left_out_give_the_dense_output(family):
    native = tiny_model(family)
    exact = {"kind": "lr", "rank": WIDTH}
    settings = {"keep_fraction": 0.1, "unselected": {"bits": 8, "block": 8}, "predictor": exact}
    model = hire_model(native, ffn=settings)
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = layer_inputs(native)[index][:24]
        dense = masked_output(native, index, x_ND, torch.tensor(True))
        assert relative(gathered_rows(layer, x_ND), dense) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama_bias", "opt", "gpt2"])
def test_neurons_left_out_count_in_every_dtype(family, dtype):
    native = tiny_model(family)
    exact = {"kind": "lr", "rank": WIDTH}
    settings = {"keep_fraction": 0.3, "unselected": {"bits": 8, "block": 8}, "predictor": exact}
    model = hire_model(native, ffn=settings).to(dtype)
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = layer_inputs(native)[index][:8]
        dense = masked_output(native, index, x_ND, torch.tensor(True))
        with torch.no_grad():
            twin = layer.masked(x_ND.to(dtype))
        row = gathered_rows(layer, x_ND.to(dtype))
        assert twin.dtype == row.dtype == dtype
        least = 0.01 if dtype == torch.float64 else 0.03
        assert relative(twin, dense) < least and relative(row, dense) < least


def test_rows_that_are_to_run_dense_have_nothing_left_out():
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.3, "unselected": {}})
    layer, x_ND = sparse_layers(model)[0], layer_inputs(native)[0][:6]
    dense_N = torch.tensor([True, False, True, False, True, False])
    with torch.no_grad():
        mixed = layer.masked(x_ND, dense_N)
        assert torch.equal(mixed[dense_N], layer.dense(x_ND)[dense_N])
        assert torch.equal(mixed[~dense_N], layer.masked(x_ND)[~dense_N])


def test_a_row_that_keeps_nothing_is_all_estimates():
    native = tiny_model("llama_bias")
    for keep in ("top_k", "candidates"):
        ffn = {"selection": "threshold", "keep": keep, "over_select": 1.5, "unselected": {}}
        model = hire_model(native, ffn=ffn)
        layer, x_ND = sparse_layers(model)[0], layer_inputs(native)[0][:6]
        layer.spec["selection"] = {**layer.spec["selection"], "level": 3.0e38}
        expected = output_with_rest(model, 0, x_ND, layer)
        with torch.no_grad():
            twin = layer.masked(x_ND)
        assert int(layer.counts[2]) == 0
        assert relative(twin, expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE


def test_gradients_flow_through_what_candidates_left_out_add():
    """Also where the copy was made under inference_mode, as a generation before training does."""
    native = tiny_model("llama")
    settings = {"keep_fraction": 0.25, "over_select": 2.0}
    norms = []
    for ffn in (settings, {**settings, "unselected": {}}):
        model = hire_model(native, ffn=ffn)
        with torch.inference_mode():
            stepwise(model, tokens(1, 3))
        layer, x_ND = sparse_layers(model)[0], layer_inputs(native)[0][:6]
        layer.masked(x_ND).square().sum().backward()
        grad = base_of(model).layers[0].mlp.up_proj.weight.grad
        norms.append(int((grad.abs().sum(1) > 0).sum()))
    assert norms[0] < norms[1]


@pytest.mark.parametrize("variant", ["loud_inputs", *(v for v in RESTS if "selection" in RESTS[v])])
def test_a_graph_adds_what_the_row_adds(variant):
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5, **RESTS[variant]})
    check_graph(sparse_layers(model)[1], layer_inputs(tiny_model("llama"))[1][:16])
