"""Sparse FFN against references computed here, apart from the runtime's own selection code."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hireconvert.families import base_model, ffn_parts, find_layout, num_layers, read_ffn_weights
from hireconvert.families import hidden_activations as dense_hidden
from tests.ffn_reference import (
    TOLERANCE,
    VARIANTS,
    check_graph,
    down_bias,
    gathered_rows,
    lowest_first,
    masked_output,
    reference_masks,
    relative,
)
from tests.tiny import (
    FAMILIES,
    NEURONS,
    WIDTH,
    base_of,
    hire_model,
    layer_inputs,
    shuffle_predictors,
    sparse_layers,
    stepwise,
    tiny_model,
    tokens,
)


def oracle_mask(native: Any, index: int, x_ND: torch.Tensor, spec: dict[str, Any]) -> Any:
    """The true best neurons (or groups), the common ones always among them."""
    weights = read_ffn_weights(native, find_layout(native), index)
    score_NF = dense_hidden(weights, x_ND).abs()
    if spec["score"] == "norm":
        score_NF = score_NF * weights.down_FD.norm(dim=1)
    group, common = spec["group_size"], spec["num_common"]
    unit_NS = score_NF[:, common:].unflatten(-1, (-1, group)).square().sum(-1)
    chosen_NS = lowest_first(unit_NS, (spec["num_kept"] - common) // group)
    always_NC = torch.ones(x_ND.shape[0], common, dtype=torch.bool)
    return torch.cat([always_NC, chosen_NS.repeat_interleave(group, dim=-1)], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ffn_decides_what_tiny_models_predict(family):
    native, ids = tiny_model(family), tokens(2, 32)
    without, layout = copy.deepcopy(native), find_layout(native)
    for index in range(num_layers(native)):
        down = ffn_parts(without, layout, index).down.module
        for parameter in down.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        changed = native(ids).logits.argmax(-1) != without(ids).logits.argmax(-1)
    assert changed.float().mean() >= 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_row_equals_its_masked_twin(family):
    native = tiny_model(family)
    model = hire_model(native, ffn={"keep_fraction": 0.4})
    spoilt = copy.deepcopy(model)
    shuffle_predictors(spoilt)
    for index, (layer, other) in enumerate(
        zip(sparse_layers(model), sparse_layers(spoilt), strict=True)
    ):
        x_ND = layer_inputs(native)[index][:24]
        with torch.no_grad():
            twin, spoilt_twin = layer.masked(x_ND), other.masked(x_ND)
        gathered = gathered_rows(layer, x_ND)
        assert relative(gathered, twin) < TOLERANCE
        assert relative(gathered, spoilt_twin) > 100 * TOLERANCE
        assert relative(gathered, masked_output(native, index, x_ND, torch.tensor(True))) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_all_candidates_give_the_oracle(family):
    native = tiny_model(family)
    model = hire_model(native, ffn={"keep_fraction": 0.3, "over_select": 4.0})
    narrow = hire_model(native, ffn={"keep_fraction": 0.3, "over_select": 1.0})
    shuffle_predictors(narrow)
    for index, (layer, other) in enumerate(
        zip(sparse_layers(model), sparse_layers(narrow), strict=True)
    ):
        assert layer.spec["num_candidates"] == NEURONS > layer.spec["num_kept"]
        x_ND = layer_inputs(native)[index][:24]
        keep_NF = oracle_mask(native, index, x_ND, layer.spec)
        expected = masked_output(native, index, x_ND, keep_NF)
        with torch.no_grad():
            assert relative(layer.masked(x_ND), expected) < TOLERANCE
            # The oracle is a demanding reference: candidates chosen at random miss it.
            assert relative(other.masked(x_ND), expected) > 100 * TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_selects_as_the_format_says(variant):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.5, **VARIANTS[variant]})
    spoilt = copy.deepcopy(model)
    shuffle_predictors(spoilt)
    inputs = layer_inputs(native)
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = inputs[index][:24]
        # Permuted neurons: the model's own weights are the reference.
        keep_NF, _ = reference_masks(model, index, x_ND, layer)
        expected = masked_output(model, index, x_ND, keep_NF)
        kept = layer.spec["num_kept" if layer.spec["keep"] == "top_k" else "num_candidates"]
        number_N = keep_NF.sum(-1)
        if "selection" in layer.spec:
            assert number_N.unique().numel() > 1 and number_N.max() <= layer.spec["num_candidates"]
        else:
            assert (number_N == kept).all() and kept < NEURONS
        layer.counts.zero_()
        with torch.no_grad():
            twin = layer.masked(x_ND)
            assert int(layer.counts[2]) == int(number_N.sum())
            wrong = sparse_layers(spoilt)[index].masked(x_ND)
        assert relative(twin, expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE
        assert int(layer.counts[2]) == 2 * int(number_N.sum())
        assert relative(wrong, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "selection" in VARIANTS[v]])
def test_a_graph_of_fixed_size_selects_as_the_row_does(variant):
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5, **VARIANTS[variant]})
    check_graph(sparse_layers(model)[1], layer_inputs(tiny_model("llama"))[1][:24])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_over_every_candidate_keeps_what_reaches_it(family):
    settings = {"keep_fraction": 0.4, "over_select": 3.0, "selection": "threshold"}
    native = tiny_model(family)
    model = hire_model(native, ffn={**settings, "predictor": {"bits": 2, "soften": True}})
    for index, layer in enumerate(sparse_layers(model)):
        assert layer.spec["num_candidates"] == NEURONS
        x_ND = layer_inputs(native)[index]
        weights = read_ffn_weights(native, find_layout(native), index)
        score_NF = dense_hidden(weights, x_ND).abs() * weights.down_FD.norm(dim=1)
        keep_NF = score_NF >= layer.spec["selection"]["level"]
        # The level was fitted on these very rows.
        assert abs(float(keep_NF.sum(1).float().mean()) - layer.spec["num_kept"]) <= 1 / len(x_ND)
        expected = masked_output(native, index, x_ND, keep_NF)
        with torch.no_grad():
            assert relative(layer.masked(x_ND), expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND[:24]), expected[:24]) < TOLERANCE


def test_a_level_holds_where_as_many_are_candidates_as_are_kept_on_average():
    native = tiny_model("llama")
    model = hire_model(native, ffn={"selection": "threshold", "over_select": 1.5})
    x_ND = layer_inputs(native)[0][:6]
    (layer, *_) = sparse_layers(model)
    layer.spec["num_candidates"] = layer.spec["num_kept"]  # the format allows it
    with torch.no_grad():
        twin = layer.masked(x_ND)
    assert int(layer.counts[2]) < 6 * layer.spec["num_kept"]  # the level left some out
    assert relative(gathered_rows(layer, x_ND), twin) < TOLERANCE


@pytest.mark.parametrize("keep", ["top_k", "candidates"])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "opt", "phi3"])
def test_a_row_may_keep_nothing_or_every_candidate(family, keep):
    native = tiny_model(family)
    settings = {"selection": "threshold", "keep": keep, "over_select": 1.5}
    model = hire_model(native, ffn=settings)
    x_ND = layer_inputs(native)[0][:6]
    (layer, *_) = sparse_layers(model)
    for level, number in ((3.0e38, 0), (-3.0e38, layer.spec["num_candidates"])):
        layer.spec["selection"] = {**layer.spec["selection"], "level": level}
        layer.counts.zero_()
        with torch.no_grad():
            twin = layer.masked(x_ND)
        gathered = gathered_rows(layer, x_ND)
        assert int(layer.counts[2]) == 2 * 6 * number
        assert torch.allclose(gathered, twin, atol=TOLERANCE * float(twin.abs().max()) + 1e-12)
        if number == 0:
            assert torch.equal(twin, torch.zeros_like(twin) + down_bias(native, 0))


@pytest.mark.parametrize("rest", [None, {"bits": 3, "symmetric": True}])
@pytest.mark.parametrize("variant", ["soften", "threshold_candidates", "score_mass"])
def test_what_is_optional_survives_saving_and_loading(variant, rest, tmp_path):
    ffn = {"keep_fraction": 0.5, "unselected": rest, **VARIANTS[variant]}
    model = hire_model(tiny_model("llama"), ffn=ffn)
    ids = tokens(1, 12)
    expected = stepwise(model, ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(stepwise(again, ids), expected)
    assert again.config.hire == model.config.hire


@pytest.mark.parametrize("variant", ["groups", "groups_common", "common"])
def test_variants_with_all_candidates_give_the_oracle(variant):
    settings = {"keep_fraction": 0.5, **VARIANTS[variant], "over_select": 2.0}
    native = tiny_model("qwen2")
    model = hire_model(native, ffn=settings)
    for index, layer in enumerate(sparse_layers(model)):
        x_ND = layer_inputs(native)[index][:24]
        keep_NF = oracle_mask(model, index, x_ND, layer.spec)
        expected = masked_output(model, index, x_ND, keep_NF)
        with torch.no_grad():
            assert relative(layer.masked(x_ND), expected) < TOLERANCE
        assert relative(gathered_rows(layer, x_ND), expected) < TOLERANCE


@pytest.mark.parametrize("rest", [None, {}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_through_the_selecting_code_is_bit_equal(family, dtype, rows, rest):
    native = tiny_model(family).to(dtype)
    ffn = {"keep_fraction": 1.0, "over_select": 1.0, "unselected": rest}
    model = hire_model(native, ffn=ffn)
    model.set_hire_scope("decode", step=False)
    ids = tokens(rows, 12)
    assert torch.equal(stepwise(model, ids), stepwise(native, ids))
    counts = model.hire_stats()["ffn"]
    assert counts["dense_rows"] == 0
    assert counts["kept"] == NEURONS * rows * (ids.shape[1] - 1) * num_layers(native)


def test_keep_one_with_fewer_kept_than_candidates_reads_everything_too():
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.99, "over_select": 2.0})
    (spec, *_) = [layer.spec for layer in sparse_layers(model)]
    assert (spec["num_kept"], spec["num_candidates"]) == (95, 96)
    assert relative(stepwise(model, tokens(1, 12)), stepwise(native, tokens(1, 12))) < 0.1


def test_one_neuron_kept_is_the_smallest_selection():
    native = tiny_model("opt")
    model = hire_model(native, ffn={"keep_fraction": 0.01, "over_select": 1.0})
    for index, layer in enumerate(sparse_layers(model)):
        assert layer.spec["num_kept"] == layer.spec["num_candidates"] == 1
        x_ND = layer_inputs(native)[index][:8]
        with torch.no_grad():
            assert relative(gathered_rows(layer, x_ND), layer.masked(x_ND)) < TOLERANCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rest", [None, {}])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
def test_a_row_with_nan_or_inf_runs_dense_and_is_counted(family, bad, rest):
    native = tiny_model(family)
    model = hire_model(native, ffn={"unselected": rest})
    layer = sparse_layers(model)[0]
    x_ND = layer_inputs(native)[0][:3].clone()
    x_ND[1, 5] = bad
    dense = masked_output(native, 0, x_ND, torch.tensor(True))
    with torch.no_grad():
        out = layer.masked(x_ND)
        row = layer.gathered(x_ND[1:2])
    assert int(layer.counts[4]) == 2 and int(layer.counts[1]) == 4
    assert torch.equal(out[1].isnan(), dense[1].isnan())
    assert torch.equal(row[0].isnan(), dense[1].isnan())
    assert out[[0, 2]].isfinite().all()
    with torch.no_grad():
        assert torch.equal(out[[0, 2]], layer.masked(x_ND[[0, 2]]))


@pytest.mark.parametrize("rest", [None, {}])
def test_an_overflow_inside_the_ffn_runs_dense_on_both_paths(rest):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"unselected": rest})
    layer = sparse_layers(model)[0]
    x_ND = layer_inputs(native)[0][:1] * 1e25  # finite, but gate times up is not
    with torch.no_grad():
        layer.masked(x_ND)
        layer.gathered(x_ND)
    assert layer.counts.tolist() == [2, 2, 0, 0, 2]


def test_gradients_flow_through_the_twin():
    model = hire_model(tiny_model("llama"), ffn={})
    model.set_hire_scope("all")
    model(tokens(1, 8)).logits.square().mean().backward()
    down = base_of(model).layers[0].mlp.down_proj.weight.grad
    assert down is not None and bool((down.abs().sum(0) > 0).any())


def test_base_model_alone_decides_as_well():
    native = tiny_model("opt")
    model = hire_model(native, ffn={})
    base, ids = base_of(model), tokens(1, 6)
    with torch.no_grad():
        cache = base(ids, use_cache=True).past_key_values
        assert model.hire_stats()["ffn"]["calls"] == 0
        base(ids[:, :1], past_key_values=cache, use_cache=True)
    assert model.hire_stats()["ffn"]["calls"] == num_layers(native)
    assert isinstance(base_model(model), type(base))


def test_linear_conv1d_and_slices_are_read_alike():
    native = tiny_model("phi3")
    parts = ffn_parts(native, find_layout(native), 0)
    fused = native.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(parts.gate.weight_out_in(), fused[:NEURONS])
    assert torch.equal(parts.up.weight_out_in(), fused[NEURONS:])
    x = torch.randn(2, WIDTH)
    assert torch.equal(parts.up.run(x), F.linear(x, fused))
