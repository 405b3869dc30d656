"""Paired statistics against known values, and intervals that cover what they should."""

import math

import numpy as np
import pytest

from hireconvert.paired import (
    block_mean,
    mcnemar,
    mean_difference,
    mean_of_tasks,
    perplexity_ratio,
)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    found = mcnemar([1] * 8 + [0] * 2 + [1] * 50, [0] * 8 + [1] * 2 + [1] * 50)
    assert (found.only_converted, found.only_dense) == (8, 2)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar([1, 0], [1, 0]).p == 1.0
    assert mcnemar([0] * 6, [1] * 6).p == pytest.approx(2 / 64)


def test_mcnemar_wants_zeros_and_ones() -> None:
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5, 1.0], [0.5, 1.0])


def test_a_large_sample_gives_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.2, 1.0, 900)
    found = mean_difference(values, np.zeros(900))
    margin = 1.96 * values.std() / 30
    assert found.point == pytest.approx(values.mean()) and found.n == 900
    assert found.low == pytest.approx(values.mean() - margin, abs=0.1 * margin)
    assert found.high == pytest.approx(values.mean() + margin, abs=0.1 * margin)


@pytest.mark.parametrize("n", [3, 6, 20])
def test_small_samples_still_cover_the_truth(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for seed in range(200):
        found = mean_difference(rng.normal(0.3, 1.0, n), np.zeros(n), seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 200 <= 0.99  # plain percentiles cover 0.73 of three normal values


def test_pairs_that_never_differ_do_not_prove_equality() -> None:
    few, many = (mean_difference(np.ones(n), np.ones(n)) for n in (10, 1000))
    assert few.point == 0.0 and few.low < -0.1 and few.high > 0.1
    assert -0.005 < many.low < 0.0 < many.high < 0.005


def test_outcomes_stay_within_their_range() -> None:
    found = mean_difference([0, 0, 0], [1, 1, 1])
    assert found.point == -1.0 == found.low and found.high < 1.0


def test_the_seed_decides_the_draws() -> None:
    values, zeros = np.random.default_rng(0).normal(size=50), np.zeros(50)
    assert mean_difference(values, zeros, seed=3) == mean_difference(values, zeros, seed=3)
    assert mean_difference(values, zeros, seed=3) != mean_difference(values, zeros, seed=4)


def test_tasks_weigh_the_same_whatever_their_size() -> None:
    large, small = np.zeros(2000), np.array([-1.0, 0.0] * 50)
    found = mean_of_tasks([large, small])
    assert found.point == pytest.approx(-0.25) and found.n == 2100
    alone = mean_of_tasks([small])
    # The large task adds next to nothing, so the error of the mean is half the small one's.
    assert found.high - found.low == pytest.approx((alone.high - alone.low) / 2, rel=0.05)


def test_tokens_of_a_block_move_together() -> None:
    rng = np.random.default_rng(0)
    block_W = rng.normal(0.0, 1.0, 40)
    values = np.repeat(block_W, 100) + rng.normal(0.0, 0.1, 4000)
    found = block_mean(values, [100] * 40)
    assert found.n == 40 and found.point == pytest.approx(values.mean())
    margin = 1.96 * block_W.std() / math.sqrt(40)
    assert (found.high - found.low) / 2 == pytest.approx(margin, rel=0.15)
    as_if_independent = mean_difference(values, np.zeros(4000))
    assert found.high - found.low > 5 * (as_if_independent.high - as_if_independent.low)


def test_blocks_may_differ_in_length() -> None:
    values = [1.0] * 30 + [3.0] * 10
    found = block_mean(values, [30, 10])
    assert found.point == pytest.approx(1.5)
    # Drawn twice alike, the means are 1 and 3; two units stretch that range by Student's t.
    assert found.low < 1.0 and found.high > 3.0


def test_a_perplexity_ratio_is_paired() -> None:
    dense = np.random.default_rng(0).normal(3.0, 1.0, 2000)
    wobble = np.random.default_rng(1).normal(0.01, 0.005, 2000)
    found = perplexity_ratio(dense + wobble, dense, [200] * 10)
    assert found.point == pytest.approx(math.exp(wobble.mean()))
    assert 1.009 < found.low < found.point < found.high < 1.011  # the losses' spread cancels


@pytest.mark.parametrize("lengths", [[10], [4, 5], [0, 10], []])
def test_blocks_must_cover_the_values(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not make blocks"):
        block_mean(np.arange(10.0), lengths)


def test_one_item_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two items"):
        mean_difference([1.0], [0.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        mean_difference([1.0, 0.0], [0.0])
