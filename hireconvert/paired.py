"""Paired statistics: how far two models differ on the same items, with 95 % intervals.

Shapes: N items or tokens, W blocks (windows or documents of tokens), B bootstrap draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_NUM_DRAWS = 10_000
_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
# Random numbers held at once while bootstrapping, in elements.
_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over `n` independent units (items, windows, documents)."""

    point: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """Items that only one of two models solves, and the exact two-sided p of such a split."""

    only_dense: int
    only_converted: int
    p: float


def mean_difference(converted_N: ArrayLike, dense_N: ArrayLike, *, seed: int = 0) -> Interval:
    """The mean of converted minus dense over paired items, by `mean_of_tasks` with one task."""
    return mean_of_tasks([_paired(converted_N, dense_N)], seed=seed)


def mean_of_tasks(differences: Sequence[ArrayLike], *, seed: int = 0) -> Interval:
    """The mean over tasks of each task's mean paired difference; items are drawn within tasks.

    Differences of 0/1 outcomes (-1, 0, 1) get an interval no narrower than Bonett and Price's
    (2012): without it, items on which the models never differ would prove a difference of zero.
    Every task needs two items, or ValueError.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in differences]
    if not arrays or min(len(values_N) for values_N in arrays) < 2:
        raise ValueError("an interval needs two items of every task")
    rng = np.random.default_rng(seed)
    point = float(np.mean([values_N.mean() for values_N in arrays]))
    drawn_B = np.mean([_drawn_means(values_N, rng) for values_N in arrays], axis=0)
    low, high = _stretched(point, drawn_B, min(len(values_N) for values_N in arrays))
    variances = [_outcome_variance(values_N) for values_N in arrays]
    if all(variance is not None for variance in variances):
        margin = _Z * math.sqrt(sum(filter(None, variances))) / len(arrays)
        low, high = max(-1.0, min(low, point - margin)), min(1.0, max(high, point + margin))
    return Interval(point, low, high, sum(len(values_N) for values_N in arrays))


def block_mean(values_N: ArrayLike, lengths: Sequence[int], *, seed: int = 0) -> Interval:
    """The mean of per-token values, whole blocks of `lengths` consecutive tokens being drawn.

    Tokens of one block are not independent. Needs two blocks that cover the values, or ValueError.
    """
    values = np.asarray(values_N, dtype=np.float64)
    size_W = np.asarray(lengths, dtype=np.int64)
    if len(size_W) < 2 or size_W.min() < 1 or size_W.sum() != len(values):
        raise ValueError(f"{len(values)} values do not make blocks of {list(lengths)[:8]} values")
    sum_W = np.add.reduceat(values, np.concatenate([[0], size_W.cumsum()[:-1]]))
    rng = np.random.default_rng(seed)
    drawn_B = np.empty(_NUM_DRAWS)
    for rows in _chunks(len(size_W)):
        picked_BW = rng.integers(len(size_W), size=(rows.stop - rows.start, len(size_W)))
        drawn_B[rows] = sum_W[picked_BW].sum(1) / size_W[picked_BW].sum(1)
    point = float(values.mean())
    return Interval(point, *_stretched(point, drawn_B, len(size_W)), len(size_W))


def perplexity_ratio(
    converted_nll_N: ArrayLike, dense_nll_N: ArrayLike, lengths: Sequence[int], *, seed: int = 0
) -> Interval:
    """Perplexity of converted over dense on the same tokens, blocks drawn as in `block_mean`.

    The losses are negative log-likelihoods in nats, one a token; 1.01 is one per cent more.
    """
    log = block_mean(_paired(converted_nll_N, dense_nll_N), lengths, seed=seed)
    return Interval(math.exp(log.point), math.exp(log.low), math.exp(log.high), log.n)


def mcnemar(converted_N: ArrayLike, dense_N: ArrayLike) -> McNemar:
    """The exact test of paired 0/1 outcomes: a fair coin decides each item that only one solves.

    Raises ValueError for other outcomes.
    """
    difference_N = _paired(converted_N, dense_N)
    for values in (converted_N, dense_N):
        if not np.isin(np.asarray(values), (0, 1)).all():
            raise ValueError("McNemar's test needs outcomes of 0 and 1")
    gained, lost = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    total = gained + lost
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    return McNemar(only_dense=lost, only_converted=gained, p=min(1.0, 2 * tail / 2**total))


# ----------------------------------------------------------------------------------- the machinery


def _paired(converted_N: ArrayLike, dense_N: ArrayLike) -> Floats:
    converted, dense = (np.asarray(one, dtype=np.float64) for one in (converted_N, dense_N))
    if converted.shape != dense.shape or converted.ndim != 1:
        raise ValueError(f"{converted.shape} values cannot be paired with {dense.shape}")
    return converted - dense


def _chunks(width: int) -> list[slice]:
    size = max(1, _ELEMENTS_AT_ONCE // width)
    starts = range(0, _NUM_DRAWS, size)
    return [slice(start, min(start + size, _NUM_DRAWS)) for start in starts]


def _drawn_means(values_N: Floats, rng: np.random.Generator) -> Floats:
    """Means of samples with replacement, float64 [B]; equal values are drawn together."""
    value_U, count_U = np.unique(values_N, return_counts=True)
    share_U = count_U / len(values_N)
    drawn_B = np.empty(_NUM_DRAWS)
    for rows in _chunks(len(value_U)):
        times_BU = rng.multinomial(len(values_N), share_U, size=rows.stop - rows.start)
        drawn_B[rows] = times_BU @ value_U / len(values_N)
    return drawn_B


def _stretched(point: float, drawn_B: Floats, n: int) -> tuple[float, float]:
    """The draws' percentiles, moved away from the point as Student's t asks for `n` units.

    Plain percentiles are too narrow for few units: draws have the variance of n units where n - 1
    are free, and tails as if that variance were known.
    """
    low, high = np.quantile(drawn_B, [_TAIL, 1 - _TAIL])
    factor = _student_quantile(n - 1) / _Z * math.sqrt(n / (n - 1))
    return point - (point - float(low)) * factor, point + (float(high) - point) * factor


def _student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; its tangent form has a bounded integral."""
    if freedom > 1000:
        return _Z
    angle_G = np.linspace(0, math.pi / 2, 100_001)
    density_G = np.cos(angle_G) ** (freedom - 1)
    mass_G = np.concatenate([[0.0], ((density_G[1:] + density_G[:-1]) / 2).cumsum()])
    angle = float(np.interp(1 - 2 * _TAIL, mass_G / mass_G[-1], angle_G))
    return math.sqrt(freedom) * math.tan(angle)


def _outcome_variance(difference_N: Floats) -> float | None:
    """Variance of a mean difference of 0/1 outcomes with one item added to either side."""
    if not np.isin(difference_N, (-1.0, 0.0, 1.0)).all():
        return None
    n = len(difference_N) + 2
    gained, lost = ((float((sign * difference_N > 0).sum()) + 1) / n for sign in (1, -1))
    return (gained + lost - (gained - lost) ** 2) / n
