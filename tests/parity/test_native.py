"""The native kernels against float64 and against the PyTorch path, at every level there is here."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from hireconvert.runtime import hire_native
from tests.ffn_reference import TOLERANCE, VARIANTS, check_graph, gathered_rows, relative
from tests.native import (
    CASES,
    LEVELS,
    Case,
    _native,
    estimates,
    exact_hidden,
    output,
    rows_of,
    selected,
    settings_of,
    sizes,
    tensors_of,
)
from tests.tiny import hire_model, layer_inputs, sparse_layers, stepwise, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
SPECIAL = {
    "top_k": {},
    "candidates": {"keep": "candidates"},
    "rest": {"keep": "candidates", "unselected": {}},
    "rest_top_k": {"unselected": {"bits": 2, "block": 16}, "predictor": {"soften": True}},
    "error": {"score": "error", "unselected": {"block": 16}, "over_select": 1.0},
    "offset_plain": {"score": "plain", "predictor": {"symmetric": False, "bits": 3}},
}
COVERED = ("llama", "llama_bias", "llama_gelu", "llama_relu2", "gemma2", "phi3", "opt", "gpt2")


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


def packed(name: str) -> tuple[Case, dict[str, Any], Any]:
    case = CASES[name]
    tensors = tensors_of(case)
    return case, tensors, _native.FfnLayer.pack(settings_of(case), tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_float64_says(name, level):
    case, tensors, layer = packed(name)
    assert layer.level == level
    for x_1D in rows_of(case).split(1):
        y_1D, finite_N = layer.run(x_1D)
        assert finite_N is None and y_1D.dtype == case.dtype
        found, x_D = layer.last(), x_1D[0]
        if case.candidates < case.neurons:
            exact_M = estimates(case, tensors, x_D, torch.float64)
            torch_error = (estimates(case, tensors, x_D, case.dtype) - exact_M).abs().max()
            error = (found["z"].flatten() - exact_M).abs().max()
            assert error <= 2 * torch_error + 1e-6
            score_F = sizes(case, tensors, exact_M) * tensors["norm"]
            share = 2e-6 if case.dtype == torch.float32 else 1e-4  # two digits of an input
            assert (found["score"] - score_F).abs().max() < share * score_F.max() + 1e-6
            assert torch.equal(found["index"].long(), selected(found["score"], case.candidates))
        index = found["index"].long()
        exact_C = (exact_hidden(case, tensors, x_D).abs() * tensors["norm"])[index]
        best = selected(exact_C, case.kept) if case.kept < case.candidates else slice(None)
        kept = index[best]
        assert torch.equal(index[found["chosen"].long()], kept)
        expected_D = output(case, tensors, x_D, index, kept)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
        assert relative(y_1D[0], expected_D) < tolerance[case.dtype]


@pytest.mark.parametrize("name", ["fused", "odd", "all_candidates", "bfloat16", "wide"])
def test_bits_depend_on_neither_threads_nor_other_rows_nor_alignment(name, level):
    case, _, layer = packed(name)
    x_ND = rows_of(case, 5)
    before, outputs = torch.get_num_threads(), []
    shifted = torch.empty(x_ND.numel() + 1, dtype=case.dtype)[1:].view_as(x_ND).copy_(x_ND)
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            outputs.append(layer.run(x_ND)[0])
            outputs.append(layer.run(shifted)[0])
            outputs.append(layer.run(x_ND.t().contiguous().t())[0])
            outputs.append(torch.cat([layer.run(row)[0] for row in x_ND.split(1)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize("total", [1, 2, 7, 16, 31, 96, 1000, 5000])
def test_top_k_is_the_runtimes_to_the_last_tie(total):
    dice = torch.Generator().manual_seed(total)
    plain = torch.rand(total, generator=dice)
    coarse = (plain * 5).floor()
    tiny = plain * 1e-42
    spread = (plain * 80 - 40).exp()
    near = (plain.view(torch.int32) >> 12 << 12).view(torch.float32)
    signed = torch.where(coarse == 0, -0.0, coarse)
    for score_F in (plain, coarse, tiny, spread, near, signed, torch.zeros(total)):
        for num in {1, total // 3 + 1, total // 2 + 1, max(total - 1, 1), total}:
            found = _native.top_k(score_F, num)
            assert torch.equal(found.long(), selected(score_F, num))


def test_equal_neurons_tie_to_the_lowest_index(level):
    case, tensors, _ = packed("plain")
    for name in ("gate", "up", "down"):
        tensors[name][:] = tensors[name][:1]
    for name in ("planes", "scale", "bias", "norm"):
        axis = 1 if name == "planes" else 0
        for part in tensors[name].chunk(1 if name == "norm" else 2, dim=axis):
            part.copy_(part.select(axis, 0).unsqueeze(axis).clone())
    layer = _native.FfnLayer.pack(settings_of(case), tensors)
    layer.run(rows_of(case, 1))
    assert layer.last()["index"].tolist() == list(range(case.candidates))
    assert layer.last()["chosen"].tolist() == list(range(case.kept))


def test_zero_rows_add_nothing(level):
    case, tensors, _ = packed("fused")
    tensors["down"].zero_()
    tensors["norm"].zero_()
    tensors["down_scale"].zero_()
    tensors["down_offset"].zero_()
    layer = _native.FfnLayer.pack(settings_of(case), tensors)
    assert torch.equal(layer.run(rows_of(case))[0], torch.zeros(3, case.width))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["plain", "fused", "ungated", "all_candidates", "bfloat16"])
def test_rows_with_nan_or_inf_are_named_and_counted(name, bad, level):
    case, _, layer = packed(name)
    x_ND, counts = rows_of(case, 4), torch.zeros(5, dtype=torch.int64)
    whole = layer.run(x_ND)[0]
    x_ND[2, -1] = bad
    y_ND, finite_N = layer.run(x_ND, counts)
    assert finite_N.tolist() == [True, True, False, True]
    assert counts.tolist() == [1, 4, 3 * case.kept, 3 * case.candidates, 1]
    assert torch.equal(y_ND[finite_N], whole[finite_N])


@pytest.mark.parametrize("variant", SPECIAL)
@pytest.mark.parametrize("family", COVERED)
def test_the_runtime_decodes_the_same_tokens_through_them(family, variant, monkeypatch):
    native = tiny_model(family)
    model = hire_model(native, ffn={"keep_fraction": 0.4, **SPECIAL[variant]})
    layers = sparse_layers(model)
    assert all(layer.prepared.native is not None for layer in layers)
    for layer, x_ND in zip(layers, layer_inputs(native), strict=True):
        layer.counts.zero_()
        with torch.no_grad():
            rows = torch.cat([layer(row, None) for row in x_ND[:24].split(1)])
            few = torch.cat([layer(some, None) for some in x_ND[:24].split(4)])
        assert layer.counts.tolist()[:2] == [30, 48]
        assert torch.equal(rows, few)
        assert relative(rows, gathered_rows(layer, x_ND[:24])) < TOLERANCE
        assert layer.counts[2] == 72 * hire_native.num_active(layer.spec)
        with torch.no_grad():
            assert relative(rows, layer.masked(x_ND[:24])) < TOLERANCE
    monkeypatch.setenv(_native.VARIABLE, "off")
    torch_path = copy.deepcopy(model)
    for layer in sparse_layers(torch_path):
        layer.prepared = None
    assert all(layer.prepared.native is None for layer in sparse_layers(torch_path))
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    ids = tokens(1, 6)
    assert torch.equal(model.generate(ids, **asked), torch_path.generate(ids, **asked))
    model.hire_stats(reset=True)
    torch_path.hire_stats(reset=True)
    assert relative(stepwise(model, ids), stepwise(torch_path, ids)) < 100 * TOLERANCE
    assert model.hire_stats() == torch_path.hire_stats()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_stay_near_the_pytorch_path(dtype):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.4, "unselected": {}}).to(dtype)
    for layer, x_ND in zip(sparse_layers(model), layer_inputs(native), strict=True):
        x_ND = x_ND[:16].to(dtype)
        with torch.no_grad():
            rows = torch.cat([layer(row, None) for row in x_ND.split(1)])
        assert layer.prepared.native is not None and rows.dtype == dtype
        assert relative(rows, gathered_rows(layer, x_ND)) < 0.05


@pytest.mark.parametrize("variant", SPECIAL)
def test_a_graph_holds_them_as_one_operator(variant):
    native = tiny_model("llama")
    model = hire_model(native, ffn={"keep_fraction": 0.4, **SPECIAL[variant]})
    layer, x_ND = sparse_layers(model)[1], layer_inputs(native)[1][:6].clone()
    x_ND[3, 4] = float("nan")
    graphs = []

    def count_graphs(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module

    layer.counts.zero_()
    with torch.no_grad():
        expected = torch.cat([layer(row, None) for row in x_ND.split(1)])
        counts = layer.counts.clone()
        layer.counts.zero_()
        torch._dynamo.reset()
        run = torch.compile(
            lambda row: layer(row, None), fullgraph=True, dynamic=False, backend=count_graphs
        )
        compiled = torch.cat([run(row) for row in x_ND.split(1)])
    torch._dynamo.reset()
    assert len(graphs) == 1 and "hire_native.ffn" in graphs[0].print_readable(print_output=False)
    assert torch.equal(compiled[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])
    assert torch.equal(compiled[3].isnan(), expected[3].isnan()) and expected[3].isnan().any()
    assert torch.equal(layer.counts, counts)
    x_ND[3, 4] = 0.0
    layer.counts.zero_()
    check_graph(layer, x_ND)  # the PyTorch path is still there for graphs


def test_the_operator_keeps_the_rules_of_operators():
    case, _, layer = packed("fused")
    torch.library.opcheck(
        torch.ops.hire_native.ffn.default,
        (rows_of(case), layer.handle),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_changed_weight_is_seen():
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.4})
    layer, x_ND = sparse_layers(model)[0], layer_inputs(tiny_model("llama"))[0][:1]
    with torch.no_grad():
        before = layer(x_ND, None)
        layer.parts.down.module.weight.mul_(2.0)
        layer.prepare()
        assert relative(layer(x_ND, None), 2 * before) < TOLERANCE
        twin = copy.deepcopy(model)
        assert torch.equal(sparse_layers(twin)[0](x_ND, None), layer(x_ND, None))


REASONS = {
    "groups": "groups or common neurons",
    "common": "groups or common neurons",
    "lr": "predictor lr",
    "qlr": "predictor qlr",
    "loud_inputs": "predictor of some inputs",
    "threshold": "a number of neurons that varies, but not by a level of estimates alone",
}


@pytest.mark.parametrize("variant", REASONS)
def test_what_they_do_not_cover_takes_the_pytorch_path_and_is_named(variant, tmp_path, caplog):
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5, **VARIANTS[variant]})
    assert all(layer.prepared.native is None for layer in sparse_layers(model))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hire"):
        type(model).from_pretrained(tmp_path)
    assert caplog.text.count("hire: decoding with") == 1
    assert f"PyTorch path ({REASONS[variant]})" in caplog.text


def test_more_reasons():
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 1.0, "over_select": 1.0})
    assert hire_native.path(sparse_layers(model)) == "PyTorch path (every neuron is kept)"
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5})
    layers = sparse_layers(model)
    assert hire_native.path(layers) == f"native FFN kernels ({_native.machinery()})"
    layers[0].spec["num_common"] = 8
    assert "in 2 layers, PyTorch path in 1 (groups" in hire_native.path(layers)
    model.double()
    assert all(layer.prepared.native is None for layer in sparse_layers(model))
    assert "weights of torch.float64" in hire_native.path(layers[1:])


def test_no_library_is_said_once_at_load(tmp_path, monkeypatch, caplog):
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.5})
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(hire_native, "native", None)
    monkeypatch.setattr(hire_native, "_MISSING", "no native library (none built)")
    with caplog.at_level(logging.WARNING, logger="hire"):
        again = type(model).from_pretrained(tmp_path).eval()
    assert caplog.text.count("PyTorch path (no native library (none built))") == 1
    assert torch.equal(model(tokens(1, 5)).logits, again(tokens(1, 5)).logits)


def test_another_abi_means_the_pytorch_path(monkeypatch):
    own = _native.ABI
    monkeypatch.setattr(_native, "ABI", own + 1)
    found, reason = hire_native.find_library("_native")
    assert found is None and f"ABI {own + 1}, this checkpoint needs {own}" in reason


def test_levels_are_forced_by_the_environment(monkeypatch):
    for name in LEVELS:
        monkeypatch.setenv(_native.VARIABLE, name)
        assert _native.level() == name
    monkeypatch.setenv(_native.VARIABLE, "sse")
    with pytest.raises(
        ValueError, match="HIRE_NATIVE is 'sse', expected one of off, ffn, portable"
    ):
        _native.level()


def test_an_activation_is_known_by_what_it_computes():
    known = {
        "silu": nn.SiLU(),
        "gelu_erf": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "relu": nn.ReLU(),
    }
    for name, act in known.items():
        assert hire_native.activation_name(act) == name
    for act in (nn.Tanh(), nn.ReLU6(), nn.Mish(), nn.Identity(), nn.ELU(), nn.LeakyReLU(1e-3)):
        assert hire_native.activation_name(act) is None


def test_rows_that_they_do_not_serve_run_as_before():
    model = hire_model(tiny_model("llama"), ffn={"keep_fraction": 0.4})
    layer, x_ND = sparse_layers(model)[0], layer_inputs(tiny_model("llama"))[0]
    packed_layer = layer.prepared.native
    with torch.no_grad():
        most_ND = x_ND[:1].expand(hire_native.MOST_ROWS, -1)
        assert hire_native.serves(packed_layer, most_ND)
        assert not hire_native.serves(packed_layer, torch.cat([most_ND, x_ND[:1]]))
        assert not hire_native.serves(packed_layer, x_ND[:1].double())
        with torch.autocast("cpu"):
            assert not hire_native.serves(packed_layer, x_ND[:1])
    assert not hire_native.serves(packed_layer, x_ND[:1])  # gradients are wanted
    assert not hire_native.serves(None, x_ND[:1])
    with pytest.raises(ValueError, match="native: x is"):
        packed_layer.run(x_ND[:1, :-1])
