"""Decoding times: what runs, in which order, and what is left out of the figure."""

import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hireconvert.timing import Timed, time_decode


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


PROMPT_1T = torch.arange(1, 5)[None]


class Fake:
    """Sleeps a known time a token, after a slow prompt."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[str], seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self.scopes: list[str] = []
        self.config = LlamaConfig(vocab_size=50)

    def set_hire_scope(self, scope: str) -> None:
        self.scopes.append(scope)

    def generate(self, *, streamer: Any, max_new_tokens: int, **_: Any) -> None:
        self.log.append(self.name)
        streamer.put(torch.zeros(1, 4))
        time.sleep(0.05)
        for _ in range(max_new_tokens):
            streamer.put(torch.zeros(1))
            time.sleep(self.seconds)


def test_models_take_turns_and_the_prompt_is_left_out() -> None:
    log: list[str] = []
    slow, fast = Fake("slow", log, 0.004), Fake("fast", log, 0.0)
    times = time_decode(
        {"slow": Timed(slow, "decode"), "fast": Timed(fast)}, PROMPT_1T, num_tokens=4, rounds=2
    )
    assert log == ["slow", "fast"] * 3
    assert 4.0 <= times["slow"].low_ms <= times["slow"].median_ms <= times["slow"].high_ms
    assert times["fast"].low_ms < 4.0
    assert slow.scopes == ["decode"] * 4 and fast.scopes == []


def test_every_token_is_decoded_whatever_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(50))
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    seen: list[tuple[int, int]] = []
    times = time_decode(
        {"native": Timed(model)},
        PROMPT_1T,
        num_tokens=6,
        rounds=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(steps) == 2 * 6
    assert times["native"].median_ms > 0
    assert seen == [(1, 2), (2, 2)]
