"""A token chosen of few rows, as transformers would choose it of all.

Behind `TopKLogitsWarper` nearly all scores are -inf, but what follows goes over the whole
vocabulary: a sort for top-p, a softmax, a random number for each row (11 ms a token for 262,144
rows, one thread). Here scores and numbers are made for the rows that are left. They are those of
transformers and PyTorch up to rounding; where that could decide, all rows are gone over as before.
So tokens and the generator's state are the same either way.

Processors that never raise a score (a repetition penalty, say) leave rows that were not certified
where they were or lower: as long as what is read afterwards lies above them, it is what the
reference head's logits would have given (`Floor`).

The arithmetic is the library's (native/draw.h). Shape suffixes: V vocabulary, P positions.
"""

import functools
import hashlib
import inspect
import math
import threading
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .hire_token import native

# SHA-256 of the sources of what is repeated here: transformers 5.20 to 5.23.
_KNOWN = {
    "a5f5faa96e297aff93bf3541d8fb0c632be2674e2a5dfa75aae99bc27af9a8d1",  # to 5.22
    "6db38c2035f9a7f54d8371b9bb051c051450c001454467bc9b3002a86a31e450",  # other annotations
}
_DRAWING = threading.Lock()  # no two threads are to draw the same numbers
_SPARE = 64  # certified rows that may be lowered before others are needed
BEYOND = -1  # what is chosen may be a row that was not certified
_LOWERING = {
    EncoderNoRepeatNGramLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
}
_NEAR = 1e-4  # relative; float32 sums of some terms are nearer to exact ones


@functools.cache
def known() -> bool:
    """Whether transformers cuts, and PyTorch draws, as is repeated here."""
    try:
        kinds = (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
        text = "".join(inspect.getsource(kind.__call__) for kind in kinds)
    except (OSError, TypeError):  # no source to be had
        return False
    right = hashlib.sha256(text.encode()).hexdigest() in _KNOWN
    # The installed library may be older than this file.
    return right and hasattr(native, "draw") and _draws_alike()


def _draws_alike() -> bool:
    """Whether `torch.multinomial` draws the same rows and leaves the generator as we do."""
    score_V = torch.linspace(-3, 3, 1000)
    for seed in range(8):
        dice = torch.Generator().manual_seed(seed)
        torch.rand(seed, generator=dice)
        state = dice.get_state()
        wanted = int(torch.multinomial(score_V.softmax(-1), num_samples=1, generator=dice))
        try:
            found = native.draw(score_V, state, top_k=len(score_V))
        except ValueError:  # another generator
            return False
        if found != wanted or not torch.equal(state, dice.get_state()):
            return False
    return True


def _first(processors: Any) -> list[Any]:
    """Those before top-k, or all."""
    kinds = [type(each) for each in processors]
    return list(processors)[: kinds.index(TopKLogitsWarper) if TopKLogitsWarper in kinds else None]


def _never_raises(processor: Any) -> bool:
    """Whether no score is larger afterwards; temperatures move all in the same way."""
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        return bool(processor.penalty >= 1)
    return type(processor) in _LOWERING or type(processor) is TemperatureLogitsWarper


class Floor:
    """What rows beyond the best `num` of the head stay at or below, behind the processors."""

    def __init__(self, num: int, temperatures: list[float]) -> None:
        self.num, self._temperatures = num, temperatures

    @classmethod
    def of(cls, processors: Any, draw: "Draw | None") -> "Floor | None":
        """None where another row may be raised above them. Without `draw` the best row is read."""
        first, read = _first(processors), 1 if draw is None else draw.top_k
        if not all(map(_never_raises, first)) or not hasattr(native, "kth_largest"):
            return None
        warpers = [each for each in first if type(each) is TemperatureLogitsWarper]
        return cls(read + _SPARE, [each.temperature for each in warpers])

    def under(self, logits_1V: torch.Tensor) -> float:
        """The level of logits whose best `num` are certified."""
        if self.num >= logits_1V.shape[1]:
            return -math.inf
        level = torch.tensor(native.kth_largest(logits_1V[0], self.num))
        for temperature in self._temperatures:
            level = level / temperature  # rounded as scores are
        return float(level)


def greedy(processors: Any, ids_1P: torch.Tensor, logits_1V: torch.Tensor, level: float) -> int:
    """The best row behind the processors, BEYOND where it is not above `level`."""
    score_1V = processors(ids_1P, logits_1V)
    best: int = native.largest(score_1V[0])
    return best if bool(score_1V[0, best] > level) else BEYOND


class Draw:
    """Draws one sequence's tokens, as processors around one `top_k` leave them."""

    def __init__(self, processors: list[Any]) -> None:
        place = len(_first(processors))
        self._first: Any = LogitsProcessorList(processors[:place])
        self._rest: Any = LogitsProcessorList(processors[place:])
        self.top_k = processors[place].top_k
        self._cuts = [
            ("top_p", each.top_p) if type(each) is TopPLogitsWarper else ("min_p", each.min_p)
            for each in processors[place + 1 :]
        ]

    @classmethod
    def of(cls, processors: Any) -> "Draw | None":
        """None where these processors do more than leave a few rows at their end."""
        given = list(processors)
        tail = given[len(_first(given)) :]
        plain = (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
        if [type(each) for each in tail].count(TopKLogitsWarper) != 1 or not known():
            return None
        removes = all(type(each) in plain and each.filter_value == -torch.inf for each in tail)
        one = all(getattr(each, "min_tokens_to_keep", 1) == 1 for each in tail)
        return cls(given) if removes and one and 0 < tail[0].top_k <= native.MOST_LEFT else None

    def token(
        self, ids_1P: torch.Tensor, logits_1V: torch.Tensor, level: float | None = None
    ) -> int:
        """The token that follows `ids_1P`, of float32 logits on the CPU; moves the generator on.

        With a `level`, of `Floor`, BEYOND where a row that top-k leaves is not above it; the
        generator is then as it was.
        """
        score_1V = self._first(ids_1P, logits_1V) if len(self._first) else logits_1V
        found = self._of_few(score_1V[0], level)
        if found != native.UNSURE:
            return found
        chance_1V = self._rest(ids_1P, score_1V).softmax(dim=-1)
        return int(torch.multinomial(chance_1V, num_samples=1))

    def _of_few(self, score_V: torch.Tensor, level: float | None) -> int:
        top_k = min(self.top_k, len(score_V))
        with _DRAWING:
            state = torch.get_rng_state()
            found: int = native.draw(
                score_V.contiguous(), state, top_k=top_k, cuts=self._cuts, level=level, near=_NEAR
            )
            if found >= 0:
                torch.set_rng_state(state)
        return found

    @property
    def reads_best(self) -> bool:
        """Whether the rows that top-k leaves are the best `top_k` of the logits themselves."""
        return all(type(each) is TemperatureLogitsWarper for each in self._first)
