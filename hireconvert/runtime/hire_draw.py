"""A token chosen of few rows, as transformers would choose it of all.

Behind `TopKLogitsWarper` nearly all scores are -inf, but what follows goes over the whole
vocabulary: a sort for top-p, a softmax, a random number for each row (11 ms a token for 262,144
rows, one thread). Here scores and numbers are made for the rows that are left. They are those of
transformers and PyTorch up to rounding; where that could decide, all rows are gone over as before.
So tokens and the generator's state are the same either way.

Processors that never raise a score (a repetition penalty, say) leave rows that were not certified
where they were or lower: as long as what is read afterwards lies above them, it is what the
reference head's logits would have given (`Floor`).

Shape suffixes: V vocabulary, P positions, M rows that are left, in order of their scores (the best
is the last), B blocks of rows.
"""

import functools
import hashlib
import inspect
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
_BLOCK, _MOST = 128, 1024  # rows that share a maximum; rows that top-k may leave
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
_NEAR = 1e-4  # relative; float32 sums of up to _MOST terms are nearer to exact ones


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
    return right and hasattr(native, "uniforms") and _draws_alike()


def _draws_alike() -> bool:
    """Whether `torch.multinomial` draws the same rows and leaves the generator as we do."""
    score_V = torch.linspace(-3, 3, 1000)
    for seed in range(8):
        dice = torch.Generator().manual_seed(seed)
        torch.rand(seed, generator=dice)
        state = dice.get_state()
        wanted = int(torch.multinomial(score_V.softmax(-1), num_samples=1, generator=dice))
        try:
            found = _drawn(score_V, torch.arange(len(score_V)), len(score_V), state)
        except ValueError:  # another generator
            return False
        if found not in (wanted, None) or not torch.equal(state, dice.get_state()):
            return False
    return True


def best_rows(score_V: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, rows) of all not below the `num`-th largest score, the best (or NaN) last."""
    blocks = len(score_V) // _BLOCK
    row_M = None
    if blocks > 2 * num:
        # A score among the largest makes its block's maximum one of the largest.
        most_B = score_V[: blocks * _BLOCK].view(blocks, _BLOCK).amax(1)
        block_B = (~(most_B < most_B.topk(num).values[-1])).nonzero()
        inside = torch.arange(_BLOCK, device=score_V.device)
        behind = torch.arange(blocks * _BLOCK, len(score_V), device=score_V.device)
        row_M = torch.cat([(block_B * _BLOCK + inside).flatten(), behind])
        score_V = score_V[row_M]
    place_M = (~(score_V < score_V.topk(num).values[-1])).nonzero()[:, 0]
    score_M, order_M = score_V[place_M].sort(stable=True)
    place_M = place_M[order_M]
    return score_M, place_M if row_M is None else row_M[place_M]


def _top_p(score_M: torch.Tensor, top_p: float) -> int | None:
    """How many of the worst TopPLogitsWarper removes; None where rounding could decide."""
    # The best is always kept.
    sum_M, limit = score_M.softmax(-1).cumsum(-1)[:-1], 1 - top_p
    if bool(((sum_M - limit).abs() <= _NEAR * limit).any()):
        return None
    removed = int((sum_M <= limit).sum())
    tied = removed and bool(score_M[removed - 1] == score_M[removed])
    return None if tied else removed


def _min_p(score_M: torch.Tensor, min_p: float) -> int | None:
    """How many of the worst MinPLogitsWarper removes; None where rounding could decide."""
    share_M = (score_M - score_M[-1]).exp()
    if bool(((share_M - min_p).abs() <= _NEAR * min_p).any()):
        return None
    return int((share_M < min_p).sum())


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
        if not all(map(_never_raises, first)):
            return None
        warpers = [each for each in first if type(each) is TemperatureLogitsWarper]
        return cls(read + _SPARE, [each.temperature for each in warpers])

    def under(self, logits_1V: torch.Tensor) -> torch.Tensor:
        """The level, a number, of logits whose best `num` are certified."""
        level = logits_1V.new_tensor(-torch.inf)
        if self.num < logits_1V.shape[1]:
            level = best_rows(logits_1V[0], self.num)[0][0]
        for temperature in self._temperatures:
            level = level / temperature
        return level


def greedy(processors: Any, ids_1P: torch.Tensor, logits_1V: torch.Tensor, level: Any) -> int:
    """The best row behind the processors, BEYOND where it is not above `level`."""
    score_1V = processors(ids_1P, logits_1V)
    best = int(score_1V.argmax(-1))
    return best if bool(score_1V[0, best] > level) else BEYOND


class Draw:
    """Draws one sequence's tokens, as processors around one `top_k` leave them."""

    def __init__(self, processors: list[Any]) -> None:
        place = len(_first(processors))
        self._first: Any = LogitsProcessorList(processors[:place])
        self._rest: Any = LogitsProcessorList(processors[place:])
        self.top_k, self._cuts = processors[place].top_k, processors[place + 1 :]

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
        return cls(given) if removes and one and 0 < tail[0].top_k <= _MOST else None

    def token(self, ids_1P: torch.Tensor, logits_1V: torch.Tensor, level: Any = None) -> int:
        """The token that follows `ids_1P`, of float32 logits on the CPU; moves the generator on.

        With a `level`, of `Floor`, BEYOND where a row that top-k leaves is not above it; the
        generator is then as it was.
        """
        score_1V = self._first(ids_1P, logits_1V) if len(self._first) else logits_1V
        found = self._of_few(score_1V[0], level)
        if found is not None:
            return found
        chance_1V = self._rest(ids_1P, score_1V).softmax(dim=-1)
        return int(torch.multinomial(chance_1V, num_samples=1))

    def _of_few(self, score_V: torch.Tensor, level: Any) -> int | None:
        score_M, row_M = best_rows(score_V, min(self.top_k, len(score_V)))
        if level is not None and not bool(score_M[0] > level):
            return BEYOND
        if len(row_M) > _MOST or not bool(score_M[[0, -1]].isfinite().all()):
            return None
        for cut in self._cuts:
            top_p = type(cut) is TopPLogitsWarper
            removed = _top_p(score_M, cut.top_p) if top_p else _min_p(score_M, cut.min_p)
            if removed is None:
                return None
            score_M, row_M = score_M[removed:], row_M[removed:]
        with _DRAWING:
            state = torch.get_rng_state()
            found = _drawn(score_M, row_M, len(score_V), state)
            if found is not None:
                torch.set_rng_state(state)
        return found

    @property
    def reads_best(self) -> bool:
        """Whether the rows that top-k leaves are the best `top_k` of the logits themselves."""
        return all(type(each) is TemperatureLogitsWarper for each in self._first)


def _drawn(
    score_M: torch.Tensor, row_M: torch.Tensor, total: int, state: torch.Tensor
) -> int | None:
    """The row that `torch.multinomial` draws: the largest of chance over exponential number.

    `state`, of a generator, is moved on by one number for each of `total` rows. None where
    rounding could decide.
    """
    row_M, order_M = row_M.sort()
    number_M = -torch.log1p(-native.uniforms(state, row_M, total))
    ratio_M = (score_M - score_M[-1]).double().exp()[order_M] / number_M
    if len(row_M) > 1:
        best, second = ratio_M.topk(2).values.tolist()
        if not best * (1 - _NEAR) > second:
            return None
    return int(row_M[ratio_M.argmax()])
