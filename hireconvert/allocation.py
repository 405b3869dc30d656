"""Shares of neurons kept, one a layer: counts, bounds, shifting all of them, trading between two.

A list of shares is a tuple of floats; all arithmetic is in steps, so that totals stay exact.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from hireconvert.recipe import FfnRecipe, per_layer
from hireconvert.runtime.hire_predict import num_active
from hireconvert.scoring import layer_counts

Keeps = tuple[float, ...]
Levels = tuple[int, ...]  # steps above (or below) the list that a search starts from

SHIFT = 0.01  # granularity of a total
_DIGITS = 6


@dataclass(frozen=True)
class Allocation:
    """What may be given to each layer: `neurons` are the sizes of their FFNs."""

    neurons: tuple[int, ...]
    recipe: FfnRecipe

    @property
    def start(self) -> Keeps:
        """The recipe's own shares. Raises UsageError where its list is not one a layer."""
        keeps = per_layer(self.recipe.keep_fraction, len(self.neurons), "ffn.keep_fraction")
        return tuple(keeps)

    @property
    def highest(self) -> float:
        """The share from which on every neuron is a candidate, so that more would cost nothing.

        All are, by their estimates alone, where a row keeps however many reach a level.
        """
        recipe = self.recipe
        if recipe.keep == "candidates" and recipe.selection != "fixed":
            return 1.0
        return 1 / recipe.over_select

    def active(self, keeps: Keeps) -> tuple[int, ...]:
        """Neurons in use per token and layer, with the rounding that a conversion makes."""
        layers = range(len(self.neurons))
        return tuple(self.active_in(layer, keep) for layer, keep in zip(layers, keeps, strict=True))

    def active_in(self, layer: int, keep: float) -> int:
        """Neurons in use per token in one layer."""
        return num_active(layer_counts(self.neurons[layer], self.recipe, keep))

    def shifted(self, keeps: Keeps, steps: int) -> Keeps:
        """Every share moved by `steps` times SHIFT, as far as the bounds let it."""

        def moved(keep: float) -> float:
            low, high = min(SHIFT, keep), max(self.highest, keep)
            return round(min(max(keep + steps * SHIFT, low), high), _DIGITS)

        return tuple(moved(keep) for keep in keeps)

    def smallest_shift(
        self, keeps: Keeps, holds: Callable[[Keeps], bool], *, below: int | None = None
    ) -> int | None:
        """The fewest steps, at most `below`, at which `holds`; None where it does at none.

        Bisection, about seven calls: what holds for a list must hold for one with larger shares.
        The shift returned is one for which it was seen to hold.
        """
        low, high = self.shift_range(keeps)
        if below is not None:
            low, high = min(low, below), min(high, below)
        if not holds(self.shifted(keeps, high)):
            return None
        while low < high:
            middle = (low + high) // 2
            if holds(self.shifted(keeps, middle)):
                high = middle
            else:
                low = middle + 1
        return high

    def largest_shift(self, keeps: Keeps, cost: Callable[[Keeps], int], limit: int) -> int | None:
        """The most steps at which `cost` is at most `limit`; None where it always is more."""
        low, high = self.shift_range(keeps)
        above = self.smallest_shift(keeps, lambda shifted: cost(shifted) > limit)
        if above is None:
            return high
        return above - 1 if above > low else None

    def shift_range(self, keeps: Keeps) -> tuple[int, int]:
        """Steps from which on, downwards and upwards, nothing moves any more."""
        span = round(1 / SHIFT)
        low, high = -span, span
        while low < 0 and self.shifted(keeps, low + 1) == self.shifted(keeps, low):
            low += 1
        while high > 0 and self.shifted(keeps, high - 1) == self.shifted(keeps, high):
            high -= 1
        return low, high


@dataclass(frozen=True)
class Trades:
    """Lists that differ from `base` by whole steps in some layers and have the same total."""

    allocation: Allocation
    base: Keeps
    step: float

    @property
    def none(self) -> Levels:
        """The base itself."""
        return (0,) * len(self.base)

    def keeps(self, levels: Levels) -> Keeps:
        """The shares of a list."""
        layers = range(len(self.base))
        return tuple(self.keep(layer, level) for layer, level in zip(layers, levels, strict=True))

    def keep(self, layer: int, level: int) -> float:
        """The share of one layer."""
        return round(self.base[layer] + level * self.step, _DIGITS)

    def can(self, levels: Levels, layer: int, by: int) -> bool:
        """Whether one layer may move by that many steps."""
        keep = self.keep(layer, levels[layer] + by)
        lowest = min(self.step, self.base[layer])
        highest = max(self.allocation.highest, self.base[layer])
        return lowest <= keep <= highest

    def reach(self, layer: int) -> range:
        """The levels that one layer may stand at, from the base's on both sides."""
        low = high = 0
        while self.can(self.none, layer, low - 1):
            low -= 1
        while self.can(self.none, layer, high + 1):
            high += 1
        return range(low, high + 1)

    def moved(self, levels: Levels, ups: list[int], downs: list[int]) -> Levels:
        """One step more in some layers and one less in others."""
        change = {**dict.fromkeys(ups, 1), **dict.fromkeys(downs, -1)}
        return tuple(level + change.get(index, 0) for index, level in enumerate(levels))

    def alike(self, one: int, other: int) -> bool:
        """Whether a step of one layer costs what a step of the other does."""
        neurons = self.allocation.neurons
        return neurons[one] == neurons[other]

    def mutant(self, levels: Levels, seeded: random.Random) -> Levels:
        """A list one to three random trades away, few being likelier; itself where none can be."""
        for _ in range(min(seeded.randint(1, 3), seeded.randint(1, 3))):
            pairs = [
                (up, down)
                for up in range(len(levels))
                for down in range(len(levels))
                if up != down and self.alike(up, down)
                if self.can(levels, up, 1) and self.can(levels, down, -1)
            ]
            if not pairs:
                break
            up, down = seeded.choice(pairs)
            levels = self.moved(levels, [up], [down])
        return levels
