"""Counts."""

import cases
import distributions
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Poisson
from keras_fisher.likelihoods import poisson

_RATES = [0.0, 1e-6, 0.1, 1.0, 9.0, 77.0, 1e3, 9999.0]


@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 3, 2)], ids=str)
def test_poisson_nll_is_keras_loss_and_the_factorial(shape):
    outputs = tf.constant(distributions.rng(8).gamma(2.0, size=shape))
    y = tf.constant(distributions.rng(9).poisson(2.0, size=shape))
    found = Poisson().negative_log_likelihood(y, outputs)
    expected = distributions.poisson_loop(y.numpy(), outputs.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if len(shape) > 1:
        loss = keras.losses.Poisson(reduction="none", dtype="float64")
        errors = shape[-1] * loss(tf.cast(y, tf.float64), outputs).numpy()
        errors = errors.reshape(shape[0], -1).sum(axis=1)
        factorials = tf.math.lgamma(tf.cast(y, tf.float64) + 1).numpy()
        factorials = factorials.reshape(shape[0], -1).sum(axis=1)
        np.testing.assert_allclose(found, errors + factorials, atol=1e-5)


def test_a_rate_of_zero_is_sure_of_no_event():
    outputs = tf.constant([[0.0]], tf.float64)
    y = tf.constant([[0.0]])
    assert float(Poisson().negative_log_likelihood(y, outputs)[0]) == 0
    assert float(Poisson().score(y, outputs)[0, 0]) == 1
    _, factor = Poisson().fisher_factors(outputs)
    assert float(factor(0)[0, 0]) == 0


@pytest.mark.parametrize("mode", cases.MODES)
def test_quantiles_are_those_of_the_distribution(mode):
    u = np.linspace(2.0**-25, 1 - 2.0**-25, 1001)
    rates = np.array(_RATES)[:, None] * np.ones_like(u)
    found = cases.compiled(poisson._quantile, mode)(
        tf.constant(u + np.zeros_like(rates)), tf.constant(rates)
    )
    np.testing.assert_array_equal(found, stats.poisson.ppf(u, rates))


@pytest.mark.parametrize("rate", [10001.0, 1e5, 1e7])
def test_quantiles_of_large_rates_are_off_by_one_at_most_and_rarely(rate):
    u = np.linspace(2.0**-25, 1 - 2.0**-25, 10001)
    found = poisson._quantile(
        tf.constant(u), tf.fill(u.shape, np.float64(rate))
    )
    error = np.abs(found - stats.poisson.ppf(u, rate))
    assert error.max() <= 1
    assert error.mean() < 2e-3


@pytest.mark.parametrize("dtype", distributions.DTYPES)
def test_draws_have_the_frequencies_of_the_distribution(dtype):
    outputs = tf.constant([0.5, 4.0], dtype)
    drawn = distributions.double(
        Poisson().sample(distributions.tiled(outputs), random_draws.draw(3))
    )
    for column, rate in enumerate([0.5, 4.0]):
        counts = np.arange(4)
        distributions.assert_mean(
            drawn[:, column, None] == counts,
            stats.poisson.pmf(counts, rate),
            "frequency",
        )
    correlation = np.corrcoef(drawn.T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(distributions.DRAWS)


@pytest.mark.parametrize("rate", [1e-20, 1e-9, 0.3, 5.0])
@pytest.mark.parametrize("y", [0, 1, 4])
def test_other_counts_are_drawn_given_that_they_differ(y, rate):
    outputs = tf.fill([distributions.DRAWS, 1], np.float64(rate))
    labels, yes = tf.fill(outputs.shape, np.float64(y)), tf.ones([1, 1], bool)
    again = (
        Poisson()
        .sample_again(labels, outputs, random_draws.draw(1), ~yes, yes)
        .numpy()
    )
    p = stats.poisson.pmf(np.arange(15), rate)
    p[y] = 0
    found = again == np.arange(15)
    np.testing.assert_allclose(found.mean(axis=0), p / p.sum(), atol=0.015)
    same = Poisson().sample_again(
        labels, outputs, random_draws.draw(1), yes, ~yes
    )
    np.testing.assert_array_equal(same, labels)
    log_same = Poisson().log_repetition(labels, outputs)
    np.testing.assert_allclose(
        log_same, stats.poisson.logpmf(y, rate) + 0 * outputs, rtol=1e-12
    )


def _network():
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(2, activation="exponential"),
        ]
    )


@pytest.mark.slow
def test_the_exact_trace_is_the_sum_over_all_counts():
    model, expected = _network(), 0.0
    x = tf.constant(distributions.rng(4).normal(size=(2, 4)))
    for i in range(2):
        with tf.GradientTape(persistent=True) as tape:
            rates = model(x[i : i + 1])[0]
            parts = [rates[0], rates[1]]
        for part in parts:
            gradients = tape.gradient(part, model.trainable_variables)
            norm = sum(float(tf.reduce_sum(g**2)) for g in gradients)
            counts = np.arange(100)
            p = stats.poisson.pmf(counts, float(part))
            squared = np.sum(p * (1 - counts / float(part)) ** 2)
            expected += squared * norm / 2
    found = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood="poisson"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    drawn = keras_fisher.fisher_trace(
        model, x, num_samples=400, likelihood="poisson", seed=1
    )
    assert abs(drawn - expected) < 4 * drawn.standard_error


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("loss", "expected"), [("poisson", "Poisson"), ("mae", "Laplace")]
)
def test_models_train_with_the_loss(loss, expected, jit_compile):
    model = FisherModel(_network(), "fisher", trace_every=1)
    training.compiled(model, loss, metrics=None, jit_compile=jit_compile)
    assert type(model.likelihood).__name__ == expected
    x = distributions.rng(1).normal(size=(12, 4))
    y = distributions.rng(2).poisson(2.0, size=(12, 2))
    logs = model.fit(x, y, epochs=2, verbose=0).history
    assert np.isfinite(logs["fisher_penalty"]).all()
    assert logs["fisher_nonfinite"][-1] == 0


def test_poisson_has_no_uniform_labels():
    with pytest.raises(ValueError, match="no uniform labels"):
        Poisson().uniform(tf.zeros([3, 1]), random_draws.draw(0))


def test_rates_are_not_negative():
    Poisson().check(tf.constant([[0.0, 7.0]]))
    with pytest.raises(ValueError, match="range from -2 to 7"):
        Poisson().check(tf.constant([[-2.0, 7.0]]))
