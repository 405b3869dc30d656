"""Stage: how many neurons each layer keeps, found by measuring the whole model, masks applied.

Errors of layers do not add up, so no layer is judged alone: a list of shares is scored by the mean
KL of the selecting model to the dense one on windows of calibration text. A search trades steps
between layers, so the total never changes; a quality target then shifts the whole list.

Or one pass forward and back says what every share of every layer costs to second order, and a list
follows from that (`second_order.py`).

Every score is written to a file at once. The searches are functions of the scores and a seed, so a
killed one repeats its way through the file in no time and goes on.

Shape suffixes: W windows, T tokens of a window.
"""

import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hireconvert.allocation import Allocation, Keeps, Trades
from hireconvert.masked import Active, MaskedModel, Score, Trace
from hireconvert.memory import beginnings
from hireconvert.schema_budget import BudgetRecipe, BudgetTargetRecipe
from hireconvert.second_order import cheapest, window_seed

Progress = Callable[[int, int, str], None]  # rounds done, rounds in all, where the score stands

SURVIVORS = 2  # offspring measured on all windows
TRACES_KEPT = SURVIVORS + 2  # the parent's, its challengers', one being made
SMALLEST_STEP = 0.01
SLOPES_COST = 3  # a pass forward and back, in passes forward


class Memo:
    """Scores by selection, kept in a file line by line so that a killed search continues."""

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self._path, self._scores = path, dict[str, Score]()
        head = json.dumps(fingerprint, sort_keys=True)
        if path is None:
            return
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.split("\n")[:-1]  # what follows the last line end was cut off by a kill
        if lines[:1] != [head]:  # none yet, or of another conversion
            path.write_text(head + "\n", encoding="utf-8")
            return
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        for line in lines[1:]:
            key, *figures = json.loads(line)
            self._scores[key] = Score(*map(tuple, figures))

    def get(self, key: str) -> Score | None:
        """A score measured before."""
        return self._scores.get(key)

    def put(self, key: str, score: Score) -> None:
        """Keep a score."""
        self._scores[key] = score
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, score.kl_W, score.nll_W, score.kept_W]) + "\n")


class Trials:
    """Scores of lists of shares on one set of windows, by memory where they are known."""

    def __init__(self, name: str, masked: MaskedModel, allocation: Allocation, memo: Memo) -> None:
        self.name, self.masked, self.allocation, self.memo = name, masked, allocation, memo
        self._asked: dict[str, int] = {}
        self._traces: OrderedDict[Active, Trace] = OrderedDict()

    @property
    def num_windows_scored(self) -> int:
        """What the search cost: windows, each once for every list scored on it."""
        return sum(self._asked.values())

    def score(
        self, keeps: Keeps, *, num_windows: int | None = None, near: Keeps | None = None
    ) -> Score:
        """The score of a list on the first windows; `near` is a similar list, for speed alone."""
        active = self.allocation.active(keeps)
        count = num_windows or len(self.masked.ids_WT)
        key = f"{self.name} {count} {','.join(map(str, active))}"
        self._asked[key] = count
        known = self.memo.get(key)
        if known is not None:
            return known
        trace = None if near is None else self._trace(self.allocation.active(near))
        score, made = self.masked.measure(
            active, num_windows=count, near=trace, traced=near is not None
        )
        if count == len(self.masked.ids_WT) and near is not None:
            self._keep(made)
        self.memo.put(key, score)
        return score

    def slopes(self, keeps: Keeps, step: float) -> tuple[float, ...]:
        """How much the last `step` of its neurons saves in each layer (`MaskedModel.slopes`)."""
        active, more = (
            self.allocation.active(shares)
            for shares in (keeps, tuple(min(keep + step, 1.0) for keep in keeps))
        )
        key = f"{self.name} slopes {','.join(map(str, active))}"
        self._asked[key] = SLOPES_COST * len(self.masked.ids_WT)
        known = self.memo.get(key)
        if known is None:
            width = tuple(max(b - a, 1) for a, b in zip(active, more, strict=True))
            # Slopes of layers stand where scores of windows do.
            known = Score(self.masked.slopes(active, width), ())
            self.memo.put(key, known)
        return known.kl_W

    def costs(self, trades: Trades, number: int, seed: int) -> list[list[float]]:
        """What each layer's levels cost one window (`MaskedModel.costs`), in a list a layer."""
        key = (
            f"{self.name} costs {number} {','.join(map(str, self.allocation.active(trades.base)))}"
        )
        self._asked[key] = SLOPES_COST
        levels = [trades.reach(layer) for layer in range(len(trades.base))]
        known = self.memo.get(key)
        if known is None:
            active_LS = [
                tuple(self.allocation.active_in(i, trades.keep(i, level)) for level in reach)
                for i, reach in enumerate(levels)
            ]
            found = self.masked.costs(number, active_LS, window_seed(seed, number))
            # One layer after the other, where scores of windows stand.
            known = Score(tuple(cost for curve in found for cost in curve), ())
            self.memo.put(key, known)
        flat = iter(known.kl_W)
        return [[next(flat) for _ in reach] for reach in levels]

    def _trace(self, active: Active) -> Trace:
        if active not in self._traces:
            self._keep(self.masked.measure(active)[1])
        self._traces.move_to_end(active)
        return self._traces[active]

    def _keep(self, trace: Trace) -> None:
        self._traces[trace.active] = trace
        while len(self._traces) > TRACES_KEPT:
            self._traces.popitem(last=False)


