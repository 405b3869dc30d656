"""generate() in every mode: what the head certifies, what falls back, what compiles."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import BaseStreamer

from hireconvert.runtime import hire_draw, hire_head, hire_head_native, hire_native, hire_sample
from tests.tiny import base_of, hire_model, stepwise, tiny_model, tokens
from tests.tiny_files import tiny_llama

FFN = {"keep_fraction": 0.5}
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


class ReferenceHead(nn.Module):
    """The head that certificates refer to: exact products, rounded once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [hire_head.exact_rows(row, self.weight, self.bias) for row in x.flatten(0, -2)]
        return torch.stack(rows).view(*x.shape[:-1], -1)


def with_reference_head(model: Any) -> Any:
    model.config.hire["head"] = None
    model.set_output_embeddings(ReferenceHead(model.get_output_embeddings()))
    return model


def pair(family: str, **settings: Any) -> tuple[Any, Any]:
    """A model with a certified head, and the same with the reference head."""
    native = tiny_model(family)
    model = hire_model(native, ffn=FFN, head={"certify_top": 6, **settings})
    return model, with_reference_head(hire_model(native, ffn=FFN, head={}))


@contextlib.contextmanager
def messages(caplog: Any) -> Iterator[list[str]]:
    found: list[str] = []
    with caplog.at_level(logging.WARNING, logger="hire"):
        caplog.clear()
        yield found
    found.extend(record.message for record in caplog.records)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3"])
def test_greedy_equals_the_reference_head(family, cache, caplog):
    model, reference = pair(family)
    prompt = tokens(1, 7)
    with messages(caplog) as said:
        got = model.generate(prompt, cache_implementation=cache, **GREEDY)
    assert torch.equal(got, reference.generate(prompt, **GREEDY))
    stats = model.hire_stats()
    assert stats["head"]["rows"] == 10 and stats["head"]["dense_rows"] == 0
    assert stats["ffn"]["rows"] == 9 * len(stats["layers"]) and not said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_with_top_k_draws_the_same_tokens(dtype):
    model, reference = (m.to(dtype) for m in pair("llama"))
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 6, "eos_token_id": None}
    for extra in ({}, {"top_p": 0.9, "temperature": 0.7}):
        drawn = []
        for candidate in (model, reference):
            torch.manual_seed(3)
            drawn.append(candidate.generate(tokens(1, 5), **settings, **extra))
        assert torch.equal(*drawn)
    counts = model.hire_stats()["head"]
    assert counts["dense_rows"] == 0 and counts["rescored"] < 96 * counts["rows"]


# What the loop over tokens of one sequence can do with certified rows all the same.
LOWERED: dict[str, dict[str, Any]] = {
    "top_k=50": {"do_sample": True},  # the default of Transformers
    "top_k=20": {"do_sample": True, "top_k": 20},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "min_length": {"min_length": 12, "eos_token_id": 2},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": 2},
    "suppress_tokens": {"suppress_tokens": [5]},
}
UNCERTIFIED: dict[str, dict[str, Any]] = {
    "beam or contrastive search": {"num_beams": 3},
    "top_k=None": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 0.8},  # raises what was there
    "scores over all rows": {"output_scores": True, "return_dict_in_generate": True},
}
EACH = [*UNCERTIFIED.items(), *LOWERED.items()]


@functools.cache
def wide() -> tuple[Any, Any]:
    """As `pair`: many rows, and a copy so coarse that estimates would give other tokens."""
    native = tiny_llama(vocab_size=1500).float().eval()
    model = hire_model(native, ffn=FFN, head={"bits": 4, "block": 16, "certify_top": 16})
    return model, with_reference_head(hire_model(native, ffn=FFN, head={}))


LOOP = pytest.mark.skipif(hire_native.native is None, reason="this machine has no compiler")
SAMPLED = {"do_sample": True, "top_k": 9, "top_p": 0.95, "temperature": 1.7}


