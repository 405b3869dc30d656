"""Milliseconds per decoded token, several models measured in turns so that noise hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


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


class _Clock(BaseStreamer):
    """Notes when each token leaves `generate`; it comes as a CPU tensor, so a device is done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""

    def milliseconds_per_token(self) -> float:
        """The mean over all tokens but the first, whose time is the prompt's."""
        tokens = self.seconds[1:]
        return 1000 * (tokens[-1] - tokens[0]) / (len(tokens) - 1)


def _decode(timed: Timed, prompt_1T: torch.Tensor, num_tokens: int) -> float:
    model, clock = timed.model, _Clock()
    if timed.scope is not None:
        model.set_hire_scope(timed.scope)
    model.generate(
        input_ids=prompt_1T.to(model.device),
        attention_mask=torch.ones_like(prompt_1T, device=model.device),
        max_new_tokens=num_tokens,
        # No token has this id, so every round decodes the same number of tokens.
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=0,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        streamer=clock,
    )
    return clock.milliseconds_per_token()


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
            elapsed = _decode(timed, prompt_1T, num_tokens)
            if turn > 0:
                figures[name].append(elapsed)
            progress(turn * len(models) + place + 1, total)
    for timed in models.values():
        if timed.scope is not None:
            timed.model.set_hire_scope("decode")
    return {
        name: DecodeTime(statistics.median(each), min(each), max(each))
        for name, each in figures.items()
    }
