"""The native decode step against the PyTorch path: same numbers and cache; when it stands back.

Shape suffixes: N rows, D width, V vocabulary.
"""

import copy
import functools
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from hireconvert.attention import round_rows
from hireconvert.runtime import hire_native
from tests.ffn_reference import relative
from tests.native import LEVELS, _native
from tests.tiny import base_of, hire_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
FAMILIES = ("llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
FFN = {"keep_fraction": 0.4, "keep": "candidates", "unselected": {}}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CLOSE = 1e-5


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    monkeypatch.setenv(_native.VARIABLE, request.param)
    return request.param


@functools.cache
def made(family: str) -> Any:
    return hire_model(tiny_model(family), ffn=FFN)


def prepared(family: str) -> Any:
    model = copy.deepcopy(made(family))
    model.hire_prepare()
    assert base_of(model).hire_step.reason is None
    return model


class Spy:
    """Counts the steps that ran natively."""

    def __init__(self, model: Any) -> None:
        self.steps, self.tried = 0, 0
        step = getattr(model, "hire_step", None) or base_of(model).hire_step
        hidden = step.hidden

        def counted(*args: Any) -> Any:
            output = hidden(*args)
            self.tried += 1
            self.steps += output is not None
            return output

        step.hidden = counted
        opened = step.open

        def watched(*args: Any) -> Any:
            tokens = opened(*args)
            if tokens is not None:
                tokens.next = functools.partial(self._token, tokens.next)
            return tokens

        step.open = watched

    def _token(self, token: Any, *args: Any, **kwargs: Any) -> Any:
        output = token(*args, **kwargs)
        self.steps += output is not None
        return output


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, prompt: int, *, queries: int = 1, cache: Any = None):
    """(logits, or a base model's hidden states, of everything behind the prompt, the cache)."""
    cache = model(ids[:, :prompt], past_key_values=cache, use_cache=True).past_key_values
    logits = []
    for some in ids[:, prompt:].split(queries, dim=1):
        out = model(some, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out[0])
    return torch.cat(logits, dim=1), cache


def assert_same_cache(found: Any, expected: Any, tolerance: float = CLOSE) -> None:
    assert len(found.layers) == len(expected.layers)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert type(layer) is type(other)
        assert layer.get_seq_length() == other.get_seq_length()
        assert layer.keys.shape == other.keys.shape and layer.keys.dtype == other.keys.dtype
        assert relative(layer.keys, other.keys) < tolerance
        assert relative(layer.values, other.values) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_decodes_as_pytorch_does(family, level):
    model, ids = prepared(family), tokens(1, 36)
    spy, found = Spy(model), {}
    for step in (True, False):
        model.set_hire_scope("decode", step=step)
        logits, cache = decode(model, ids, 9)  # beyond the sliding window of 16
        found[step] = logits, cache, model.hire_stats(reset=True)
    assert spy.steps == 27
    assert relative(found[True][0], found[False][0]) < CLOSE
    assert_same_cache(found[True][1], found[False][1])
    assert found[True][2] == found[False][2]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_several_positions_at_once_are_those_one_by_one(family, level):
    model, ids = base_of(prepared(family)), tokens(1, 30)
    model.hire_state.max_sparse_rows = hire_native.MOST_ROWS
    spy = Spy(model)
    one, cache = decode(model, ids, 8)
    for queries in (2, 3, 5, 9, 22):
        several, other = decode(model, ids, 8, queries=queries)
        assert torch.equal(one, several)
        for layer, same in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(layer.keys, same.keys) and torch.equal(layer.values, same.values)
    assert spy.steps == spy.tried == 22 + 11 + 8 + 5 + 3 + 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bits_do_not_depend_on_the_number_of_threads(family, level):
    model, ids, before, found = prepared(family), tokens(1, 20), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(1)
            cache = model(ids[:, :9], use_cache=True).past_key_values
            torch.set_num_threads(threads)
            spy = Spy(model)
            found.append(decode(model, ids[:, 9:], 1, cache=cache)[0])
            assert spy.steps == 11
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


ODD = {
    "multi_query": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "odd_heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    "odd_width": {"hidden_size": 36, "intermediate_size": 70, "head_dim": 12},
    "wide_heads": {"head_dim": 80, "num_key_value_heads": 4},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "scaled_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "moving_rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "eager": {"attn_implementation": "eager"},
    "two_ropes": {
        "family": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 6,
    },
    "soft_cap": {"family": "gemma2", "attn_implementation": "eager"},
}


MOVING = ("moving_rope", 3)  # angles that depend on the length: of one sequence alone