def both(settings: dict[str, Any], *, runs: int = 1) -> tuple[dict[str, int], int]:
    """The head's counters of a certified model whose tokens are the reference's; tokens made."""
    made, (model, reference) = 0, wide()
    model.hire_state.warned.clear()
    model.hire_stats(reset=True)
    for run in range(runs):
        found = []
        for candidate in (model, reference):
            torch.manual_seed(run)
            found.append(candidate.generate(tokens(1, 6, seed=run), **settings))
        assert torch.equal(*found)
        made += found[0].shape[1] - 6
    return model.hire_stats()["head"], made


@LOOP
@pytest.mark.parametrize("spare", [64, 5, 0])
@pytest.mark.parametrize("reason", LOWERED)
def test_rows_that_processors_only_lower_stay_certified(reason, spare, caplog, monkeypatch):
    monkeypatch.setattr(hire_draw, "_SPARE", spare)
    monkeypatch.setattr(hire_sample, "_PATIENCE", 100)
    settings = {**GREEDY, "max_new_tokens": 40, **LOWERED[reason]}
    for extra in ({}, SAMPLED) if "penalty" in reason or "ngram" in reason else ({},):
        with messages(caplog) as said:
            counts, made = both({**settings, **extra})
        # The prompt's row and the first step's are dense; without room, the others are as well.
        again = counts["dense_rows"] - 2
        assert counts["rows"] == made + again and not said
        if spare == 64:
            assert again == 0 and counts["rescored"] < 1500 * (made - 2) / 2
        if spare == 0:
            assert again == made - 2


@LOOP
def test_some_tokens_need_more_rows_than_were_certified(monkeypatch):
    monkeypatch.setattr(hire_draw, "_SPARE", 1)
    asked = {**GREEDY, "max_new_tokens": 60, "repetition_penalty": 1.3}
    counts, made = both(asked, runs=4)
    assert 2 * 4 < counts["dense_rows"] < made


@LOOP
def test_certifying_ends_where_it_never_suffices(caplog, monkeypatch):
    monkeypatch.setattr(hire_draw, "_SPARE", 0)
    with messages(caplog) as said:
        counts, made = both({**GREEDY, "max_new_tokens": 30, "repetition_penalty": 1.3})
    assert counts["dense_rows"] == made and len(said) == 1 and "repetition_penalty" in said[0]
    assert counts["rows"] == made + hire_sample._PATIENCE + 1


@LOOP
@pytest.mark.parametrize(
    "asked",
    [
        {"encoder_no_repeat_ngram_size": 1}, {"top_h": 0.6, "top_k": 10, "temperature": 3.0},
        {"top_k": 2, "temperature": 2.0, "encoder_no_repeat_ngram_size": 1}, {"top_k": 3},
    ],
    ids=str,
)  # fmt: skip
def test_processors_before_top_k_do_not_meet_estimates(asked):
    both({**GREEDY, "do_sample": "top_k" in asked, **asked}, runs=20)


def test_processors_by_position_are_custom_ones_too(caplog):
    model, reference = wide()
    given = (tokens(1, 6), None, LogitsProcessorList([lambda ids, scores: -scores]))
    model.hire_state.warned.clear()
    with messages(caplog) as said:
        assert torch.equal(*(each.generate(*given, **GREEDY) for each in (model, reference)))
    assert "custom logits processor" in said[0]


