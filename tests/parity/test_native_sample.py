"""The loop over tokens and whole tokens in one call, against transformers' own loop.

Shape suffixes: V vocabulary, D width.
"""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.generation import BaseStreamer, StoppingCriteria
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from hireconvert.runtime import hire_cache, hire_sample, hire_token
from tests.native import LEVELS, _native
from tests.tiny import base_of, hire_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
ROOT = Path(__file__).resolve().parents[2]
FFN = {"keep_fraction": 0.4, "keep": "candidates", "unselected": {}}
HEAD = {"certified": True, "certify_top": 4}
HEADS = {"none": None, "certified": HEAD, "estimated": {**HEAD, "certified": False}}
SAMPLING = {"do_sample": True, "top_k": 4, "temperature": 0.8}


@functools.cache
def made(family: str, head: str = "certified") -> Any:
    return hire_model(tiny_model(family), ffn=FFN, head=HEADS[head])


class Streamer(BaseStreamer):
    """Keeps what it is given, and calls `then` with the number of tokens so far."""

    def __init__(self, then: Any = None) -> None:
        self.heard, self.then = [], then

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.clone())
        if self.then is not None:
            self.then(len(self.heard))

    def end(self) -> None:
        self.heard.append(None)


class Found:
    """What one run of `generate` gave, and how many tokens went in one call."""

    def __init__(self, model: Any, ours: bool, monkeypatch: Any, **settings: Any) -> None:
        model = copy.deepcopy(model)
        settings = {key: make() if callable(make) else make for key, make in settings.items()}
        streamer = settings.get("streamer")
        if streamer is not None and streamer.then is not None:
            streamer.then = functools.partial(streamer.then, model)
        self.short, token = 0, hire_token.Tokens.next

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = token(*args, **kwargs)
            self.short += output is not None
            return output

        with monkeypatch.context() as patch:
            patch.setattr(hire_token.Tokens, "next", counted)
            if not ours:
                patch.setattr(hire_sample, "known", lambda: False)
            torch.manual_seed(5)
            given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            given = {"inputs": tokens(1, 7), "pad_token_id": 0, **given, **settings}
            self.output = model.generate(**given, return_dict_in_generate=True)
        self.stats, self.streamed = model.hire_stats(), getattr(streamer, "heard", None)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        alike = torch.equal(one.isnan(), other.isnan()) and one.dtype == other.dtype
        return alike and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_cache(one: Any, another: Any) -> None:
    for layer, other in zip(one.layers, another.layers, strict=True):
        assert same(layer.keys, other.keys) and same(layer.values, other.values)
        assert layer.get_seq_length() == other.get_seq_length()


def compare(model: Any, monkeypatch: Any, **settings: Any) -> int:
    """Assert that both loops give the same; how many tokens went in one call by ours."""
    ours = Found(model, True, monkeypatch, **settings)
    theirs = Found(model, False, monkeypatch, **settings)
    assert theirs.short == 0 and type(ours.output) is type(theirs.output)
    assert list(ours.output.keys()) == list(theirs.output.keys())
    for name in set(ours.output.keys()) - {"past_key_values"}:
        assert same(ours.output[name], theirs.output[name]), name
    assert_same_cache(ours.output.past_key_values, theirs.output.past_key_values)
    lowered = {"repetition_penalty", "min_new_tokens", "top_k"} & set(settings)
    if lowered and theirs.stats["head"]:  # ours are certified, theirs dense or of more rows
        for stats in (ours.stats, theirs.stats):
            stats["head"] = [stats["head"][name] for name in ("calls", "rows")]
    assert ours.stats == theirs.stats
    assert same(ours.streamed, theirs.streamed)
    return ours.short


