"""Tokens drawn of few rows against transformers' processors and `torch.multinomial` over all.

Shape suffixes: V vocabulary, M places.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hireconvert.runtime import hire_draw
from hireconvert.runtime.hire_draw import Draw
from tests.native import _native

if _native is not None:
    from hireconvert._native_token import (
        BEYOND,
        UNSURE,
        _Cut,
        _DrawCall,
        draw,
        kth_largest,
    )

pytestmark = pytest.mark.skipif(_native is None, reason="this machine has no compiler")
ROOT = Path(__file__).resolve().parents[2]
IDS_1P = torch.tensor([[3, 1, 2]])
SIZES = (2, 60, 127, 1000, 6007, 49152)
WARPERS: dict[str, list[Any]] = {
    "top_k": [TopKLogitsWarper(20)],
    "top_k of all": [TopKLogitsWarper(1000)],
    "one": [TopKLogitsWarper(1)],
    "top_p": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(64), TopPLogitsWarper(0.8)],
    "nearly all": [TopKLogitsWarper(64), TopPLogitsWarper(0.999)],
    "nothing": [TopKLogitsWarper(64), TopPLogitsWarper(0.0)],
    "min_p": [TopKLogitsWarper(40), MinPLogitsWarper(0.05)],
    "each": [
        RepetitionPenaltyLogitsProcessor(1.1), TemperatureLogitsWarper(1.5), TopKLogitsWarper(50),
        TopPLogitsWarper(0.9), MinPLogitsWarper(0.02),
    ],
}  # fmt: skip


def theirs(processors: list[Any], score_V: torch.Tensor) -> int:
    score_1V = LogitsProcessorList(processors)(IDS_1P, score_V[None].clone())
    return int(torch.multinomial(score_1V.softmax(-1), num_samples=1))


def both(processors: list[Any], score_V: torch.Tensor, monkeypatch: Any) -> bool:
    """Assert that tokens and generators are the same; whether few rows were enough."""
    draw = Draw.of(LogitsProcessorList(processors))
    assert draw is not None
    whole: list[int] = []
    multinomial = torch.multinomial

    def watched(*args: Any, **kwargs: Any) -> Any:
        whole.append(1)
        return multinomial(*args, **kwargs)

    before = torch.get_rng_state()
    wanted, after = theirs(processors, score_V), torch.get_rng_state()
    torch.set_rng_state(before)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", watched)
        assert draw.token(IDS_1P, score_V[None].clone()) == wanted
    assert torch.equal(torch.get_rng_state(), after)
    return not whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("warpers", WARPERS)
def test_tokens_and_generator_are_those_of_transformers(warpers, size, monkeypatch):
    dice = torch.Generator().manual_seed(size)
    torch.manual_seed(7)
    few = 0
    for scale in (0.01, 1.0, 4.0, 40.0):
        for _ in range(10):
            score_V = scale * torch.randn(size, generator=dice)
            few += both(WARPERS[warpers], score_V, monkeypatch)
    assert few >= 36 or (warpers == "nothing" and few >= 25)  # its border is the sum of all


def test_ties_and_sums_at_the_border_are_left_to_transformers(monkeypatch):
    torch.manual_seed(1)
    tied = torch.arange(3000) // 7 % 90 / 8.0
    flat = torch.zeros(3000)
    assert not both([TopKLogitsWarper(5)], flat, monkeypatch)  # all rows are the best
    for _ in range(10):  # 24 rows share the best score, and two thirds of them are removed
        assert not both([TopKLogitsWarper(5), TopPLogitsWarper(0.3)], tied, monkeypatch)
        assert both([TopKLogitsWarper(5), MinPLogitsWarper(0.3)], tied, monkeypatch)
    halves = torch.full((300,), -9.0)
    halves[[5, 200, 250]] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert not both([TopKLogitsWarper(3), TopPLogitsWarper(0.75)], halves, monkeypatch)
    assert not both([TopKLogitsWarper(3), MinPLogitsWarper(0.5)], halves, monkeypatch)
    assert both([TopKLogitsWarper(3), TopPLogitsWarper(0.8)], halves, monkeypatch)


def test_scores_that_are_no_numbers_are_left_to_transformers(monkeypatch):
    torch.manual_seed(1)
    few = torch.full((3000,), -torch.inf)
    few[[7, 2900]] = 1.0
    assert not both([TopKLogitsWarper(5)], few, monkeypatch)
    for strange in (torch.nan, torch.inf):
        score_V = torch.randn(3000)
        score_V[17] = strange
        assert Draw.of([TopKLogitsWarper(5)])._of_few(score_V, None) == UNSURE
        assert Draw.of([TopKLogitsWarper(5)])._of_few(score_V, 0.0) in (BEYOND, UNSURE)


def test_the_kth_largest():
    dice = torch.Generator().manual_seed(3)
    for size in (1, 5, 16, 128, 400, 1283, 9000):
        for k in {1, min(3, size), min(60, size), min(2048, size)}:
            for high in (3, 40, 10**6):  # many ties, some, hardly any
                score_V = torch.randint(-high, high, (size,), generator=dice).float()
                assert kth_largest(score_V, k) == float(score_V.topk(k).values[-1])
            score_V[size // 2] = torch.inf
            assert kth_largest(score_V, 1) == torch.inf
            score_V[-1] = torch.nan
            assert math.isnan(kth_largest(score_V, k))
    assert kth_largest(torch.full((9,), -torch.inf), 4) == -torch.inf


def test_what_is_not_above_the_level_is_not_drawn():
    score_V = torch.linspace(0, 8, 500)
    state = torch.get_rng_state()
    before, level = state.clone(), float(score_V[-10])
    assert draw(score_V, state, top_k=10, level=level) == BEYOND
    assert draw(score_V, state, top_k=10, level=level, cuts=[("top_p", 0.5)]) == BEYOND
    assert torch.equal(state, before)
    assert draw(score_V, state, top_k=9, level=level) >= 491
    assert not torch.equal(state, before)


def test_calls_that_do_not_fit_are_refused():
    score_V, state = torch.zeros(9), torch.get_rng_state()
    for asked in (
        {"top_k": 0}, {"top_k": 10}, {"top_k": 3, "cuts": [("top_h", 0.5)]},
        {"top_k": 3, "cuts": [("min_p", 1.5)]}, {"top_k": 3, "cuts": [("top_p", math.nan)]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"cuts are|of 9 scores"):
            draw(score_V, state, **asked)
    for wrong in (score_V.double(), score_V[None], torch.zeros(18)[::2]):
        with pytest.raises(ValueError, match="scores are"):
            draw(wrong, state, top_k=1)
    with pytest.raises(ValueError, match="of 9 scores"):
        kth_largest(score_V, 10)


@pytest.mark.parametrize(
    "processors",
    [
        [], [TopPLogitsWarper(0.9)], [TopKLogitsWarper(2000)], [TopKLogitsWarper(9)] * 2,
        [TopKLogitsWarper(9), TemperatureLogitsWarper(0.5)],
        [TopKLogitsWarper(9, filter_value=-50.0)],
        [TopKLogitsWarper(9), TopPLogitsWarper(0.9, min_tokens_to_keep=2)],
        [type("Own", (TopKLogitsWarper,), {})(9)], [TopKLogitsWarper(9), lambda ids, x: x],
    ],
    ids=lambda processors: " ".join(type(each).__name__ for each in processors) or "none",
)  # fmt: skip
def test_other_processors_are_left_to_transformers(processors):
    assert Draw.of(LogitsProcessorList(processors)) is None


def test_what_is_repeated_is_what_is_installed(monkeypatch):
    hire_draw.known.cache_clear()
    assert hire_draw.known()  # if not: read what is new in the processors, then add the digest
    for module, name, value in (
        (TopPLogitsWarper, "__call__", lambda self, input_ids, scores: scores),
        (hire_draw, "native", None),
        (hire_draw.native, "draw", lambda score_V, state, top_k: 0),
    ):
        hire_draw.known.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not hire_draw.known() and Draw.of([TopKLogitsWarper(9)]) is None
    hire_draw.known.cache_clear()


def test_threads_do_not_draw_the_same_numbers():
    draw, score_1V = Draw.of([TopKLogitsWarper(1000)]), torch.linspace(0, 1e-3, 1000)[None]
    assert draw is not None
    torch.manual_seed(2)
    wanted = sorted(draw.token(IDS_1P, score_1V) for _ in range(200))
    torch.manual_seed(2)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: draw.token(IDS_1P, score_1V), range(200))
        assert sorted(found) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_generators_are_moved_on_from_wherever_they_stand(seed):
    for skipped in (0, 1, 311, 312, 313, 623, 1000):
        for total in (1, 2, 311, 312, 313, 624, 1000):
            dice = torch.Generator().manual_seed(seed)
            torch.rand(skipped, generator=dice)
            state, score_V = dice.get_state(), torch.linspace(0, 1, total)
            wanted = int(torch.multinomial(score_V.softmax(-1), 1, generator=dice))
            assert draw(score_V, state, top_k=total) == wanted
            assert torch.equal(state, dice.get_state())


def test_states_that_do_not_fit_are_refused():
    score_V, state = torch.zeros(9), torch.get_rng_state()
    for wrong in (state[:5000], state.long(), state[::2]):
        with pytest.raises(ValueError, match="state is"):
            draw(score_V, wrong, top_k=3)
    for place, number in ((8, 0), (8, 625), (16, -1), (16, 625)):  # `left` and `next` of draw.h
        wrong = state.clone()
        wrong[place : place + 4] = torch.tensor([number], dtype=torch.int32).view(torch.uint8)
        wrong[20:24] = 255 if number < 0 else 0
        with pytest.raises(ValueError, match="at word"):
            draw(score_V, wrong, top_k=3)


def test_the_library_and_the_python_side_mean_the_same_fields():
    header = (ROOT / "hireconvert" / "native" / "draw.h").read_text()
    for name, struct in (("hire_cut", _Cut), ("hire_draw_call", _DrawCall)):
        fields = re.findall(r"typedef struct \{([^}]*)\} (\w+);", header)
        body = next(body for body, found in fields if found == name)
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        assert re.findall(r"(\w+);", body) == [field for field, _ in struct._fields_]
