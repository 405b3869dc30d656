"""Attention in codes of 8 and 4 bits: the native step against PyTorch over dense weights."""

import copy
from typing import Any

import pytest
import torch

from hireconvert.attention import attention_matrices, round_attention
from hireconvert.families import find_layout
from tests.ffn_reference import relative
from tests.native import LEVELS, _native
from tests.tiny import base_of, hire_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
FFN = {"keep_fraction": 0.4, "keep": "candidates", "unselected": {}}


def made(family: str, block: int, dtype: torch.dtype, bits: tuple[int, ...] = (8,) * 4) -> Any:
    native = tiny_model(family)
    layout = find_layout(native)
    names = attention_matrices(native, layout)
    attention = {"block": block, "matrices": dict(zip(names, bits, strict=True))}
    native = native.to(dtype)
    round_attention(native, layout, attention)
    model = hire_model(native, ffn=FFN)
    model.config.hire["attention"] = attention
    model.hire_prepare()
    return model


def matrices(model: Any) -> list[Any]:
    step = base_of(model).hire_step
    assert step.reason is None
    blocks = step._plan.step.blocks
    return [block.matrices[name] for block in blocks for name in ("q", "k", "v", "o")]


@torch.no_grad()
def decoded(model: Any) -> torch.Tensor:
    """Logits of six steps behind a prompt of five tokens."""
    ids = tokens(1, 11)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    logits = [
        model(one, past_key_values=cache, use_cache=True).logits for one in ids[:, 5:].split(1, 1)
    ]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str
)
@pytest.mark.parametrize("bits", [(8, 8, 8, 8), (4, 4, 4, 4), (4, 8, 8, 4)], ids=str)
def test_codes_compute_what_dense_weights_do(
    bits: tuple[int, ...],
    family: str,
    level: str,
    dtype: torch.dtype,
    close: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(_native.VARIABLE, level)
    model = made(family, 32, dtype, bits)
    found = matrices(model)
    assert [matrix.bits for matrix in found] == list(bits) * (len(found) // 4)
    found = decoded(model)
    monkeypatch.setenv(_native.VARIABLE, "off")
    model.hire_prepare()
    assert relative(found.float(), decoded(model).float()) < close


def test_weights_off_the_grid_are_read_as_they_are() -> None:
    model = made("llama", 32, torch.float32)
    before = decoded(model)
    with torch.no_grad():
        base_of(model).layers[0].self_attn.q_proj.weight += 0.01
    model.hire_prepare()
    kinds = [type(matrix).__name__ for matrix in matrices(model)]
    assert kinds[0] == "Matrix" and set(kinds[1:]) == {"Codes"}
    assert relative(decoded(model), before) > 1e-4


def test_blocks_that_kernels_do_not_take_are_read_as_they_are() -> None:
    model = made("llama", 16, torch.float32)
    assert {type(matrix).__name__ for matrix in matrices(model)} == {"Matrix"}


def test_a_model_copied_keeps_its_codes() -> None:
    model = made("llama", 32, torch.float32)
    twin = copy.deepcopy(model)
    assert torch.equal(decoded(twin), decoded(model))