# --------------------------------------------------------------------------- equal results


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_tokens_logits_cache_and_counters_are_those_of_transformers(family, head, monkeypatch):
    # The sliding windows of 16 positions begin to move.
    short = compare(made(family, head), monkeypatch, output_logits=True, max_new_tokens=24)
    assert short == 22  # the prompt and the first step go through the model's own methods
    assert compare(made(family, head), monkeypatch) == 10
    assert compare(made(family, head), monkeypatch, **SAMPLING) == 10


class Slow(StoppingCriteria):
    """Stops at the ninth token, and keeps what it saw."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), input_ids.shape[1] >= 16)


SETTINGS: dict[str, dict[str, Any]] = {
    "scores": {"output_scores": True, "output_logits": True},
    "sampled scores": {**SAMPLING, "output_scores": True},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "few rows": {**SAMPLING, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "output_logits": True},
    "few rows, penalty": {**SAMPLING, "top_p": 0.9, "repetition_penalty": 1.2},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "output_scores": True},
    "end": {"eos_token_id": list(range(3, 40))},
    "late end": {"eos_token_id": list(range(3, 40)), "min_new_tokens": 6},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "time": {"max_time": 1000.0},
    "criterion": {"stopping_criteria": lambda: [Slow()]},
    "processor": {"logits_processor": lambda: [lambda ids, scores: -scores + ids.shape[1]]},
    "streamer": {"streamer": Streamer},
    "sampled, streamed": {**SAMPLING, "streamer": Streamer},
    "whole numbers of 32 bits": {"inputs": lambda: tokens(1, 7).int()},
    "own cache": {"past_key_values": DynamicCache},
    "own cache, streamed": {"past_key_values": DynamicCache, "streamer": Streamer},
    "embeddings": {"inputs": None, "inputs_embeds": lambda: torch.randn(1, 5, 32)},
    "position ids": {"position_ids": lambda: torch.arange(7)[None]},
    "many positions": {"inputs": lambda: tokens(1, 250), "max_new_tokens": 14},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_mean_what_they_mean_to_transformers(settings, monkeypatch):
    short = compare(made("llama"), monkeypatch, **SETTINGS[settings])
    few = {"one token": 0, "two tokens": 0, "end": 0, "own cache, streamed": 0}
    assert short > 0 or few.get(settings) == 0


@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_sixteen_bits(level, monkeypatch):
    monkeypatch.setenv(_native.VARIABLE, level)
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(made("gemma3_text")).to(dtype)
        assert compare(model, monkeypatch, output_logits=True) == 10


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    """What the library computes: PyTorch reads the prompt, whose bits may, with one thread."""
    found, before = [], torch.get_num_threads()
    begin = hire_token.Tokens.__init__
    for threads in (1, 2, 3):

        def with_threads(*args: Any, threads: int = threads, **kwargs: Any) -> None:
            torch.set_num_threads(threads)
            begin(*args, **kwargs)

        torch.set_num_threads(1)
        with monkeypatch.context() as patch:
            patch.setattr(hire_token.Tokens, "__init__", with_threads)
            found.append(Found(made("gemma3_text"), True, monkeypatch))
    torch.set_num_threads(before)
    assert min(one.short for one in found) > 0
    for other in found[1:]:
        assert torch.equal(found[0].output.sequences, other.output.sequences)
        assert_same_cache(found[0].output.past_key_values, other.output.past_key_values)


def test_a_cache_that_grows_out_of_its_room_is_opened_anew(monkeypatch):
    monkeypatch.setattr(hire_cache, "_SPARE", 3)
    opened, tokens_of = [], hire_token.Tokens.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        tokens_of(self, *args, **kwargs)
        opened.append(self.left)

    monkeypatch.setattr(hire_token.Tokens, "__init__", counted)
    for family in ("llama", "gemma3_text"):
        opened.clear()
        assert compare(made(family), monkeypatch, max_new_tokens=40) == 38
        assert len(opened) > 3 and sum(opened) >= 38


def test_generation_goes_on_from_the_cache_of_another(monkeypatch):
    model, prompt = copy.deepcopy(made("gemma3_text")), tokens(1, 9)
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(prompt, max_new_tokens=24, **given)
    cache = DynamicCache(config=model.config)
    half = model.generate(prompt, max_new_tokens=12, past_key_values=cache, **given)
    kept = copy.deepcopy(cache)
    for held in (cache, kept):
        rest = model.generate(half, max_new_tokens=12, past_key_values=held, **given)
        assert torch.equal(rest, whole)
    assert cache.get_seq_length() == whole.shape[1] - 1
    with torch.no_grad():  # and a step of the model's own
        model(whole[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == whole.shape[1]


# --------------------------------------------------------------------------- standing back


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_token_that_meets_nan_is_left_to_pytorch(poison, monkeypatch):
    model = hire_model(tiny_model("llama_bias"), ffn=FFN, head=HEAD)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    sequence = copy.deepcopy(model).generate(tokens(1, 7), **given)[0].tolist()
    with torch.no_grad():  # of a token in the middle, from where on everything is NaN
        model.get_input_embeddings().weight[sequence[12]] = poison
    assert 0 < compare(model, monkeypatch) < 10


def test_hooks_are_heard_as_by_transformers_loop(monkeypatch):
    for path in ("", "model", "lm_head", "model.embed_tokens", "model.layers.1.self_attn.q_proj"):
        heard = []
        for ours in (True, False):
            model, calls = copy.deepcopy(made("llama")), []
            model.get_submodule(path).register_forward_hook(lambda *a, c=calls: c.append(len(a)))
            found = Found(model, ours, monkeypatch)
            heard.append(len(calls))
            assert found.short == 0
        assert heard[0] == heard[1] > 11


@pytest.mark.parametrize("path", ["", "model", "lm_head", "model.layers.1.self_attn.q_proj"])
def test_a_hook_that_comes_between_two_tokens_is_heard(path, monkeypatch):
    calls: list[int] = []

    def streamer() -> Streamer:
        calls.clear()

        def then(model: Any, count: int) -> None:
            if count == 6:
                module = model.get_submodule(path)
                module.register_forward_hook(lambda *args: calls.append(len(args)))

        return Streamer(then)

    assert compare(made("llama"), monkeypatch, streamer=streamer) == 3
    assert len(calls) == 12 + 1 - 6


def test_a_scope_that_changes_between_two_tokens_is_seen(monkeypatch):
    def streamer() -> Streamer:
        def then(model: Any, count: int) -> None:
            if count in (6, 9):
                model.set_hire_scope("off" if count == 6 else "decode")

        return Streamer(then)

    assert 0 < compare(made("llama"), monkeypatch, streamer=streamer) < 10


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2}, {"output_hidden_states": True}, {"cache_implementation": "static"},
        {"inputs": lambda: tokens(2, 7)}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3},
        {"attention_mask": lambda: torch.tensor([[0, 1, 1, 1, 1, 1, 1]])},
    ],
    ids=lambda asked: next(iter(asked)),
)  # fmt: skip
def test_calls_that_ask_for_more_run_as_they_are(asked, monkeypatch):
    settings = {"disable_compile": True, **asked}
    ours = Found(made("llama"), True, monkeypatch, **settings)
    theirs = Found(made("llama"), False, monkeypatch, **settings)
    assert ours.short == 0
    assert torch.equal(ours.output.sequences, theirs.output.sequences)


def test_methods_of_ones_own_are_called(monkeypatch):
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "forward"):
        model, calls = copy.deepcopy(made("llama")), []
        method = getattr(model, name)

        def counted(*args: Any, method: Any = method, calls: Any = calls, **kwargs: Any) -> Any:
            calls.append(1)
            return method(*args, **kwargs)

        functools.update_wrapper(counted, method)
        setattr(model, name, counted)
        model.generate(tokens(1, 7), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert len(calls) == 12
    model = copy.deepcopy(made("llama"))
    model.__class__ = type("Derived", (type(model),), {})
    assert Found(model, True, monkeypatch).short == 0


def test_the_loop_that_is_repeated_is_the_installed_one(monkeypatch):
    hire_sample.known.cache_clear()
    assert hire_sample.known()  # if not: read transformers' new `_sample`, then add its digest
    hire_sample.known.cache_clear()
    monkeypatch.setattr(GenerationMixin, "_sample", lambda self: None)
    assert not hire_sample.known()
    monkeypatch.undo()
    hire_sample.known.cache_clear()


# --------------------------------------------------------------------------- parts of a token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_embeddings_have_the_module_s_bits(dtype):
    dice = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 33, generator=dice) * torch.logspace(-9, 3, 50)[:, None]
    plain = nn.Embedding(50, 33)
    scaled = Gemma3TextScaledWordEmbedding(50, 33, 0, embed_scale=33**0.5)
    for module in (plain, scaled):
        module.weight.data = weight.clone()
        module.to(dtype)
        found = hire_token.embedding_of(module)
        rows = torch.stack([found.row(token) for token in range(50)])
        assert torch.equal(rows, module(torch.arange(50)).float())
    with pytest.raises(ValueError, match="token 50 of 50"):
        found.row(50)


def test_other_embeddings_are_left_to_pytorch():
    class Doubled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    class LyingTextScaledWordEmbedding(Doubled):
        embed_scale = torch.tensor(3.0)

    for module in (
        Doubled(9, 4), LyingTextScaledWordEmbedding(9, 4), nn.Embedding(9, 4, max_norm=1.0),
        nn.Embedding(9, 4).double(), nn.Embedding(9, 4).to("meta"),
    ):  # fmt: skip
        assert hire_token.embedding_of(module) is None


def test_the_largest_is_where_argmax_finds_it():
    from hireconvert._native_token import largest

    dice = torch.Generator().manual_seed(2)
    for num in (1, 2, 15, 16, 17, 1023, 1024, 1025, 4099):
        x_V = torch.randint(-50, 50, (num,), generator=dice).float()  # many ties
        assert largest(x_V) == int(x_V.argmax())
        for strange in (torch.nan, torch.inf, -torch.inf):
            for place in {0, num // 2, num - 1}:
                y_V = x_V.clone()
                y_V[place] = strange
                assert largest(y_V) == int(y_V.argmax())
                y_V[-1] = torch.nan
                assert largest(y_V) == int(y_V.argmax())
        assert largest(torch.full((num,), -torch.inf)) == 0
    for wrong in (torch.zeros(0), torch.zeros(2, 2), torch.zeros(3).double()):
        with pytest.raises(ValueError, match="the numbers are"):
            largest(wrong)


def test_the_library_and_the_python_side_mean_the_same_fields():
    from hireconvert._native_token import _FIELDS

    header = (ROOT / "hireconvert" / "native" / "token.h").read_text()
    fields = re.search(r"typedef struct \{(.*?)\} hire_token;", header, re.DOTALL)[1]
    fields = re.sub(r"/\*.*?\*/", "", fields, flags=re.DOTALL)
    assert re.findall(r"(\w+);", fields) == [name for name, _ in _FIELDS]


def test_a_token_outside_the_embedding_or_without_a_position_is_refused(monkeypatch):
    model = copy.deepcopy(made("llama"))
    with torch.no_grad():
        given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(tokens(1, 7), return_dict_in_generate=True, **given)
        base, head = base_of(model), model.get_output_embeddings()
        model.hire_state.generating = True
        opened = base.hire_step.open(base, head, out.past_key_values)
        for token in (-1, 96):
            with pytest.raises(ValueError, match=f"token {token} of 96"):
                opened.next(token, logits=False)
        for _ in range(opened.left):
            opened.next(5, logits=False)
        with pytest.raises(ValueError, match="0 positions left"):
            opened.next(5, logits=False)
    assert out.past_key_values.get_seq_length() == 9
    opened.close()
    assert out.past_key_values.get_seq_length() > 200
