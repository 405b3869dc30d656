"""Arms of a measurement, and the rounds that run them in turn so that noise hits all alike.

A round in which an arm's tokens spread too far is run again: on a shared machine a run can sit
thirty times slower for minutes, and such a figure says nothing of the model.

Shape suffixes: W windows, T tokens, V vocabulary.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from hireconvert.errors import InputError
from hireconvert.subjects import LlamaSubject, Subject, Way, mapped
from hireconvert.timing import Trace

MOST_SPREAD, MOST_REPEATS = 2.0, 2  # within a run; how often a round is run again
_WARM_RUNS, _STABLE, _THREAD_TOKENS = 4, 1.15, 16
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """What one run decodes: the prompt's tokens, how many sequences of it, how many tokens more.

    `sampling` are settings of `generate`, which arms of torch follow; None: greedily.
    """

    ids_T: Sequence[int]
    batch: int
    num_tokens: int
    sampling: Mapping[str, Any] | None = None


@dataclass
class Arm:
    """One way to run one subject, and what was measured of it."""

    name: str
    subject: Subject
    way: Way
    bytes_per_token: int
    medians: list[float] = field(default_factory=list)  # one a round, ms per token
    firsts: list[float] = field(default_factory=list)
    unsteady: int = 0  # rounds that spread too far however often they were run
    kl: float | None = None
    top1: float | None = None

    def decode(self, load: Load) -> Trace:
        """One run."""
        more = {} if load.sampling is None else {"sampling": load.sampling}
        return self.subject.decode(
            self.way, load.ids_T, batch=load.batch, num_tokens=load.num_tokens, **more
        )

    @property
    def median_ms(self) -> float:
        """Milliseconds per token over the rounds."""
        return statistics.median(self.medians)


# --------------------------------------------------------------------------- interleaved rounds


def warm_up(arm: Arm, load: Load) -> None:
    """Run until two runs in a row agree, a few times at most."""
    before = arm.decode(load).median_ms
    for _ in range(_WARM_RUNS - 1):
        after = arm.decode(load).median_ms
        if max(before, after) <= _STABLE * min(before, after):
            return
        before = after


def one_round(arms: Sequence[Arm], load: Load) -> tuple[dict[str, Trace], set[str]]:
    """(the traces of all arms by name, names of arms whose tokens spread too far in all tries).

    The round is run again, all arms in turn, as long as one of them spreads; the steadiest run of
    each arm counts.
    """
    best: dict[str, Trace] = {}
    wild: set[str] = set()
    for _ in range(1 + MOST_REPEATS):
        for arm in arms:
            trace = arm.decode(load)
            if arm.name not in best or trace.spread < best[arm.name].spread:
                best[arm.name] = trace
        wild = {name for name, trace in best.items() if trace.spread > MOST_SPREAD}
        if not wild:
            break
    return best, wild


def run_rounds(arms: Sequence[Arm], load: Load, *, rounds: int, tick: Tick) -> None:
    """Figures of all arms, noted in them; `tick` is called once an arm and once a round."""
    for arm in arms:
        warm_up(arm, load)
        tick(f"{arm.name} is warm")
    for turn in range(rounds):
        traces, wild = one_round(arms, load)
        for arm in arms:
            arm.medians.append(traces[arm.name].median_ms)
            arm.firsts.append(traces[arm.name].first_ms)
            arm.unsteady += arm.name in wild
        tick(f"round {turn + 1}")


def medians_at(arms: Sequence[Arm], load: Load, *, rounds: int) -> dict[str, float]:
    """Median ms per step of all arms by name; nothing is noted in them."""
    figures: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(rounds):
        traces, _ = one_round(arms, load)
        for name, trace in traces.items():
            figures[name].append(trace.median_ms)
    return {name: statistics.median(each) for name, each in figures.items()}


def fastest_threads(subject: LlamaSubject, ids_T: Sequence[int], most: int) -> None:
    """Let llama.cpp use the number of threads, up to `most`, at which it decodes fastest."""
    counts = sorted({*(2**power for power in range(most.bit_length())), most} - {0})
    times: dict[int, float] = {}
    for threads in (*counts, *counts):
        subject.use_threads(threads)
        trace = subject.decode(Way(), ids_T, batch=1, num_tokens=_THREAD_TOKENS)
        times[threads] = min(trace.median_ms, times.get(threads, trace.median_ms))
    subject.use_threads(min(times, key=lambda threads: times[threads]))


# --------------------------------------------------------------------------- quality


class Reference:
    """Logits of the original on windows of text, on disk for as long as this context lasts.

    They take 4 bytes a token and vocabulary row: 200 MB for 1,024 tokens of SmolLM2.
    """

    def __init__(self, arm: Arm, ids_WT: torch.Tensor, tick: Tick = lambda detail: None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hireconvert-")
        self.ids_WT, self._shape = ids_WT, (0, 0)
        for place, ids_T in enumerate(ids_WT.tolist()):
            rows, vocabulary = arm.subject.logits(arm.way, ids_T, self._path(place)).shape
            self._shape = (rows, vocabulary)
            tick("original")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _path(self, place: int | str) -> Path:
        return Path(self._folder.name) / f"{place}"

    def compare(self, arm: Arm) -> None:
        """Notes in the arm its mean KL from the original (nats) and how often best tokens agree.

        Every position counts. A KL that is not finite, as where logits are -inf, becomes None.
        Raises InputError for vocabularies that differ.
        """
        kl_sum, same = 0.0, 0
        for place, ids_T in enumerate(self.ids_WT.tolist()):
            found_TV = arm.subject.logits(arm.way, ids_T, self._path("found"))
            if found_TV.shape != self._shape:
                raise InputError(
                    f"{arm.name} has a vocabulary of {found_TV.shape[1]} tokens, expected "
                    f"{self._shape[1]}: it is no form of the same model."
                )
            found_TV = found_TV.log_softmax(-1)
            expected_TV = mapped(self._path(place), *self._shape).log_softmax(-1)
            kl_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1).clamp(min=0)
            kl_sum += float(kl_T.double().sum())
            same += int((expected_TV.argmax(-1) == found_TV.argmax(-1)).sum())
        count = self.ids_WT.numel()
        arm.kl = kl_sum / count if math.isfinite(kl_sum) else None
        arm.top1 = same / count
