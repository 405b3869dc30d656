"""Rows of copies: the kernels over 4 bits alone against PyTorch over the dense rounded weights.

Shape suffixes: N rows, D width, F neurons, M predictor outputs.
"""

import copy
import functools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from hireconvert.roofline import counts_at
from hireconvert.runtime import hire_native
from tests.ffn_reference import TOLERANCE, check_graph, relative
from tests.native import (
    COPIES,
    LEVELS,
    Case,
    _native,
    hidden,
    rows_of,
    settings_of,
    tensors_of,
)
from tests.tiny import base_of, hire_model, sparse_layers, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
EVEN = {"bits": 4, "block": 16, "symmetric": False}
NORMAL = {"bits": 4, "block": 16, "symmetric": True, "levels": "normal"}
LONG = {"bits": 4, "block": 96, "symmetric": True}  # longer than a row
SETTINGS: dict[str, dict[str, Any]] = {
    "normal": {"predictor": NORMAL, "unselected": NORMAL, "score": "error"},
    "even": {"predictor": EVEN, "unselected": EVEN, "keep": "candidates"},
    "mixed": {"predictor": LONG, "unselected": EVEN, "score": "plain", "over_select": 1.0},
    "odd blocks": {"predictor": NORMAL | {"block": 7}, "unselected": LONG},
}
FAMILIES = ("llama", "llama_bias", "llama_relu2", "gemma3_text", "phi3", "opt", "gpt2")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=LEVELS)
def level(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


@functools.cache
def made(family: str, setting: str, dtype: torch.dtype) -> Any:
    ffn = {"keep_fraction": 1.0, **SETTINGS[setting], "rows": "copies"}
    return hire_model(tiny_model(family).to(dtype), ffn=ffn, head={})


def model_of(family: str, setting: str = "normal", dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(made(family, setting, dtype))


def rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x_ND = torch.randn(9, width, generator=torch.Generator().manual_seed(3)) * 1.5
    x_ND[4] = 0
    return x_ND.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_compute_what_dense_weights_do(family: str, setting: str, level: str) -> None:
    for layer in sparse_layers(model_of(family, setting)):
        native = layer.prepared.native
        assert not native.tensors.keys() & {"rows", "low", "soft"}
        x_ND = rows(native.numbers["width"])
        assert relative(layer(x_ND, None), layer.dense(x_ND)) < TOLERANCE
        neurons = 9 * layer.spec["num_neurons"]
        assert layer.counts.tolist() == [1, 9, neurons, neurons, 0]
        assert layer.prepared.widened is None


@torch.no_grad()
def true_output(case: Case, tensors: dict[str, Any], x_D: torch.Tensor, dtype: Any) -> torch.Tensor:
    """[D] from the rounded weights, every operation in the arithmetic of `dtype`."""
    names = ["gate", "up"] if case.gated else ["up"]
    z_M = torch.cat([tensors[name] for name in names]).to(dtype) @ x_D.to(dtype)
    if case.bias:
        z_M = z_M + torch.cat([tensors[f"{name}_bias"] for name in names]).to(dtype)
    y_D = hidden(case, z_M) @ tensors["down"].to(dtype)
    return y_D + tensors["down_bias"].to(dtype) if case.bias else y_D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COPIES)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(
    name: str, dtype: torch.dtype, level: str
) -> None:
    case = replace(COPIES[name], dtype=dtype)
    tensors = tensors_of(case)
    layer = _native.FfnLayer.pack(settings_of(case), tensors)
    own, plainly = 0.0, 0.0
    for x_1D in rows_of(case, 8).split(1):
        exact_D = true_output(case, tensors, x_1D[0], torch.float64)
        own += float((layer.run(x_1D)[0][0].double() - exact_D).norm() / exact_D.norm())
        plain_D = true_output(case, tensors, x_1D[0], dtype).double()
        plainly += float((plain_D - exact_D).norm() / exact_D.norm())
    assert own <= 2 * plainly + 8 * 2e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", COPIES)
def test_rows_get_the_bits_they_get_alone(name: str, threads: int, level: str) -> None:
    case, before = COPIES[name], torch.get_num_threads()
    layer = _native.FfnLayer.pack(settings_of(case), tensors_of(case))
    x_ND = rows_of(case, hire_native.MOST_ROWS)
    alone_ND = torch.cat([layer.run(x_1D)[0] for x_1D in x_ND.split(1)])
    try:
        torch.set_num_threads(threads)
        for num in (*range(1, 10), 19, len(x_ND)) if threads == 1 else (2, 9):
            assert torch.equal(layer.run(x_ND[:num])[0], alone_ND[:num])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_rows_with_nan_or_inf_run_dense(level: str) -> None:
    layer = sparse_layers(model_of("llama_bias"))[0]
    x_ND = rows(32)
    x_ND[2, -1], x_ND[7, 0] = torch.nan, torch.inf
    found_ND, expected_ND = layer(x_ND, None), layer.dense(x_ND)
    good_N = expected_ND.isfinite().all(1)
    assert good_N.tolist() == [index not in (2, 7) for index in range(9)]
    assert relative(found_ND[good_N], expected_ND[good_N]) < TOLERANCE
    assert not found_ND[~good_N].isfinite().all(1).any()
    neurons = 7 * layer.spec["num_neurons"]
    assert layer.counts.tolist() == [1, 9, neurons, neurons, 2]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_graphs_run_the_kernels(family: str) -> None:
    check_graph(sparse_layers(model_of(family))[0], rows(32)[:1])


# --------------------------------------------------------------------------- whole models


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, queries: int = 1) -> torch.Tensor:
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = ids[:, 6:].split(queries, dim=1)
    logits = [model(some, past_key_values=cache, use_cache=True).logits for some in steps]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("queries", [1, 3, 11])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text", "mistral"])