class Stopped(BaseStreamer):
    """What a user does who has seen enough."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == 7:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("it was stopped")


@LOOP
def test_a_call_that_is_stopped_says_nothing(caplog):
    model, _ = wide()
    model.hire_state.warned.clear()
    with messages(caplog) as said, pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 6), streamer=Stopped(), repetition_penalty=1.2, **GREEDY)
    assert not said


@LOOP
@pytest.mark.parametrize("hindrance", ["a head without kernels", "no sparse head"])
def test_tokens_that_run_dense_all_the_same_are_announced(hindrance, caplog, monkeypatch):
    model = hire_model(tiny_model("llama"), ffn=FFN, head={})
    if hindrance == "no sparse head":
        model.set_hire_scope("decode", head=False)
    else:
        monkeypatch.setattr(hire_head_native, "obstacle", lambda spec, head: "none is wanted")
    with messages(caplog) as said:
        model.generate(tokens(1, 6), repetition_penalty=1.2, **GREEDY)
    assert any("repetition_penalty" in line for line in said)


@pytest.mark.parametrize(("reason", "asked"), EACH, ids=[f"{k} {v}" for k, v in EACH])
def test_more_than_was_certified_falls_to_dense_counted_and_said_once(
    reason, asked, caplog, monkeypatch
):
    if asked in LOWERED.values():  # PyTorch's loop knows of no rows
        monkeypatch.setenv("HIRE_NATIVE", "off")
    native = tiny_model("llama")
    model = hire_model(native, head={"certify_top": 6})
    settings = {**GREEDY, **asked}
    results = []
    with messages(caplog) as said:
        for candidate in (model, native, model):
            torch.manual_seed(0)
            out = candidate.generate(tokens(1, 6), **settings)
            results.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert len(said) == 1 and reason in said[0] and "'dense'" in said[0]
    counts = model.hire_stats()["head"]
    assert counts["dense_rows"] == counts["rows"] > 0 and counts["rescored"] == 0
    model.generate(tokens(1, 6), **GREEDY)  # and the mode ends with the call
    assert model.hire_stats()["head"]["rows"] == counts["rows"] + 10
    assert model.hire_stats()["head"]["dense_rows"] == counts["dense_rows"]


def test_more_than_was_certified_estimates_when_the_recipe_says_so(caplog):
    model = hire_model(tiny_model("llama"), head={"on_uncertified": "estimate"})
    with messages(caplog) as said:
        model.generate(tokens(1, 6), num_beams=2, **GREEDY)
    counts = model.hire_stats()["head"]
    assert counts["uncertified_rows"] == counts["rows"] == counts["rescored"] / 8 > 0
    assert len(said) == 1 and "'estimate'" in said[0]


def test_settings_are_read_from_all_their_sources(caplog):
    model = hire_model(tiny_model("llama"), head={"certify_top": 6})
    config = GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=None)
    with messages(caplog) as said:
        model.generate(tokens(1, 6), generation_config=config)
    assert "beam" in said[0]
    model.generation_config.do_sample = True
    with messages(caplog) as said:
        model.generate(tokens(1, 6), max_new_tokens=4)
    if hire_native.native is None:  # else the loop certifies what is drawn from
        assert "top_k=50" in said[0]
    before = model.hire_stats()["head"]["dense_rows"]
    model.generation_config.top_k = 5
    model.generate(tokens(1, 6), max_new_tokens=4)
    assert model.hire_stats()["head"]["dense_rows"] == before


def test_a_custom_processor_is_not_covered(caplog):
    model = hire_model(tiny_model("llama"), head={})
    with messages(caplog) as said:
        model.generate(tokens(1, 4), logits_processor=[lambda ids, scores: -scores], **GREEDY)
    assert "custom logits processor" in said[0]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_left_padded_rows_equal_their_own_runs(family):
    model = hire_model(tiny_model(family), ffn=FFN)
    prompts = [tokens(1, length, seed=length)[0] for length in (4, 7, 9)]
    batch = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(batch, attention_mask=mask, **settings)
    rows = model.hire_stats(reset=True)["ffn"]
    assert rows["rows"] == 3 * rows["calls"] and rows["dense_rows"] == 0
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **settings)
        for joint, single in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(joint[row], single[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, len(prompt) :])


def test_beams_select_per_row_up_to_the_limit():
    model = hire_model(tiny_model("llama"), ffn=FFN, max_sparse_rows=4)
    out = model.generate(tokens(1, 6), num_beams=4, **GREEDY)
    stats = model.hire_stats(reset=True)
    assert out.shape[1] == 16 and stats["ffn"]["rows"] == 4 * stats["ffn"]["calls"] > 0
    model.generate(tokens(1, 6), num_beams=5, **GREEDY)
    stats = model.hire_stats()
    assert stats["ffn"]["rows"] == 0 and stats["dense_fallbacks"] == 9


def test_assisted_generation_verifies_as_decoding_selects():
    model = hire_model(tiny_model("llama"), ffn=FFN, head={}, max_sparse_rows=32)
    plain = model.generate(tokens(1, 7), **GREEDY)
    assistant = tiny_model("llama")  # guesses often right: the dense model of the same weights
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    model.hire_stats(reset=True)
    assisted = model.generate(tokens(1, 7), assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted, plain)
    stats = model.hire_stats()
    assert stats["ffn"]["rows"] > stats["ffn"]["calls"] > 0  # several rows a call
    assert stats["ffn"]["calls"] < 9 * len(stats["layers"])


def test_prompt_lookup_equals_plain_greedy():
    model = hire_model(tiny_model("gemma3_text"), ffn=FFN, head={}, max_sparse_rows=32)
    prompt = tokens(1, 6).repeat(1, 3)
    plain = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY), plain)


def test_without_a_cache_every_step_is_prefill():
    native = tiny_model("llama")
    model = hire_model(native, ffn=FFN)
    got = model.generate(tokens(1, 5), use_cache=False, **GREEDY)
    assert torch.equal(got, native.generate(tokens(1, 5), use_cache=False, **GREEDY))
    assert model.hire_stats()["ffn"]["rows"] == 0


def test_experts_generate_with_a_certified_head():
    native = tiny_model("mixtral")
    model = hire_model(native, head={})
    assert torch.equal(
        model.generate(tokens(1, 5), **GREEDY), native.generate(tokens(1, 5), **GREEDY)
    )
    assert model.hire_stats()["head"]["rows"] == 10


def test_a_weight_written_between_two_calls_is_seen():
    model = hire_model(tiny_model("llama_bias"), ffn=FFN, head={"bits": 4})
    model.generate(tokens(1, 5), **GREEDY)
    for seed, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(seed)
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    got = model.generate(tokens(1, 5), **GREEDY)
    for layer in base_of(model).hire_layers.values():
        layer.prepared = None
    model.get_output_embeddings().hire.prepared = None
    assert torch.equal(model.generate(tokens(1, 5), **GREEDY), got)


# ------------------------------------------------------------------------------- compiled


class Graphs:
    """A torch.compile backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def compiled() -> Iterator[Any]:
    torch._dynamo.reset()

    def compile_forward(model: Any) -> Graphs:
        graphs = Graphs()
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
        return graphs

    yield compile_forward
    torch._dynamo.reset()