def evenly(ids_WT: torch.Tensor, num_tokens: int, length: int) -> torch.Tensor:
    """The beginnings of windows, [W, length or less]: about `num_tokens` tokens of many texts."""
    num_windows, window = ids_WT.shape
    wanted, length = beginnings(num_windows, window, num_tokens, length)
    return ids_WT[:wanted, :length]


# --------------------------------------------------------------------------- searches


def evolve(
    trials: Trials, trades: Trades, recipe: BudgetRecipe, seed: int, progress: Progress
) -> Keeps:
    """The best list found by trading steps at random, never worse than the base.

    A generation's offspring are scored on a few windows, the best of them on all; the best of
    these takes the parent's place if it is better (EvoPress).
    """
    parent, probe = trades.none, _probe_windows(trials, recipe)
    score = trials.score(trades.keeps(parent), near=trades.keeps(parent))
    for generation in range(recipe.generations):
        seeded = random.Random(f"{seed} {generation}")
        drawn = dict.fromkeys(trades.mutant(parent, seeded) for _ in range(recipe.offspring))
        near = trades.keeps(parent)
        ranked = sorted(
            (trials.score(trades.keeps(child), num_windows=probe, near=near).kl, child)
            for child in drawn
            if child != parent
        )
        for _, child in ranked[:SURVIVORS]:
            found = trials.score(trades.keeps(child), near=near)
            if found.kl < score.kl:
                parent, score = child, found
        progress(generation + 1, recipe.generations, f"KL {score.kl:.5f}")
    return trades.keeps(parent)


def descend(trials: Trials, trades: Trades, recipe: BudgetRecipe, progress: Progress) -> Keeps:
    """The best list found by sweeps of measurement, never worse than the base.

    A sweep takes the slope of every layer where the list now stands, then measures the best 1, 2,
    4, ... trades together and goes on from what helped most. Where none helped the step is halved.
    """
    score = trials.score(trades.base)
    for sweep in range(recipe.sweeps):
        best, pairs = trades.base, _ranked_pairs(trials, trades)
        for num in _doubling(len(pairs)):
            ups, downs = zip(*pairs[:num], strict=True)
            child = trades.keeps(trades.moved(trades.none, list(ups), list(downs)))
            found = trials.score(child)
            if found.kl < score.kl:
                best, score = child, found
        progress(sweep + 1, recipe.sweeps, f"KL {score.kl:.5f}")
        if best != trades.base:
            trades = replace(trades, base=best)
        elif trades.step > SMALLEST_STEP:
            trades = replace(trades, step=trades.step / 2)
        else:
            break
    return trades.base


def solve(trials: Trials, trades: Trades, seed: int, progress: Progress) -> Keeps:
    """The list that costs least to second order, by one pass forward and back of every window.

    `progress` tells what the base costs to second order, over the windows passed.
    """
    curves = [[0.0] * len(trades.reach(layer)) for layer in range(len(trades.base))]
    here = [-trades.reach(layer)[0] for layer in range(len(curves))]  # the base in its curve
    num_windows = len(trials.masked.ids_WT)
    for number in range(num_windows):
        window = trials.costs(trades, number, seed)
        curves = [
            [total + cost for total, cost in zip(*both, strict=True)]
            for both in zip(curves, window, strict=True)
        ]
        base = sum(curve[place] for curve, place in zip(curves, here, strict=True))
        progress(number + 1, num_windows, f"KL to second order {base / (number + 1):.5f}")
    return trades.keeps(cheapest(trades, curves))


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    powers = [2**power for power in range(most.bit_length())]
    return sorted({num for num in [*powers, most] if 0 < num <= most})