def test_the_native_step_runs_them(family: str, queries: int, level: str) -> None:
    model, ids = model_of(family), tokens(1, 30)
    model.hire_state.max_sparse_rows, found = hire_native.MOST_ROWS, {}
    for scope in ({"scope": "decode"}, {"scope": "decode", "step": False}, {"scope": "off"}):
        model.hire_prepare()
        model.set_hire_scope(**scope, head=False)
        found[str(scope)] = decoded(model, ids, queries)
        if scope["scope"] == "decode":
            blocks = base_of(model).hire_step.blocks
            assert blocks and all(block.ffn is not None for block in blocks)
            stats = model.hire_stats(reset=True)["ffn"]
            assert stats["kept"] == stats["candidates"] == 96 * stats["rows"] > 0
            assert stats["dense_rows"] == 0
    native, plain, dense = found.values()
    assert relative(native, dense) < TOLERANCE and relative(plain, dense) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_path_gives_the_same_tokens(
    dtype: torch.dtype, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model_of("llama", dtype=dtype).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hire"):
        model = type(model_of("llama")).from_pretrained(tmp_path).eval()
    assert f"native FFN kernels ({_native.machinery()}); native decode step" in caplog.text
    caplog.clear()
    found = model.generate(tokens(1, 6), max_new_tokens=12, **GREEDY)
    assert all(block.ffn is not None for block in base_of(model).hire_step.blocks)
    assert "no longer the copies" not in caplog.text
    # In float32 the same weights are no copies rounded to it: they are read as they are.
    wide = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = wide.generate(tokens(1, 6), max_new_tokens=12, **GREEDY)
    assert "no longer the copies" in caplog.text
    layers = list(base_of(wide).hire_layers.values())
    assert all(layer.prepared.native is None for layer in layers)
    assert "weights that are not their copies" in hire_native.path(layers)
    assert base_of(wide).hire_step.reason is None
    assert all(block.ffn is None for block in base_of(wide).hire_step.blocks)
    assert (found == expected).float().mean() > 0.8


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_weights_that_change_are_read_as_they_are(matrix: str) -> None:
    model, ids = model_of("llama"), tokens(1, 16)
    layers = sparse_layers(model)
    with torch.no_grad():
        getattr(layers[1].parts, matrix).module.weight[3, 5] += 0.01
    model.set_hire_scope("decode", head=False)
    found = decoded(model, ids)
    assert [layer.prepared.native is None for layer in layers] == [False, True, False]
    blocks = base_of(model).hire_step.blocks
    assert [block.ffn is None for block in blocks] == [False, True, False]
    assert model.hire_stats()["ffn"]["kept"] == 96 * 30
    model.set_hire_scope("off")
    assert relative(found, decoded(model, ids)) < TOLERANCE


def test_a_share_set_in_memory_reads_the_weights_and_comes_back() -> None:
    """As bench does, whose dense model through our kernels reads no copies."""
    model, ids = model_of("llama"), tokens(1, 16)
    layers = sparse_layers(model)
    model.set_hire_scope("decode", head=False)
    before, was = decoded(model, ids), dict(layers[0].spec)
    packed = [layer.prepared.native for layer in layers]
    for keep, native in ((1.0, False), (0.25, True)):
        for layer in layers:
            layer.spec |= counts_at(layer.spec | {"rows": "copies"}, keep)
        model.hire_prepare()
        assert all((layer.prepared.native is not None) == native for layer in layers)
        assert not native or all("rows" in layer.prepared.native.tensors for layer in layers)
        assert relative(decoded(model, ids), before) < 2 * TOLERANCE
        blocks = base_of(model).hire_step.blocks
        assert all((block.ffn is not None) == native for block in blocks)
    for layer in layers:
        layer.spec |= was
    model.hire_prepare()
    assert torch.equal(decoded(model, ids), before)
    assert packed[0].tensors.keys() == layers[0].prepared.native.tensors.keys()


@pytest.mark.parametrize(
    "change", [{"rest": None}, {"bits": 3}, {"rest": {"bits": 8, "block": 32}}]
)
def test_copies_of_other_bits_are_refused(change: dict[str, Any]) -> None:
    case = Case(64, 32, 5, 5, rest=(4, 32, True), copies=True)
    narrow = replace(case, bits=change.get("bits", 4), copies=False)
    rest = change.get("rest", {"bits": 4})
    if rest is not None and rest["bits"] == 8:
        narrow = replace(narrow, rest=(8, 32, True))
    tensors = tensors_of(narrow)
    settings = settings_of(narrow) | {"copies": True}
    settings["rest"] = None if rest is None else settings["rest"]
    with pytest.raises(ValueError, match="without 4-bit copies"):
        _native.FfnLayer.pack(settings, tensors)
