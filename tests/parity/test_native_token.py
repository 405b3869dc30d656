"""A token of `generate()` past the language model's own forward: when it is, and that it is equal.

Shape suffixes: V vocabulary.
"""

import copy
from typing import Any

import pytest
import torch

from hireconvert.runtime import hire_sample
from tests.native import _native
from tests.tiny import base_of, hire_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
FFN = {"keep_fraction": 0.4, "keep": "candidates", "unselected": {}}
HEAD = {"certified": True, "certify_top": 4}
GREEDY = {
    "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 12,
    "return_dict_in_generate": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def loop_of_transformers(monkeypatch) -> None:
    """As where its loop over tokens is not the one that hire_sample repeats."""
    monkeypatch.setattr(hire_sample, "known", lambda: False)


class Spy:
    """Counts the tokens that left the language model's forward out."""

    def __init__(self, model: Any) -> None:
        self.short, step = 0, base_of(model).hire_step
        token = step.token

        def counted(*args: Any) -> Any:
            output = token(*args)
            self.short += output is not None
            return output

        step.token = counted


def generated(model: Any, *, short: bool, **more: Any) -> tuple[Any, dict[str, Any], int]:
    """(what `generate` returns, the model's counters, tokens past the forward)."""
    model = copy.deepcopy(model)
    model.hire_stats(reset=True)
    spy = Spy(model)
    if not short:
        base_of(model).hire_step.token = lambda *_: None
    return model.generate(tokens(1, 7), **GREEDY, **more), model.hire_stats(), spy.short


@pytest.mark.parametrize("head", [None, HEAD, {**HEAD, "certified": False, "unselected": "-inf"}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_tokens_logits_and_counters_are_those_of_the_forward(family, head):
    model = hire_model(tiny_model(family), ffn=FFN, head=head)
    found, counts, short = generated(model, short=True, output_logits=True)
    expected, other, none = generated(model, short=False, output_logits=True)
    # The prompt runs densely, and the step after it is compared.
    assert (short, none) == (10, 0)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert counts == other
    for layer, same in zip(
        found.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert torch.equal(layer.keys, same.keys) and torch.equal(layer.values, same.values)


def test_a_forward_that_does_more_than_its_head_is_run():
    model = hire_model(tiny_model("gemma2"), ffn=FFN)  # it caps its logits
    found, _, short = generated(model, short=True, output_logits=True)
    expected, _, _ = generated(model, short=False, output_logits=True)
    assert short == 0
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert float(torch.stack(found.logits).abs().max()) <= 5.0


def test_hooks_of_both_models_are_heard():
    model, heard = hire_model(tiny_model("llama"), ffn=FFN), []
    for module in (model, base_of(model), model.get_output_embeddings()):
        hook = module.register_forward_hook(lambda *args: heard.append(len(args)))
        model.generate(tokens(1, 7), **GREEDY)
        hook.remove()
    # Of the head one more: the step that is compared with it.
    assert len(heard) == 12 + 12 + 13


@pytest.mark.parametrize("head", [None, HEAD])
def test_beams_leave_the_forward_out_too(head):
    model = hire_model(tiny_model("llama"), ffn=FFN, head=head)
    asked = {"num_beams": 3, "output_logits": True}
    found, counts, short = generated(model, short=True, **asked)
    expected, other, none = generated(model, short=False, **asked)
    assert short > 0 and none == 0 and counts == other
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_calls_that_ask_for_more_take_the_forward(asked):
    model = hire_model(tiny_model("llama"), ffn=FFN)
    model.set_attn_implementation("eager")
    _, _, short = generated(model, short=True, **asked)
    assert short == 0


def test_a_weight_changed_between_two_calls_is_compared_anew():
    model, prompt = hire_model(tiny_model("llama"), ffn=FFN), tokens(1, 7)
    spy = Spy(model)
    first = model.generate(prompt, **GREEDY, output_logits=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    second = model.generate(prompt, **GREEDY, output_logits=True)
    assert spy.short == 20
    assert not torch.equal(first.logits[0], second.logits[0])
