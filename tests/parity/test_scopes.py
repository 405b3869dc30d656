"""Who selects: decoding, scopes, limits; and derived tensors that follow their weights."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import FAMILIES, base_of, hire_model, stepwise, tiny_model, tokens

FFN = {"keep_fraction": 0.4}


def rows(model: Any) -> int:
    layers = model.hire_stats(reset=True)["layers"]
    counts = {layer["rows"] for layer in layers.values()}
    assert len(counts) == 1
    return counts.pop()


@torch.no_grad()
def one_pass(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_equals_scope_all(family):
    model = hire_model(tiny_model(family), ffn=FFN)
    ids = tokens(1, 40)
    decoded = stepwise(model, ids)
    assert rows(model) == 39
    model.set_hire_scope("all", dense_prefix=1)
    scored = one_pass(model, ids)
    assert rows(model) == 40
    assert torch.allclose(decoded, scored, rtol=1e-3, atol=2e-4)
    model.set_hire_scope("all", dense_prefix=0)
    assert not torch.allclose(decoded[:, :8], one_pass(model, ids)[:, :8], atol=2e-3)
    model.set_hire_scope("off")
    model.hire_stats(reset=True)
    assert not torch.allclose(decoded, one_pass(model, ids), atol=2e-3)
    assert rows(model) == 0


def test_scope_all_works_over_a_cache_and_in_a_batch():
    model = hire_model(tiny_model("llama"), ffn=FFN)
    ids = tokens(3, 20)
    model.set_hire_scope("all", dense_prefix=6)
    whole = one_pass(model, ids)
    counted = model.hire_stats(reset=True)["ffn"]
    assert counted["dense_rows"] == 3 * 6 * 3 and counted["rows"] == 3 * 20 * 3
    with torch.no_grad():
        head = model(ids[:, :4], use_cache=True)
        tail = model(ids[:, 4:], past_key_values=head.past_key_values, use_cache=True)
    joined = torch.cat([head.logits, tail.logits], dim=1)
    assert torch.allclose(joined, whole, rtol=1e-3, atol=2e-4)
    assert model.hire_stats()["ffn"]["dense_rows"] == 3 * 6 * 3


def test_scope_off_is_the_native_model_bit_for_bit():
    native = tiny_model("gemma3_text")
    model = hire_model(native, ffn=FFN, head={})
    model.set_hire_scope("off")
    assert torch.equal(one_pass(model, tokens(2, 20)), one_pass(native, tokens(2, 20)))
    assert torch.equal(stepwise(model, tokens(1, 9)), stepwise(native, tokens(1, 9)))


def test_prefill_is_dense_bit_for_bit():
    native = tiny_model("qwen3")
    model = hire_model(native, ffn=FFN, head={})
    assert torch.equal(one_pass(model, tokens(2, 50)), one_pass(native, tokens(2, 50)))
    assert rows(model) == 0


def test_scopes_are_checked():
    model = hire_model(tiny_model("llama"), head={})
    with pytest.raises(ValueError, match="expected one of"):
        model.set_hire_scope("sometimes")
    with pytest.raises(ValueError, match="at least 0"):
        model.set_hire_scope("all", dense_prefix=-1)


@torch.no_grad()
def grow(model: Any, cached: int, queries: int, batch: int = 1) -> None:
    cache = model(tokens(batch, cached), use_cache=True).past_key_values
    model(tokens(batch, queries), past_key_values=cache, use_cache=True)


def test_decoding_is_at_most_max_decode_queries_long():
    limits = {"max_decode_queries": 5, "max_sparse_rows": 64}
    model = hire_model(tiny_model("llama"), ffn=FFN, head={}, **limits)
    grow(model, 4, 5)
    assert rows(model) == 5
    grow(model, 4, 6)
    assert rows(model) == 0
    assert model.hire_stats()["dense_fallbacks"] == 0  # a long query is prefill, not a fallback


def test_more_rows_than_max_sparse_rows_run_dense_counted_and_said_once(caplog):
    model = hire_model(tiny_model("llama"), ffn=FFN, head={}, max_sparse_rows=6)
    grow(model, 4, 2, batch=3)
    assert rows(model) == 6
    with caplog.at_level(logging.WARNING, logger="hire"):
        for _ in range(2):
            grow(model, 4, 7)
    assert model.hire_stats()["dense_fallbacks"] == 2
    assert rows(model) == 0
    assert len([r for r in caplog.records if "max_sparse_rows is 6" in r.message]) == 1


def test_positional_arguments_are_understood():
    native = tiny_model("gpt2")
    model = hire_model(native, ffn=FFN)
    with torch.no_grad():
        cache = model(tokens(1, 4), use_cache=True).past_key_values
        model(tokens(1, 1), cache)
    assert rows(model) == 1


def test_embeddings_instead_of_ids():
    model = hire_model(tiny_model("llama"), ffn=FFN)
    ids = tokens(1, 9)
    model.set_hire_scope("all")
    with torch.no_grad():
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(by_embeds, one_pass(model, ids)) and rows(model) == 18


def test_statistics_are_consistent():
    model = hire_model(
        tiny_model("llama"), ffn={"keep_fraction": 0.25, "over_select": 1.5}, head={}
    )
    stepwise(model, tokens(1, 11))
    stats = model.hire_stats(reset=True)
    assert stats["ffn"]["kept"] == 10 * 3 * 24 and stats["ffn"]["candidates"] == 10 * 3 * 36
    assert stats["head"]["rescored"] >= 10 * 4
    empty = model.hire_stats()
    assert not any(empty["ffn"].values()) and not any(empty["head"].values())


# ------------------------------------------------------------ derived tensors follow the weights


def matrices(model: Any, part: str) -> list[nn.Parameter]:
    if part == "head":
        return [model.get_output_embeddings().weight]
    return [
        getattr(layer.mlp, name).weight
        for layer in base_of(model).layers
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def noise(weight: torch.Tensor, seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def in_place(model: Any, part: str) -> None:
    with torch.no_grad():
        for seed, weight in enumerate(matrices(model, part)):
            weight.add_(noise(weight, seed))


def through_data(model: Any, part: str) -> None:
    for seed, weight in enumerate(matrices(model, part)):
        weight.data += noise(weight, seed)


def new_storage(model: Any, part: str) -> None:
    for seed, weight in enumerate(matrices(model, part)):
        weight.data = weight.data + noise(weight, seed)


def loaded(model: Any, part: str) -> None:
    other = copy.deepcopy(model)
    in_place(other, part)
    model.load_state_dict(other.state_dict())


def assigned(model: Any, part: str) -> None:
    other = copy.deepcopy(model)
    in_place(other, part)
    model.load_state_dict(other.state_dict(), assign=True)
    model.tie_weights()


def narrowed(model: Any, part: str) -> None:
    model.to(torch.bfloat16)


CHANGES = (in_place, through_data, new_storage, loaded, assigned, narrowed)


def fresh(model: Any) -> Any:
    """The same weights and predictors in a model that never derived anything before."""
    twin = copy.deepcopy(model)
    for layer in base_of(twin).hire_layers.values():
        layer.prepared = None
    head = getattr(twin.get_output_embeddings(), "hire", None)
    if head is not None:
        head.prepared = None
    return twin


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("part", ["ffn", "head"])
@pytest.mark.parametrize("scope", ["decode", "all"])
def test_a_changed_weight_is_seen_at_the_next_use(change, part, scope):
    settings = {"ffn": FFN} if part == "ffn" else {"head": {"bits": 4, "certify_top": 2}}
    model = hire_model(tiny_model("llama_bias"), **settings)
    run = stepwise if scope == "decode" else one_pass
    model.set_hire_scope(scope)
    ids = tokens(1, 10)
    before = run(model, ids)
    change(model, part)
    after = run(model, ids)
    assert torch.equal(after, run(fresh(model), ids))
    assert not torch.equal(after, before)
    assert rows(model) > 0 if part == "ffn" else model.hire_stats()["head"]["rows"] > 0


@pytest.mark.parametrize("part", ["ffn", "head"])
def test_a_weight_changed_between_two_decoding_steps_is_seen(part):
    settings = {"ffn": FFN} if part == "ffn" else {"head": {"bits": 4, "certify_top": 2}}
    model = hire_model(tiny_model("llama_bias"), **settings)
    with torch.no_grad():
        cache = model(tokens(1, 6), use_cache=True).past_key_values
        model(tokens(1, 1), past_key_values=copy.deepcopy(cache))
        in_place(model, part)
        after = model(tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits
        expected = fresh(model)(tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(after, expected)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gemma2", "opt"])
@pytest.mark.parametrize("size", [80, 120])
def test_a_resized_vocabulary_keeps_the_sparse_head(family, size):
    native = tiny_model(family)
    model = hire_model(native, head={}, ffn=FFN)
    ids = tokens(1, 8).clamp(max=79)
    stepwise(model, ids)
    torch.manual_seed(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.hire_stats(reset=True)
    logits = stepwise(model, ids)
    assert logits.shape[-1] == size and model.hire_stats()["head"]["rows"] == 7
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == native.config.tie_word_embeddings
    model.set_hire_scope("decode", head=False)
    assert torch.equal(logits.argmax(-1), stepwise(model, ids).argmax(-1))


class Adapter(nn.Module):
    """A LoRA layer in miniature: it wraps a Linear and adds to its output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.extra(x)