def odd_model(family: str = "llama", **settings: Any) -> Any:
    config = copy.deepcopy(tiny_model(family).config)
    attention = settings.pop("attn_implementation", None)
    config.update({"num_hidden_layers": 2, **settings})
    torch.manual_seed(3)
    native = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    native.config.architectures = [type(native).__name__]
    for name, parameter in native.named_parameters():
        noise = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1)
        parameter.data = noise + (1.0 if "norm" in name else 0.0)
    native.tie_weights()
    return hire_model(native.eval(), ffn=FFN)


@pytest.mark.parametrize(
    ("name", "sequences"), [(name, num) for name in ODD for num in (1, 3) if (name, num) != MOVING]
)
def test_odd_sizes_and_settings(name, sequences, level):
    model, ids = odd_model(**ODD[name]), tokens(sequences, 24)
    model.hire_prepare()
    spy = Spy(model)
    found, cache = decode(model, ids, 7)
    assert spy.steps == 17, base_of(model).hire_step.reason
    model.set_hire_scope("decode", step=False)
    expected, other = decode(model, ids, 7)
    assert relative(found, expected) < 2 * CLOSE
    assert_same_cache(cache, other, 2 * CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_sixteen_bits_are_no_further_from_the_truth_than_pytorch(family, dtype, level):
    # Every neuron is kept: a choice that tips over would drown the rounding.
    everything = {"keep_fraction": 1.0, "over_select": 1.0}
    model = hire_model(tiny_model(family), ffn=everything).to(dtype)
    model.hire_prepare()
    exact = copy.deepcopy(model).double()
    spy, ids, found = Spy(model), tokens(1, 30), {}
    for step in (True, False):
        model.set_hire_scope("decode", step=step)
        found[step] = decode(model, ids, 4)[0].double()
    assert spy.steps == 26
    exact.set_hire_scope("off")
    expected = decode(exact, ids, 4)[0]
    error, torchs = ((found[step] - expected).norm() for step in (True, False))
    assert error <= 2 * torchs and error < 0.05 * expected.norm()


@pytest.mark.parametrize("ffn", [None, {"keep_fraction": 1.0, "over_select": 1.0}])
def test_dense_ffns_run_too(ffn, level):
    model, ids = hire_model(tiny_model("llama"), ffn=ffn, head={}), tokens(1, 16)
    spy = Spy(model)
    found, _ = decode(model, ids, 5)
    assert spy.steps == 11
    counted = model.hire_stats(reset=True)
    model.set_hire_scope("decode", step=False)
    expected, _ = decode(model, ids, 5)
    assert relative(found, expected) < CLOSE
    assert model.hire_stats()["ffn"] == counted["ffn"]


@pytest.mark.parametrize("block", [32, 64])
def test_attention_on_a_grid_is_read_as_codes(block, level):
    model, names = copy.deepcopy(made("qwen2")), ["self_attn.q_proj", "self_attn.o_proj"]
    model.config.hire["attention"] = {"block": block, "matrices": dict.fromkeys(names, 8)}
    base, ids = base_of(model), tokens(1, 16)
    for layer in base.layers:
        for name in names:
            weight = layer.get_submodule(name).weight
            weight.data = round_rows(weight.data, block)
    spy = Spy(model)
    found, _ = decode(model, ids, 5)
    given = base.hire_step.blocks[0].matrices
    assert [type(given[key]).__name__ for key in "qkvo"] == ["Codes", "Matrix", "Matrix", "Codes"]
    model.set_hire_scope("decode", step=False)
    assert relative(found, decode(model, ids, 5)[0]) < 2 * CLOSE
    base.layers[0].self_attn.q_proj.weight.data[3].mul_(0.5)  # another row of the same grid
    base.layers[1].self_attn.q_proj.weight.data[3].add_(0.1)  # off the grid
    model.set_hire_scope("decode")
    found, _ = decode(model, ids, 5)
    types = [type(block.matrices["q"]).__name__ for block in base.hire_step.blocks]
    assert types == ["Codes", "Matrix"] and spy.steps == 22
    model.set_hire_scope("decode", step=False)
    assert relative(found, decode(model, ids, 5)[0]) < 2 * CLOSE


# --------------------------------------------------------------------------- caches


def test_generate_gives_the_same_tokens_and_says_how(caplog, tmp_path):
    prepared("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hire"):
        model = type(prepared("llama")).from_pretrained(tmp_path).eval()
    assert f"native decode step ({_native.machinery()})" in caplog.text
    spy, ids = Spy(model), tokens(1, 6)
    found = model.generate(ids, max_new_tokens=30, **GREEDY)
    assert spy.steps == 29
    model.set_hire_scope("decode", step=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=30, **GREEDY))
    assert spy.steps == 29


