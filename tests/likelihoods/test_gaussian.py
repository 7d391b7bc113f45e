"""Real numbers with normal errors."""

import math

import distributions
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Gaussian

_STDDEVS = [0.5, 1.0, 3.0]


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
def test_gaussian_nll_is_minus_the_log_density(dtype, shape, stddev):
    outputs = tf.cast(distributions.rng(8).normal(size=shape), dtype)
    y = distributions.rng(9).normal(size=shape)
    nll = Gaussian(stddev).negative_log_likelihood(tf.constant(y), outputs)
    assert nll.shape == shape[:1], nll.shape
    np.testing.assert_allclose(
        nll,
        distributions.gaussian_loop(y, distributions.double(outputs), stddev),
        rtol=1e-12 if dtype == "float64" else 1e-5,
    )


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("shape", [(6, 1), (4, 3, 2)], ids=str)
def test_gaussian_nll_is_half_the_squared_error_and_a_constant(shape, stddev):
    outputs = tf.constant(distributions.rng(8).normal(size=shape))
    y = tf.constant(distributions.rng(9).normal(size=shape))
    squares = keras.losses.MeanSquaredError(reduction="none", dtype="float64")
    errors = shape[-1] * squares(y, outputs).numpy()
    errors = errors.reshape(shape[0], -1).sum(axis=1)
    constant = np.log(stddev * np.sqrt(2 * np.pi)) * np.prod(shape[1:])
    np.testing.assert_allclose(
        Gaussian(stddev).negative_log_likelihood(y, outputs),
        errors / (2 * stddev**2) + constant,
        rtol=1e-12,
    )


@pytest.mark.parametrize("stddev", _STDDEVS)
def test_gaussian_gradient_is_the_scaled_error(stddev):
    outputs, y = (
        distributions.rng(8).normal(size=(4, 3)),
        distributions.rng(9).normal(size=(4, 3)),
    )
    gradient = distributions.gradient(
        lambda f: Gaussian(stddev).negative_log_likelihood(tf.constant(y), f),
        tf.constant(outputs),
    )
    np.testing.assert_allclose(gradient, (outputs - y) / stddev**2, rtol=1e-12)


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
def test_gaussian_draws_are_normal_around_the_outputs(dtype, stddev):
    outputs = tf.constant([-2.0, 0.5], dtype)
    drawn = Gaussian(stddev).sample(
        distributions.tiled(outputs), random_draws.draw(3)
    )
    assert drawn.shape == (distributions.DRAWS, 2), drawn.shape
    for column, mean in enumerate([-2.0, 0.5]):
        test = stats.kstest(
            distributions.double(drawn[:, column]), stats.norm(mean, stddev).cdf
        )
        assert test.pvalue > 1e-3, f"p-value {test.pvalue:.2g}"
    correlation = np.corrcoef(distributions.double(drawn).T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(distributions.DRAWS), (
        f"{correlation:.3f}"
    )


def test_gaussian_has_no_uniform_labels():
    with pytest.raises(ValueError, match="no uniform labels"):
        Gaussian().uniform(tf.zeros([3, 1]), random_draws.draw(0))


@pytest.mark.parametrize("stddev", [0, -1.0, math.inf, -math.inf, math.nan])
def test_gaussian_names_an_impossible_deviation(stddev):
    with pytest.raises(ValueError, match=f"Received: stddev={stddev}"):
        Gaussian(stddev)