STATIC = {"cache_implementation": "static", "disable_compile": True}


# A sliding cache recompiles each step whatever the model: it keeps its length in a Python integer.
@pytest.mark.parametrize("rest", [None, {}])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_graph_serves_64_steps(family, rest, compiled):
    model = hire_model(tiny_model(family), ffn={**FFN, "unselected": rest}, head={})
    settings = {**GREEDY, **STATIC, "max_new_tokens": 65}
    eager = model.generate(tokens(1, 6), **settings)
    expected = model.hire_stats(reset=True)
    graphs = compiled(model)
    assert torch.equal(model.generate(tokens(1, 6), **settings), eager)
    assert graphs.count == 2  # one for the prompt, one for all 64 steps
    assert model.hire_stats() == expected


VARYING = {"selection": "threshold", "over_select": 1.5, "predictor": {"bits": 3, "soften": True}}


@pytest.mark.parametrize("keep", ["top_k", "candidates"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_graph_serves_rows_that_keep_other_numbers(family, keep, compiled):
    rest = {} if family == "llama" else None
    ffn = {**FFN, **VARYING, "keep": keep, "unselected": rest}
    model = hire_model(tiny_model(family), ffn=ffn)
    settings = {**GREEDY, **STATIC, "max_new_tokens": 33}
    eager = model.generate(tokens(1, 6), **settings)
    expected = model.hire_stats(reset=True)
    graphs = compiled(model)
    assert torch.equal(model.generate(tokens(1, 6), **settings), eager)
    assert graphs.count == 2
    assert model.hire_stats() == expected
    assert expected["ffn"]["kept"] % expected["ffn"]["rows"]  # not the same number for every row


@pytest.mark.parametrize("rest", [None, {}])
def test_a_batch_compiles_too(rest, compiled):
    ffn = {**FFN, "group_size": 4, "unselected": rest}
    model = hire_model(tiny_model("llama"), ffn=ffn, head={})
    eager = model.generate(tokens(3, 6), **GREEDY, **STATIC)
    expected = model.hire_stats(reset=True)
    graphs = compiled(model)
    assert torch.equal(model.generate(tokens(3, 6), **GREEDY, **STATIC), eager)
    assert graphs.count == 2 and model.hire_stats() == expected


def test_a_graph_counts_rows_that_do_not_fit_and_still_certifies(compiled, monkeypatch):
    monkeypatch.setenv("HIRE_NATIVE", "off")
    monkeypatch.setattr(hire_head, "_COMPILED_MIN_ROWS", 1)
    monkeypatch.setattr(hire_head, "_COMPILED_ROWS_PER_TOP", 1)
    native = tiny_model("llama")
    model = hire_model(native, head={"bits": 4, "certify_top": 5})
    reference = with_reference_head(hire_model(native, head={}))
    expected = reference.generate(tokens(1, 6), **GREEDY)
    graphs = compiled(model)
    assert torch.equal(model.generate(tokens(1, 6), **GREEDY, **STATIC), expected)
    counts = model.hire_stats()["head"]
    assert 0 < counts["overflow_rows"] <= 10 and graphs.count == 2


@pytest.mark.parametrize("rest", [None, {}])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_compiled_row_with_nan_runs_dense_and_is_counted(family, rest, compiled):
    native = tiny_model(family)
    model = hire_model(native, ffn={**FFN, "unselected": rest})
    layer = next(iter(base_of(model).hire_layers.values()))
    model.hire_prepare()
    run = torch.compile(layer.gathered, fullgraph=True, dynamic=False, backend="eager")
    good = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[0, 3] = float("inf")
    with torch.no_grad():
        assert torch.equal(run(good), layer.gathered(good))
        assert int(layer.counts[4]) == 0
        assert torch.equal(run(bad).isnan(), layer.dense(bad).isnan())
    assert int(layer.counts[4]) == 1 and int(layer.counts[0]) == 3


def test_a_compiled_head_counts_a_row_with_nan(compiled):
    model = hire_model(tiny_model("llama"), head={})
    model.hire_prepare()
    head = model.get_output_embeddings()
    run = torch.compile(
        lambda x: head.hire(x, head, True), fullgraph=True, dynamic=False, backend="eager"
    )
    x_ND = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    x_ND[1, 3] = float("nan")
    with torch.no_grad():
        out_NV = run(x_ND)
    assert out_NV[0].isfinite().all() and out_NV[1].isnan().all()
    assert model.hire_stats()["head"]["dense_rows"] == 1


def test_a_forward_compiled_without_generate_follows_hire_prepare(compiled):
    model = hire_model(tiny_model("llama"), ffn=FFN, head={})
    ids = tokens(1, 6)
    expected = stepwise(model, ids)
    fresh = hire_model(tiny_model("llama"), ffn=FFN, head={})
    fresh.hire_prepare()
    fresh.set_hire_scope("all")
    graphs = compiled(fresh)
    with torch.no_grad():
        out = fresh(ids, use_cache=False).logits
    assert graphs.count == 1 and out.shape == expected.shape
    assert fresh.hire_stats()["ffn"]["rows"] == 18
