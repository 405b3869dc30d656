"""Rows that keep every neuron whose estimated score reaches a level, natively.

Shape suffixes: N rows, D width, F neurons.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from hireconvert.roofline import counts_at
from hireconvert.runtime import hire_native
from tests.ffn_reference import relative
from tests.native import (
    BY_LEVEL,
    LEVELS,
    Case,
    _native,
    output,
    row_level,
    rows_of,
    settings_of,
    tensors_of,
)
from tests.tiny import base_of, hire_model, sparse_layers, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FFN: dict[str, Any] = {
    "keep_fraction": 0.4,
    "selection": "threshold",
    "keep": "candidates",
    "over_select": 20.0,
    "score": "error",
    "unselected": {"block": 16},
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=LEVELS)
def machine(request, monkeypatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


def packed(case: Case) -> tuple[dict[str, Any], Any]:
    tensors = tensors_of(case)
    return tensors, _native.FfnLayer.pack(settings_of(case), tensors)


@pytest.mark.parametrize("name", BY_LEVEL)
def test_a_row_keeps_what_reaches_the_level(name, machine):
    case, kept = BY_LEVEL[name], []
    tensors, layer = packed(case)
    for x_1D in rows_of(case).split(1):
        counts = torch.zeros(5, dtype=torch.int64)
        y_1D, finite_N = layer.run(x_1D, counts)
        assert finite_N is None and layer.varies
        found = layer.last()
        level = row_level(case, tensors, found["z"].flatten())
        index = (found["score"] >= level).nonzero()[:, 0]
        expected_D = output(case, tensors, x_1D[0], index, index)
        assert relative(y_1D[0], expected_D) < TOLERANCE[case.dtype]
        assert counts.tolist() == [1, 1, len(index), len(index), 0]
        kept.append(len(index))
    assert case.neurons == 1 or len(set(kept)) > 1


@pytest.mark.parametrize(
    "name",
    ["fused", "odd", "bfloat16", "normal_refined", "one_of_each", "odd_relative", "wide_relative"],
)
def test_bits_depend_on_neither_threads_nor_other_rows(name, machine):
    case = BY_LEVEL[name]
    _, layer = packed(case)
    x_ND, before, outputs = rows_of(case, 11), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs.append(layer.run(x_ND)[0])
            outputs.append(torch.cat([layer.run(row)[0] for row in x_ND.split(1)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize("name", ["refined", "normal_refined", "refined_fused"])
def test_as_many_by_level_as_by_number_are_the_same_bits(name, machine):
    case = BY_LEVEL[name]
    _, layer = packed(case)
    x_1D = rows_of(case, 1)
    for number in (1, case.neurons // 3, case.neurons - 1):
        fixed = layer.counting(number, number)
        expected = fixed.run(x_1D)[0]
        level = float(fixed.last()["score"].sort(descending=True).values[number - 1])
        assert torch.equal(layer.counting(1, 1, level).run(x_1D)[0], expected)


@pytest.mark.parametrize("name", ["plain_relative", "wide_relative", "normal_refined_relative"])
def test_a_relative_level_times_what_the_row_comes_to_is_a_level(name, machine):
    case = BY_LEVEL[name]
    tensors, layer = packed(case)
    for x_1D in rows_of(case).split(1):
        expected = layer.run(x_1D)[0]
        level = row_level(case, tensors, layer.last()["z"].flatten())
        assert torch.equal(layer.counting(1, 1, level).run(x_1D)[0], expected)
        half = layer.counting(1, 1, case.level / 2, relative=True)
        assert not torch.equal(half.run(x_1D)[0], expected)


def test_a_row_that_comes_to_nothing_keeps_nothing(machine):
    case = replace(BY_LEVEL["ungated_relative"], bias=False)
    tensors, counts = tensors_of(case), torch.zeros(5, dtype=torch.int64)
    tensors["bias"] = -torch.ones(case.neurons)  # where an input is the mean, and relu2 leaves none
    layer = _native.FfnLayer.pack(settings_of(case), tensors)
    y_1D, finite_N = layer.run(tensors["mean"][None], counts)
    assert finite_N is None and not y_1D.any()
    assert counts.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["plain", "fused", "refined", "bfloat16"])
def test_every_neuron_and_none(name, machine):
    case = BY_LEVEL[name]
    tensors, layer = packed(case)
    for level, index in ((-1.0, torch.arange(case.neurons)), (0.0, torch.arange(case.neurons)),
                         (3e38, torch.arange(0))):  # fmt: skip
        counts, x_1D = torch.zeros(5, dtype=torch.int64), rows_of(case, 1)
        found = layer.counting(1, 1, level).run(x_1D, counts)[0]
        expected_D = output(case, tensors, x_1D[0], index, index)
        close = TOLERANCE[case.dtype] * max(1.0, float(expected_D.norm()))
        assert float((found[0].double() - expected_D).norm()) < close
        assert counts.tolist() == [1, 1, len(index), len(index), 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["plain", "fused", "refined", "normal_refined_relative"])
def test_rows_with_nan_or_inf_are_named_and_not_counted(name, bad, machine):
    case = BY_LEVEL[name]
    _, layer = packed(case)
    x_ND = rows_of(case, 10)
    x_ND[3, 5 % case.width] = bad
    counts, sound = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    y_ND, finite_N = layer.run(x_ND, counts)
    assert finite_N.tolist() == [row != 3 for row in range(10)]
    expected, _ = layer.run(x_ND[finite_N], sound)
    assert torch.equal(y_ND[finite_N], expected)
    assert counts[2:].tolist() == [*sound[2:4].tolist(), 1] and counts[1] == 10


@pytest.mark.parametrize("level", [None, True, "q", float("nan"), float("inf")])
def test_what_is_no_level(level):
    case = BY_LEVEL["plain"]
    settings = settings_of(case) | {"level": level}
    if level is None:
        assert not _native.FfnLayer.pack(settings, tensors_of(case)).varies
        return
    with pytest.raises(ValueError, match="native: level is"):
        _native.FfnLayer.pack(settings, tensors_of(case))
    with pytest.raises(ValueError, match="of 96 neurons may be kept"):
        _native.FfnLayer.pack(settings | {"level": 1.0, "num_kept": 95}, tensors_of(case))


# --------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("family", "rule"),
    [("llama", "threshold"), ("qwen2", "threshold"), ("gemma3_text", "relative")],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_models_decode_as_pytorch_does(family, rule, rows, machine):
    ffn = {**FFN, "selection": rule}
    model, ids = hire_model(tiny_model(family), ffn=ffn), tokens(rows, 6)
    asked = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    model.hire_prepare()
    assert base_of(model).hire_step.reason is None
    found = {}
    for step in (True, False):
        model.set_hire_scope("decode", step=step)
        if not step:
            for layer in sparse_layers(model):  # not the FFN kernels either
                layer.prepared.native = None
        made = model.generate(ids, **asked)
        found[step] = torch.stack(made.logits), model.hire_stats(reset=True)
    assert relative(found[True][0], found[False][0]) < 2e-5
    assert found[True][1] == found[False][1]
    kept = [layer["kept"] for layer in found[True][1]["layers"].values()]
    neurons = sparse_layers(model)[0].spec["num_neurons"]
    assert all(0 < one < rows * 11 * neurons for one in kept)


def test_what_is_not_a_threshold_of_estimates_alone_runs_in_pytorch():
    for changes in ({"over_select": 1.5}, {"keep": "top_k"}, {"selection": "mean_std"}):
        layers = sparse_layers(hire_model(tiny_model("llama"), ffn={**FFN, **changes}))
        assert all(layer.prepared.native is None for layer in layers)
        assert "number of neurons that varies" in hire_native.path(layers)


def test_another_share_keeps_the_same_number_in_every_row_and_back():
    model = hire_model(tiny_model("llama"), ffn=FFN)
    layers, x_ND = sparse_layers(model), torch.randn(3, 32)
    was = [copy.deepcopy(layer.spec) for layer in layers]
    with torch.no_grad():
        before = layers[0](x_ND, None)
        for layer in layers:
            layer.spec |= counts_at(layer.spec, 0.25)
            layer.prepare()
        assert not layers[0].prepared.native.varies
        layers[0].counts.zero_()
        layers[0](x_ND, None)
        assert layers[0].counts[2] == 3 * round(0.25 * was[0]["num_neurons"])
        for layer, spec in zip(layers, was, strict=True):
            layer.spec |= spec
            layer.prepare()
        assert torch.equal(layers[0](x_ND, None), before)
