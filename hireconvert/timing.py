"""Milliseconds per decoded token, several models measured in turns so that noise hits all alike.

Shape suffixes: B sequences, T tokens of the prompt.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

# Greedy whatever generation_config.json asks for.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Timed:
    """A model to time; a HiRE model runs in `scope`, a native one has none."""

    model: Any
    scope: str | None = None


@dataclass(frozen=True)
class DecodeTime:
    """Milliseconds per token of a greedy decode, prefill left out: median and range over rounds."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Trace:
    """One greedy decode in milliseconds: to the first token, then each of those after it.

    With several sequences a token is a step of all of them.
    """

    first_ms: float
    token_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Of the tokens after the first."""
        return statistics.median(self.token_ms)

    @property
    def spread(self) -> float:
        """The slowest tenth over the fastest: what the machine did besides, more than the model."""
        ordered = sorted(self.token_ms)
        tenth = len(ordered) // 10
        return ordered[-1 - tenth] / max(ordered[tenth], 1e-9)


class _Clock(BaseStreamer):
    """Notes when each token leaves `generate`; it comes as a CPU tensor, so a device is done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def trace_decode(model: Any, prompt_BT: torch.Tensor, num_tokens: int, **options: Any) -> Trace:
    """What `generate` takes for `num_tokens` (at least 2), greedy unless `options` differ."""
    clock, start = _Clock(), time.perf_counter()
    model.generate(
        input_ids=prompt_BT.to(model.device),
        attention_mask=torch.ones_like(prompt_BT, device=model.device),
        max_new_tokens=num_tokens,
        # No token has this id, so every round decodes the same number of tokens.
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=0,
        streamer=clock,
        **{**GREEDY, **options},
    )
    tokens = clock.seconds[1:]
    each = zip(tokens[1:], tokens, strict=False)
    return Trace(1000 * (tokens[0] - start), tuple(1000 * (b - a) for b, a in each))


def range_of(figures: Sequence[float]) -> DecodeTime:
    """Median and range of the figures of all rounds."""
    return DecodeTime(statistics.median(figures), min(figures), max(figures))


def time_decode(
    models: Mapping[str, Timed],
    prompt_1T: torch.Tensor,
    *,
    num_tokens: int = 64,
    rounds: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, DecodeTime]:
    """The decoding time of each model; every round runs all of them, after one that is not counted.

    `num_tokens` (at least 3) are decoded greedily after `prompt_1T` in each run. HiRE models end
    in scope `decode`. `progress` is called with runs done and runs in all.
    """
    figures: dict[str, list[float]] = {name: [] for name in models}
    total = (rounds + 1) * len(models)
    for turn in range(rounds + 1):
        for place, (name, timed) in enumerate(models.items()):
            if timed.scope is not None:
                timed.model.set_hire_scope(timed.scope)
            trace = trace_decode(timed.model, prompt_1T, num_tokens)
            if turn > 0:
                figures[name].append(statistics.fmean(trace.token_ms))
            progress(turn * len(models) + place + 1, total)
    for timed in models.values():
        if timed.scope is not None:
            timed.model.set_hire_scope("decode")
    return {name: range_of(each) for name, each in figures.items()}