def test_what_others_hold_of_a_cache_is_never_written_to():
    model, ids = prepared("llama"), tokens(1, 24)
    _, cache = decode(model, ids[:, :12], 6)
    kept = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    twin, shallow = copy.deepcopy(cache), DynamicCache()
    for index, layer in enumerate(cache.layers):
        shallow.update(layer.keys[:, :, :0], layer.values[:, :, :0], index)
        shallow.layers[index].keys, shallow.layers[index].values = layer.keys, layer.values
    cache.crop(-4)
    others = [decode_on(model, ids[:, 14:], one) for one in (cache, twin, shallow)]
    assert all(torch.equal(tensor, copied) for tensor, copied in kept)
    assert torch.equal(others[1], others[2]) and not torch.equal(others[0], others[1])
    again = decode(model, torch.cat([ids[:, :8], ids[:, 14:]], dim=1), 6)[0][:, 2:]
    assert torch.equal(others[0], again)


@torch.no_grad()
def decode_on(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    outputs = [model(i, past_key_values=cache, use_cache=True)[0] for i in ids.split(1, dim=1)]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_paths_may_take_turns_on_one_cache(family):
    model, ids = prepared(family), tokens(1, 40)
    model.set_hire_scope("decode", step=False)
    expected, other = decode(model, ids, 8)
    cache, logits, spy = None, [], Spy(model)
    for index, position in enumerate(range(8, 40)):
        model.set_hire_scope("decode", step=index % 5 != 3)
        if cache is None:
            cache = model(ids[:, :8], use_cache=True).past_key_values
        logits.append(decode_on(model, ids[:, position : position + 1], cache))
    assert spy.steps == 26
    assert relative(torch.cat(logits, dim=1), expected) < CLOSE
    assert_same_cache(cache, other)


def test_a_long_cache_moves_to_larger_buffers(monkeypatch):
    from hireconvert.runtime import hire_cache

    monkeypatch.setattr(hire_cache, "_SPARE", 3)
    for family in ("llama", "gemma3_text"):
        model, ids = prepared(family), tokens(1, 60)
        found, cache = decode(model, ids, 6)
        model.set_hire_scope("decode", step=False)
        expected, other = decode(model, ids, 6)
        assert relative(found, expected) < CLOSE
        assert_same_cache(cache, other)


def test_batches_beams_and_reordered_caches():
    model, ids = prepared("llama"), tokens(1, 6)
    asked = {"max_new_tokens": 8, "num_beams": 2, **GREEDY}
    beams = model.generate(ids, **asked)
    _, cache = decode(model, ids, 4)
    cache.reorder_cache(torch.tensor([0]))
    spy = Spy(model)
    after = decode_on(model, ids[:, :1], cache)
    cache.batch_repeat_interleave(2)
    both = decode_on(model, ids[:, 1:2].repeat(2, 1), cache)
    assert spy.steps == 2 and torch.equal(both[0], both[1])
    cache.batch_select_indices(torch.tensor([1]))
    decode_on(model, ids[:, 2:3], cache)
    assert spy.steps == 3 and cache.get_seq_length() == 9 and after.shape[0] == 1
    model.set_hire_scope("decode", step=False)
    assert torch.equal(beams, model.generate(ids, **asked))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_decoding_verifies_several_tokens(family):
    model, ids = prepared(family), tokens(1, 6).repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=24, **GREEDY)
    spy = Spy(model)
    guided = model.generate(ids, max_new_tokens=24, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(plain, guided) and spy.steps > 0


# --------------------------------------------------------------------------- several sequences


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [S, P], mask) of sequences padded on the left."""
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens(len(lengths), longest) * mask, mask.long()


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_decode_as_pytorch_does(family, level):
    model, (ids, mask) = prepared(family), padded([20, 3, 9, 20, 1])
    spy, found = Spy(model), {}
    asked = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    for step in (True, False):
        model.set_hire_scope("decode", step=step)
        made = model.generate(ids, attention_mask=mask, **asked)
        found[step] = torch.stack(made.logits), made.past_key_values, model.hire_stats(reset=True)
    assert spy.steps == 11
    assert relative(found[True][0], found[False][0]) < 2 * CLOSE
    assert_same_cache(found[True][1], found[False][1], 2 * CLOSE)
    assert found[True][2] == found[False][2]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_sequence_has_the_bits_it_has_alone(family, level):
    model, ids = base_of(prepared(family)), tokens(7, 30)
    spy, alone, together = Spy(model), [], DynamicCache(config=model.config)
    for row in ids:
        cache = model(row[None, :20], use_cache=True).past_key_values
        alone.append((cache, copy.deepcopy(cache)))
    for index in range(len(alone[0][0].layers)):
        layers = [cache.layers[index] for _, cache in alone]
        keys, values = (torch.cat([getattr(one, kind) for one in layers]) for kind in KINDS)
        together.update(keys, values, index)
        if layers[0].is_sliding:  # what the layer had dropped counts as well
            together.layers[index].cumulative_length = layers[0].cumulative_length
    expected = [
        decode_on(model, row[None, 20:], cache) for row, (cache, _) in zip(ids, alone, strict=True)
    ]
    assert torch.equal(decode_on(model, ids[:, 20:], together), torch.cat(expected))
    assert spy.steps == 10 * (len(ids) + 1)


KINDS = ("keys", "values")


@torch.no_grad()
def test_sequences_that_are_not_served_run_in_pytorch():
    model, (ids, mask) = prepared("llama"), padded([9, 5, 9])
    spy = Spy(model)

    def steps(number: int = 3, **more: Any) -> int:
        repeated = ids[:1].repeat(number, 1) if number > 3 else ids[:number]
        cache = model(repeated, use_cache=True).past_key_values
        before = spy.steps
        new = more.pop("new", 1)
        model(repeated[:, :new], past_key_values=cache, use_cache=True, **more)
        return spy.steps - before

    one_more = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    assert steps() == steps(attention_mask=one_more) == 1
    assert steps(position_ids=torch.tensor([[9], [5], [40]])) == 1
    hole, last = one_more.clone(), one_more.clone()
    hole[0, 4] = last[0, -1] = 0
    assert steps(attention_mask=hole) == steps(attention_mask=last) == 0
    assert steps(position_ids=torch.tensor([[9]])) == steps(new=2) == 0
    model.hire_state.max_sparse_rows = 40
    assert steps(32) == 1 and steps(33) == 0
    model = odd_model(**ODD["moving_rope"])
    spy = Spy(model)
    assert steps(1) == 1 and steps(3) == 0


@torch.no_grad()
def test_a_sequence_with_nan_sends_the_step_to_pytorch():
    model, ids = prepared("llama"), tokens(3, 8)
    spy, cache = Spy(model), model(ids, use_cache=True).past_key_values
    embedded = base_of(model).embed_tokens(ids[:, :1]).detach().clone()
    embedded[1] = float("nan")
    broken = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).logits
    assert spy.tried == 1 and spy.steps == 0
    assert broken[1].isnan().all() and broken[::2].isfinite().all()
    assert cache.get_seq_length() == 9


# --------------------------------------------------------------------------- standing back


def one_more(model: Any, cache: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(tokens(1, 1), past_key_values=cache, use_cache=True, **more)


def test_calls_that_ask_for_more_run_in_pytorch():
    model, ids = prepared("llama"), tokens(1, 8)
    spy, cache = Spy(model), model(ids, use_cache=True).past_key_values
    asked: list[dict[str, Any]] = [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.tensor([[0] + [1] * 10])},
        {"position_ids": torch.tensor([[3]])},
    ]
    for more in asked:
        out = one_more(model, cache, **more)
        assert out.logits.shape == (1, 1, model.config.vocab_size)
        assert bool(more.get("output_hidden_states")) == (out.hidden_states is not None)
    assert spy.tried == 4 and spy.steps == 0
    one_more(model, cache, attention_mask=torch.ones(1, 13, dtype=torch.int64))
    one_more(model, cache, position_ids=torch.tensor([[13]]))
    assert spy.steps == 2
    out = model(tokens(1, 1), past_key_values=cache, use_cache=True)  # with gradients
    assert out.logits.requires_grad and spy.steps == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one_more(model, cache)
    assert spy.steps == 2


def test_left_padding_and_other_caches_run_in_pytorch():
    model, ids = prepared("llama"), tokens(1, 8)
    spy, mask = Spy(model), torch.tensor([[0, 0] + [1] * 6])
    expected = model.generate(ids[:, 2:], max_new_tokens=5, **GREEDY)[:, 6:]
    native, spy.steps = spy.steps, 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)[:, 8:]
    static = model.generate(ids[:, 2:], max_new_tokens=5, cache_implementation="static", **GREEDY)
    assert native == 4 and spy.steps == 0
    assert torch.equal(padded, expected) and torch.equal(static[:, 6:], expected)


def test_hooks_are_heard():
    model, ids = prepared("llama"), tokens(1, 8)
    spy, cache = Spy(model), model(ids, use_cache=True).past_key_values
    heard: list[Any] = []
    layer = base_of(model).layers[1]
    for module in (layer, layer.self_attn.k_proj, layer.input_layernorm, layer.mlp):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *args: heard.append(len(args)))
            one_more(model, cache)
            hook.remove()
    assert len(heard) == 8 and spy.steps == 0
    one_more(model, cache)
    assert spy.steps == 1


def test_weights_that_change_are_seen():
    model, ids = prepared("qwen2"), tokens(1, 14)
    base, spy = base_of(model), Spy(model)
    layer = base.layers[0]
    changes = [
        lambda: layer.self_attn.q_proj.weight.data.mul_(1.5),
        lambda: layer.self_attn.k_proj.bias.data.add_(0.5),
        lambda: layer.input_layernorm.weight.data.mul_(0.5),
        lambda: setattr(layer.self_attn.o_proj, "weight", nn.Parameter(torch.randn(32, 32))),
        lambda: layer.mlp.down_proj.weight.data.mul_(2.0),
        lambda: setattr(layer.self_attn, "v_proj", nn.Linear(32, 16)),
    ]
    before = decode(model, ids, 6)[0]
    for change in changes:
        change()
        found = decode(model, ids, 6)[0]
        assert not torch.equal(found, before)
        fresh = copy.deepcopy(model)
        fresh.set_hire_scope("decode", step=False)
        assert relative(found, decode(fresh, ids, 6)[0]) < 2 * CLOSE
        before = found
    assert spy.steps == spy.tried == 56


def test_nan_in_an_ffn_leaves_the_step_to_pytorch():
    model, ids = prepared("llama"), tokens(1, 12)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens(1, 12)[0, 9], 3] = float("nan")
    spy = Spy(model)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    decode_on(model, ids[:, 8:9], cache)
    model.hire_stats(reset=True)
    out = decode_on(model, ids[:, 9:10], cache)
    assert spy.tried == 2 and spy.steps == 1
    assert out.isnan().all() and cache.get_seq_length() == 10
    counts = model.hire_stats()["ffn"]
    assert counts["rows"] == counts["dense_rows"] == 3 and counts["kept"] == 0


def test_switches(monkeypatch, tmp_path):
    model, ids = prepared("llama"), tokens(1, 10)
    for value, reason in (("ffn", "switched off"), ("off", "switched off"), ("", None)):
        monkeypatch.setenv(_native.VARIABLE, value)
        model.hire_prepare()
        assert base_of(model).hire_step.reason == reason
        spy = Spy(model)
        decode(model, ids, 6)
        assert bool(spy.steps) == (reason is None)
    assert _native.level() is not None


# --------------------------------------------------------------------------- unknown families


def test_a_layer_that_computes_something_else_takes_the_pytorch_path():
    class Tripled(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * x / x.square().mean(-1, keepdim=True).sqrt() * self.weight

    model = prepared("llama")
    base_of(model).layers[1].input_layernorm = Tripled(32)
    model.hire_prepare()
    assert base_of(model).hire_step.reason == "norm Tripled"
    model = prepared("llama")
    attention = type(base_of(model).layers[0].self_attn)
    odd = type("OddAttention", (attention,), {})

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = attention.forward(self, hidden_states, *args, **kwargs)
        return 1.1 * out, weights

    odd.forward = forward
    base_of(model).layers[2].self_attn.__class__ = odd
    model.hire_prepare()
    assert "computes something else" in base_of(model).hire_step.reason
    model = prepared("llama")
    norm = base_of(model).norm
    base_of(model).norm = nn.Identity()
    base_of(model).norm.weight = norm.weight
    model.hire_prepare()
    assert base_of(model).hire_step.reason == "norm Identity"


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2"])
def test_families_of_other_parts_take_the_pytorch_path(family):
    model = hire_model(tiny_model(family), ffn=FFN)
    model.hire_prepare()
    assert " of [" in base_of(model).hire_step.reason
    spy = Spy(model)
    decode(model, tokens(1, 8), 5)
    assert spy.steps == 0


def test_copies_have_a_step_of_their_own():
    model, ids = prepared("llama"), tokens(1, 10)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        base_of(twin).layers[0].self_attn.q_proj.weight.mul_(0.0)
    assert not torch.equal(decode(model, ids, 5)[0], decode(twin, ids, 5)[0])
    spy = Spy(twin)
    decode(twin, ids, 5)
    assert spy.steps == 5
