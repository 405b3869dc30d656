"""Sparse FFN against references computed here, apart from the runtime's own selection code."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hireconvert.families import base_model, ffn_parts, find_layout, num_layers, read_ffn_weights
from hireconvert.families import hidden_activations as dense_hidden
from hireconvert.quantize import GridFormat
from tests.decoding import decode_factor, decode_matrix
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

TOLERANCE = 2e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def down_bias(native: Any, index: int) -> torch.Tensor | float:
    bias = ffn_parts(native, find_layout(native), index).down.bias()
    return 0.0 if bias is None else bias.detach().float()


def masked_output(native: Any, index: int, x_ND: torch.Tensor, keep_NF: torch.Tensor) -> Any:
    """The FFN output by plain arithmetic on the native weights, only `keep_NF` neurons active."""
    weights = read_ffn_weights(native, find_layout(native), index)
    hidden_NF = dense_hidden(weights, x_ND) * keep_NF
    return (hidden_NF.double() @ weights.down_FD.double()).float() + down_bias(native, index)


def lowest_first(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """The mask of the `num` best, by a stable sort: ties to the lowest index."""
    order_NS = torch.sort(score_NS, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(score_NS, dtype=torch.bool).scatter_(-1, order_NS[:, :num], True)


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


@torch.no_grad()
def gathered_rows(layer: Any, x_ND: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.gathered(row[None]) for row in x_ND])


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


VARIANTS: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 4},
    "common": {"common_path": 0.125},
    "groups_common": {"group_size": 4, "common_path": 0.125},
    "candidates": {"keep": "candidates"},
    "plain": {"score": "plain"},
    "lr": {"predictor": {"kind": "lr", "rank": 24}},
    "lr_8_bits": {"predictor": {"kind": "lr", "rank": 24, "factor_bits": 8}},
    "lr_4_bits": {"predictor": {"kind": "lr", "rank": 23, "factor_bits": 4}},
    "qlr": {"predictor": {"kind": "qlr", "bits": 2, "rank": 8}},
    "loud_inputs": {"predictor": {"input_keep": 0.5, "bits": 3}},
    "loud_qlr": {"predictor": {"kind": "qlr", "input_keep": 0.6, "rank": 4, "symmetric": False}},
    "offset": {"predictor": {"symmetric": False}},
    "uncentred": {"predictor": {"centre": False, "column_scale": False}},
    "group_scores": {
        "group_size": 4,
        "common_path": 0.125,
        "predictor": {"kind": "lr", "rank": 16, "group_scores": True},
    },
    "group_scores_q": {"group_size": 4, "predictor": {"group_scores": True}},
    "soften": {"predictor": {"bits": 2, "soften": True}},
    "soften_lr": {"keep": "candidates", "predictor": {"kind": "lr", "rank": 8, "soften": True}},
    "soften_groups": {"group_size": 4, "predictor": {"bits": 2, "soften": True}},
    "threshold": {"selection": "threshold"},
    "threshold_candidates": {"selection": "threshold", "keep": "candidates", "over_select": 1.6},
    "threshold_groups_common": {
        "selection": "threshold",
        "group_size": 4,
        "common_path": 0.125,
        "predictor": {"bits": 3, "soften": True},
    },
    "threshold_groups_candidates": {
        "selection": "threshold",
        "keep": "candidates",
        "group_size": 4,
        "common_path": 0.125,
        "over_select": 1.6,
    },
    "threshold_group_scores": {
        "selection": "threshold",
        "keep": "candidates",
        "group_size": 4,
        "over_select": 1.6,
        "predictor": {"kind": "lr", "rank": 16, "group_scores": True},
    },
    "mean_std": {"selection": "mean_std"},
    "mean_std_candidates": {"selection": "mean_std", "keep": "candidates", "over_select": 1.6},
    "mean_std_groups": {"selection": "mean_std", "group_size": 4, "common_path": 0.125},
    "score_mass": {"selection": "score_mass"},
    "score_mass_candidates": {"selection": "score_mass", "keep": "candidates", "over_select": 1.6},
    "score_mass_groups": {"selection": "score_mass", "group_size": 4, "common_path": 0.125},
}


def predicted(spec: dict[str, Any], tensors: dict[str, torch.Tensor], x_ND: torch.Tensor) -> Any:
    """z [N, M] of docs/design.md, from the tensors by another decoder."""
    own, outputs = spec["predictor"], tensors["bias"].shape[0]
    centred_ND = x_ND - tensors["mean"]
    z_NM = tensors["bias"].expand(x_ND.shape[0], -1)
    if own["kind"] in ("q", "qlr"):
        loud = own["num_inputs"] < WIDTH
        form = GridFormat(own["bits"], own["block"], own["symmetric"], channel_major=loud)
        copy_MD = decode_matrix(tensors, form, (outputs, WIDTH))
        scaled_ND = centred_ND / tensors["column_scale"]
        if loud:
            mask_ND = lowest_first((scaled_ND * copy_MD.norm(dim=0)).abs(), own["num_inputs"])
            scaled_ND = scaled_ND * mask_ND
        z_NM = z_NM + scaled_ND @ copy_MD.T
    if own["kind"] in ("lr", "qlr"):
        into = decode_factor(tensors, own["factor_bits"], "factor_in", width=WIDTH)
        out = decode_factor(tensors, own["factor_bits"], "factor_out", width=own["rank"])
        z_NM = z_NM + (centred_ND @ into.T) @ out.T
    return z_NM


def reaches_level(selection: dict[str, Any], own_NS: torch.Tensor, estimate_NS: Any) -> Any:
    """The rules of docs/format.md, row by row."""
    level, rows = selection["level"], []
    for own_S, estimate_S in zip(own_NS.double(), estimate_NS.double(), strict=True):
        if selection["rule"] == "threshold":
            rows.append(own_S >= level)
        elif selection["rule"] == "mean_std":
            rows.append(own_S >= estimate_S.mean() + level * estimate_S.std(correction=0))
        else:
            weaker_S = (own_S.square() * (own_S <= own_S[:, None])).sum(-1)
            rows.append(weaker_S >= level * own_S.square().sum())
    return torch.stack(rows)


def reference_mask(native: Any, index: int, x_ND: torch.Tensor, layer: Any) -> torch.Tensor:
    """Active neurons by the words of docs/design.md."""
    spec, tensors = layer.spec, layer.predictor_tensors
    weights = read_ffn_weights(native, find_layout(native), index)
    group, common = spec["group_size"], spec["num_common"]
    norm_F = weights.down_FD.norm(dim=1) if spec["score"] == "norm" else torch.ones(NEURONS)

    def units(hidden_NF: torch.Tensor) -> torch.Tensor:
        score_NF = (hidden_NF.abs() * norm_F)[:, common:]
        return score_NF if group == 1 else score_NF.unflatten(-1, (-1, group)).norm(dim=-1)

    z_NM = predicted(spec, tensors, x_ND)
    if spec["predictor"]["groups"]:
        estimate_NS = z_NM[:, common // group :]
    else:
        gate_NF, up_NF = z_NM.chunk(2, dim=-1)
        size_NF = weights.act(gate_NF).abs() * up_NF.abs()
        if spec["predictor"].get("soften"):
            soft_gate_F, soft_up_F = tensors["soft"].float().view(2, -1)
            above_NF, below_NF = (weights.act(gate_NF + s * soft_gate_F) for s in (1, -1))
            size_NF = torch.hypot(above_NF, below_NF) * 0.5**0.5 * torch.hypot(up_NF, soft_up_F)
        estimate_NS = units(size_NF)
    chosen_NS = lowest_first(estimate_NS, (spec["num_candidates"] - common) // group)
    own_NS = estimate_NS
    if spec["keep"] == "top_k":
        own_NS = units(dense_hidden(weights, x_ND)).masked_fill(~chosen_NS, 0.0)
    if "selection" in spec:
        chosen_NS = chosen_NS & reaches_level(spec["selection"], own_NS, estimate_NS)
    elif spec["keep"] == "top_k":
        chosen_NS = lowest_first(own_NS, (spec["num_kept"] - common) // group)
    always_NC = torch.ones(x_ND.shape[0], common, dtype=torch.bool)
    return torch.cat([always_NC, chosen_NS.repeat_interleave(group, dim=-1)], dim=-1)


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
        keep_NF = reference_mask(model, index, x_ND, layer)
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
    layer = sparse_layers(model)[1]
    x_ND = layer_inputs(tiny_model("llama"))[1][:24]
    expected, counts = gathered_rows(layer, x_ND), layer.counts.clone()
    layer.counts.zero_()
    graphs = []

    def count_graphs(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module

    torch._dynamo.reset()
    run = torch.compile(layer.gathered, fullgraph=True, dynamic=False, backend=count_graphs)
    with torch.no_grad():
        compiled = torch.cat([run(row[None]) for row in x_ND])
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert relative(compiled, expected) < TOLERANCE
    assert torch.equal(layer.counts, counts)


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


@pytest.mark.parametrize("variant", ["soften", "threshold_candidates", "score_mass"])
def test_what_varies_survives_saving_and_loading(variant, tmp_path):
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5, **VARIANTS[variant]})
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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_through_the_selecting_code_is_bit_equal(family, dtype, rows):
    native = tiny_model(family).to(dtype)
    model = hire_model(native, ffn={"keep_fraction": 1.0, "over_select": 1.0})
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
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
def test_a_row_with_nan_or_inf_runs_dense_and_is_counted(family, bad):
    native = tiny_model(family)
    model = hire_model(native, ffn={})
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


def test_an_overflow_inside_the_ffn_runs_dense_on_both_paths():
    native = tiny_model("llama")
    model = hire_model(native, ffn={})
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
