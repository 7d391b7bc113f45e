"""Independent answers, yes or no."""

import math

import cases
import distributions
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Bernoulli


@pytest.mark.parametrize(
    "shape", [(6,), (6, 1), (6, 4), (4, 3, 1), (3, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_bernoulli_nll_is_that_of_a_loop(from_logits, dtype, shape):
    outputs = distributions.bernoulli_outputs(shape, from_logits, dtype)
    soft = distributions.rng(5).random(shape)
    for y in (soft, soft < 0.5, (soft < 0.5).astype("int64")):
        nll = Bernoulli(from_logits).negative_log_likelihood(
            tf.constant(y), outputs
        )
        assert nll.shape == shape[:1], nll.shape
        # Single precision knows 1 - p only to 6e-8.
        np.testing.assert_allclose(
            nll,
            distributions.bernoulli_loop(
                y.astype("float64"), distributions.double(outputs), from_logits
            ),
            rtol=1e-12 if dtype == "float64" else 1e-5,
            err_msg=f"with {y.dtype} labels",
        )


@pytest.mark.parametrize("shape", [(6, 1), (6, 4), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("from_logits", [True, False])
def test_bernoulli_nll_adds_up_keras_losses(from_logits, shape):
    outputs = distributions.bernoulli_outputs(shape, from_logits, "float32")
    y = tf.constant(distributions.rng(6).integers(0, 2, shape))
    loss = keras.losses.BinaryCrossentropy(from_logits, reduction="none")
    # Keras takes the mean over the last axis.
    expected = shape[-1] * loss(y, outputs).numpy()
    nll = likelihoods.get(loss).negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(
        nll, expected.reshape(shape[0], -1).sum(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_labels_may_lack_the_last_axis(from_logits):
    outputs = distributions.bernoulli_outputs((6, 1), from_logits, "float64")
    y = distributions.rng(7).integers(0, 2, 6)
    likelihood = Bernoulli(from_logits)
    np.testing.assert_array_equal(
        likelihood.negative_log_likelihood(tf.constant(y), outputs),
        likelihood.negative_log_likelihood(tf.constant(y[:, None]), outputs),
    )


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", cases.MODES)
def test_bernoulli_gradient_is_p_minus_the_label(from_logits, mode):
    logits = tf.constant(2 * distributions.rng(2).normal(size=(4, 3)))
    y = distributions.rng(5).random((4, 3))
    link = tf.identity if from_logits else tf.sigmoid
    gradient = cases.compiled(
        lambda logits: distributions.gradient(
            lambda z: Bernoulli(from_logits).negative_log_likelihood(
                tf.constant(y), link(z)
            ),
            logits,
        ),
        mode,
    )(logits)
    p = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(gradient, p - y, atol=1e-12)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exponent", [-12, -30, -36])
def test_gradient_reaches_an_improbable_yes_through_a_sigmoid(
    exponent, dtype, mode
):
    logit = exponent * math.log(10)
    likelihood = Bernoulli(from_logits=False)

    def nll(logits):
        return likelihood.negative_log_likelihood(
            tf.constant([1.0, 0.0]), tf.sigmoid(logits)
        )

    logits = tf.constant([logit] * 2, dtype)
    gradient = cases.compiled(lambda z: distributions.gradient(nll, z), mode)(
        logits
    )
    p = 1 / (1 + math.exp(-logit))
    np.testing.assert_allclose(gradient, [p - 1, p], atol=1e-6)
    np.testing.assert_allclose(nll(logits)[0], -math.log(p), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_yes_is_drawn_with_its_probability(from_logits, dtype, seed):
    outputs = (
        np.log(distributions.P / (1 - distributions.P))
        if from_logits
        else distributions.P
    )
    outputs = tf.cast(outputs, dtype)
    p = distributions.double(outputs)
    if from_logits:
        p = 1 / (1 + np.exp(-p))
    drawn = Bernoulli(from_logits).sample(
        distributions.tiled(outputs), random_draws.draw(seed)
    )
    assert drawn.shape == (distributions.DRAWS, 4), drawn.shape
    assert set(np.unique(drawn)) == {0, 1}, np.unique(drawn)
    distributions.assert_mean(distributions.double(drawn), p, "frequency")
    # The outputs of one example are independent of each other.
    products = distributions.double(drawn[:, :3] * drawn[:, 1:])
    distributions.assert_mean(products, p[:3] * p[1:], "frequency of two")


@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_uniform_answers_do_not_depend_on_the_outputs(from_logits, dtype):
    outputs = tf.cast(
        np.log(distributions.P / (1 - distributions.P))
        if from_logits
        else distributions.P,
        dtype,
    )
    drawn = Bernoulli(from_logits).uniform(
        distributions.tiled(outputs), random_draws.draw(1)
    )
    assert drawn.shape == (distributions.DRAWS, 4), drawn.shape
    assert set(np.unique(drawn)) == {0, 1}, np.unique(drawn)
    distributions.assert_mean(distributions.double(drawn), 0.5, "frequency")
    distributions.assert_mean(
        distributions.double(drawn[:, 1:] * drawn[:, :-1]), 0.25, "of two"
    )