def _ranked_pairs(trials: Trials, trades: Trades) -> list[tuple[int, int]]:
    """(layer to give a step, layer to take one from), each layer once, widest gap first."""
    slope, levels = trials.slopes(trades.base, trades.step), trades.none
    layers = range(len(levels))
    ups = sorted((i for i in layers if trades.can(levels, i, 1)), key=lambda i: -slope[i])
    downs = sorted((i for i in layers if trades.can(levels, i, -1)), key=lambda i: slope[i])
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for up in ups:
        for down in downs:
            free = not {up, down} & used
            if free and slope[up] > slope[down] and trades.alike(up, down):
                pairs.append((up, down))
                used |= {up, down}
                break
    return pairs


def _probe_windows(trials: Trials, recipe: BudgetRecipe) -> int:
    num_windows, length = trials.masked.ids_WT.shape
    return min(num_windows, max(1, recipe.probe_tokens // length))


# --------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Bytes:
    """Bytes per token: of a list, and of the model as it was."""

    of: Callable[[Keeps], int]
    dense: int


@dataclass(frozen=True)
class Found:
    """The shares to use, one a layer, and what was measured on the way."""

    keep_fraction: list[float]
    report: dict[str, Any]


def search_budget(
    search: Trials,
    held: Trials,
    recipe: BudgetRecipe,
    *,
    bytes_: Bytes,
    seed: int,
    progress: Progress,
) -> Found:
    """The list of the target, searched on the windows of `search` and judged on those of `held`.

    Without a target the total is that of the recipe's shares. What was searched is taken only
    where the held-out text agrees that it is better (`agreed`): few tokens are easily learned by
    heart. `reached` in the report is False
    where no list that reads fewer bytes than the dense model kept within a quality target; the
    list is then the best of those.
    """
    allocation, target = search.allocation, recipe.target
    start, reached = allocation.start, True
    if target is not None:
        start, reached = _on_target(held, start, target, bytes_)
    trades = Trades(allocation, start, recipe.step)
    if recipe.method == "evolution":
        found = evolve(search, trades, recipe, seed, progress)
    elif recipe.method == "second_order":
        found = solve(search, trades, seed, progress)
    else:
        found = descend(search, trades, recipe, progress)
    agreed = held.score(found).kl <= held.score(start).kl
    if target is not None and target.bytes_per_token is None and reached:
        lower, holds = _on_target(held, found, target, bytes_)
        agreed = holds and bytes_.of(lower) <= bytes_.of(start)
        found = lower
    searched, found = found, found if agreed else start
    report = {
        "method": recipe.method,
        "target": None if target is None else target.model_dump(mode="json"),
        "reached": reached,
        "mean_keep": sum(found) / len(found),
        "bytes_per_token": bytes_.of(found),
        "start": _judged(start, search, held),
        "searched": _judged(searched, search, held),
        "found": _judged(found, search, held),
        "agreed": agreed,
        "windows_scored": search.num_windows_scored + held.num_windows_scored,
    }
    return Found(list(found), report)


def _judged(keeps: Keeps, search: Trials, held: Trials) -> dict[str, Any]:
    """What a list costs on both texts."""
    return {
        "keep_fraction": list(keeps),
        "kl_searched": search.score(keeps).kl,
        "kl_held": held.score(keeps).kl,
        "perplexity_increase_held": perplexity_increase(held, keeps),
    }


def perplexity_increase(trials: Trials, keeps: Keeps) -> float:
    """Perplexity with selection over that of the dense model, less one."""
    dense_W = trials.masked.dense_nll_W
    return math.exp(trials.score(keeps).nll - sum(dense_W) / len(dense_W)) - 1


def _on_target(
    held: Trials, keeps: Keeps, target: BudgetTargetRecipe, bytes_: Bytes
) -> tuple[Keeps, bool]:
    """The list shifted until it just meets the target, and whether it does."""
    allocation = held.allocation
    limit = target.bytes_per_token or bytes_.dense - 1
    most = allocation.largest_shift(keeps, bytes_.of, limit)
    if most is None:  # every list reads more than that: the one that reads least
        return allocation.shifted(keeps, allocation.shift_range(keeps)[0]), False
    if target.bytes_per_token is not None:
        return allocation.shifted(keeps, most), True

    def within(shifted: Keeps) -> bool:
        if target.kl is not None:
            return held.score(shifted).kl <= target.kl
        assert target.perplexity_increase is not None
        return perplexity_increase(held, shifted) <= target.perplexity_increase

    least = allocation.smallest_shift(keeps, within, below=most)
    return allocation.shifted(keeps, most if least is None else least), least is not None
