"""Real numbers with two-sided exponential errors."""

import math

import distributions
import keras
import numpy as np
import pytest
from scipy import integrate
from scipy import stats
import tensorflow as tf
import training

import keras_fisher
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Laplace

_SCALES = [0.5, 1.0, 3.0]


@pytest.mark.parametrize("scale", _SCALES)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 3, 2)], ids=str)
def test_laplace_nll_is_the_absolute_error_and_a_constant(shape, scale):
    outputs = tf.constant(distributions.rng(8).normal(size=shape))
    y = tf.constant(distributions.rng(9).normal(size=shape))
    found = Laplace(scale).negative_log_likelihood(y, outputs)
    expected = distributions.laplace_loop(y.numpy(), outputs.numpy(), scale)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if len(shape) > 1:
        loss = keras.losses.MeanAbsoluteError(reduction="none", dtype="float64")
        errors = shape[-1] * loss(y, outputs).numpy()
        errors = errors.reshape(shape[0], -1).sum(axis=1) / scale
        constant = np.log(2 * scale) * np.prod(shape[1:])
        np.testing.assert_allclose(found, errors + constant, rtol=1e-12)


@pytest.mark.parametrize("scale", _SCALES)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
def test_laplace_draws_lie_around_the_outputs(dtype, scale):
    outputs = tf.constant([-2.0, 0.5], dtype)
    drawn = Laplace(scale).sample(
        distributions.tiled(outputs), random_draws.draw(3)
    )
    for column, median in enumerate([-2.0, 0.5]):
        test = stats.kstest(
            distributions.double(drawn[:, column]), "laplace", (median, scale)
        )
        assert test.pvalue > 1e-3, f"p-value {test.pvalue:.2g}"
    correlation = np.corrcoef(distributions.double(drawn).T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(distributions.DRAWS)


def test_laplace_draws_are_finite_at_both_ends():
    drawn = Laplace().sample(tf.zeros([2**20]), random_draws.draw(1))
    assert np.isfinite(drawn).all()
    assert drawn.numpy().min() < -10
    assert drawn.numpy().max() > 10


def test_the_exact_trace_is_the_quadrature_over_labels():
    model = training.dense_network(outputs=2, dtype="float64", seed=1)
    x, likelihood = (
        tf.constant(distributions.rng(4).normal(size=(2, 4))),
        (Laplace(0.7)),
    )
    expected = 0.0
    for i in range(2):
        with tf.GradientTape(persistent=True) as tape:
            outputs = model(x[i : i + 1])[0]
            parts = [outputs[0], outputs[1]]
        for part in parts:
            gradients = tape.gradient(
                part,
                model.trainable_variables,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            norm = sum(float(tf.reduce_sum(g**2)) for g in gradients)
            expected += _information(likelihood, float(part)) * norm / 2
    found = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood=likelihood
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _information(likelihood, output):
    """E (∂ log p / ∂f)² by quadrature, on both sides of the output."""

    def integrand(y):
        density = stats.laplace.pdf(y, output, likelihood.scale)
        return density * _score(likelihood, y, output) ** 2

    sides = (output, output + 30), (output - 30, output)
    return sum(integrate.quad(integrand, *side)[0] for side in sides)


def _score(likelihood, y, output):
    found = likelihood.score(
        tf.constant([[y]], tf.float64), tf.constant([[output]], tf.float64)
    )
    return float(found[0, 0])


def test_laplace_has_no_uniform_labels():
    with pytest.raises(ValueError, match="no uniform labels"):
        Laplace().uniform(tf.zeros([3, 1]), random_draws.draw(0))


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "wide"])
def test_laplace_names_an_impossible_scale(scale):
    with pytest.raises(ValueError, match=f"Received: scale={scale!r}"):
        Laplace(scale)