def test_a_wrapped_matrix_runs_dense_until_it_is_merged(caplog):
    torch.manual_seed(0)
    model = hire_model(tiny_model("llama"), ffn=FFN)
    ids = tokens(1, 8)
    stepwise(model, ids)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Adapter(mlp.up_proj)
    model.hire_stats(reset=True)
    with caplog.at_level(logging.WARNING, logger="hire"):
        wrapped = stepwise(model, ids)
    assert "every row runs dense" in caplog.text
    stats = model.hire_stats(reset=True)
    assert stats["ffn"]["rows"] == 0 and stats["dense_fallbacks"] == 7
    model.set_hire_scope("all")
    assert torch.allclose(one_pass(model, ids), wrapped, atol=1e-4)
    model.set_hire_scope("decode")
    adapter = mlp.up_proj
    adapter.base.weight.data += adapter.extra.weight.data
    mlp.up_proj = adapter.base
    merged = stepwise(model, ids)
    assert rows(model) == 7
    assert torch.equal(merged, stepwise(fresh(model), ids))


@torch.inference_mode()
def test_models_made_under_inference_mode_decode():
    model = hire_model(tiny_model("llama_bias"), ffn=FFN, head={})
    model = copy.deepcopy(model)
    stepwise(model, tokens(1, 5))
    model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False)
    assert rows(model) > 4


def test_missing_predictors_are_named():
    model = hire_model(tiny_model("llama"), ffn=FFN)
    for layer in base_of(model).hire_layers.values():
        layer.predictor_tensors = {}
    with pytest.raises(RuntimeError, match="predictor tensors are not loaded"):
        one_pass(model, tokens(1, 3))
