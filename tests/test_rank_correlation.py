"""Spearman's rank correlation and its interval."""

from __future__ import annotations

import math
import warnings

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
import numpy as np
import pytest
from scipy import stats

from keras_fisher import plotting


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def _normals(seed, count, correlation=0.6):
    random = np.random.default_rng(seed)
    x, noise = random.normal(size=[2, count])
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def test_the_rank_correlation_is_that_of_scipy():
    x, y = _normals(0, 30)
    y = np.round(2 * y)  # ties
    found = plotting.rank_correlation(x, y)
    assert found.correlation == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.count == 30
    for confidence in (0.95, 0.5):
        ours = plotting.rank_correlation(
            x, y, confidence=confidence, resamples=4000
        )
        theirs = stats.bootstrap(
            (x, y),
            lambda x, y: stats.spearmanr(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=1000,
            confidence_level=confidence,
            method="percentile",
            random_state=1,
        ).confidence_interval
        np.testing.assert_allclose(ours[1:3], theirs, atol=0.04)
    assert found.low < ours.low < found.correlation < ours.high < found.high


def test_each_resample_has_ranks_of_its_own():
    x, y = np.random.default_rng(0).integers(6, size=[2, 50, 8])
    np.testing.assert_allclose(
        plotting._spearman(x, y),
        [stats.spearmanr(*pair).statistic for pair in zip(x, y)],
        atol=1e-12,
    )


def test_the_interval_covers_the_true_correlation():
    truth = 6 / math.pi * math.asin(0.6 / 2)
    covered = 0
    for seed in range(100):
        found = plotting.rank_correlation(*_normals(seed, 40), resamples=500)
        covered += found.low <= truth <= found.high
    # 95 expected, with a standard deviation of 2.
    assert 88 <= covered <= 100


def test_the_seed_decides():
    x, y = _normals(0, 20)
    found = plotting.rank_correlation(x, y)
    assert plotting.rank_correlation(x, y, seed=0) == found
    other = plotting.rank_correlation(x, y, seed=1)
    assert other.low != found.low
    assert other.correlation == found.correlation


def test_constant_sides_have_no_correlation():
    # Of these resamples, a third is constant.
    found = plotting.rank_correlation([1] * 7 + [2], range(8))
    assert np.isfinite(found).all()
    for count in (3, 9):
        found = plotting.rank_correlation(range(count), [7] * count)
        assert np.isnan(found[:3]).all() and found.count == count


def test_few_pairs_have_no_interval():
    # All resamples of pairs in order are in order, of however few.
    for count in range(3, 8):
        found = plotting.rank_correlation(range(count), range(count, 0, -1))
        assert found.correlation == -1.0 and found.count == count
        assert math.isnan(found.low) and math.isnan(found.high)
    found = plotting.rank_correlation(range(8), range(8, 0, -1))
    assert found == (-1.0, -1.0, -1.0, 8)


def test_intervals_of_the_fewest_pairs_cover_a_strong_correlation():
    truth = 6 / math.pi * math.asin(0.9 / 2)
    covered = 0
    for seed in range(100):
        found = plotting.rank_correlation(*_normals(seed, 8, 0.9))
        covered += found.low <= truth <= found.high
    # Of 6 pairs it would be 87.
    assert 90 <= covered <= 100


def test_the_rank_correlation_needs_three_finite_pairs():
    nan, inf = np.nan, np.inf
    found = plotting.rank_correlation([1, nan, 3, 4, inf], [1, 2, 3, 4, 0])
    assert found[0] == 1.0 and found.count == 3
    with pytest.raises(ValueError, match=r"3 or more.*2 of 4 pairs"):
        plotting.rank_correlation([1, nan, 3, 4], [1, 2, inf, 4])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        plotting.rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="vectors"):
        plotting.rank_correlation(np.ones([2, 3]), np.ones([2, 3]))
    for confidence in (0.0, 1.0, 95, nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            plotting.rank_correlation(
                [1, 2, 3], [1, 2, 3], confidence=confidence
            )
