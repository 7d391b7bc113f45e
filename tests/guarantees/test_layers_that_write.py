"""Layers that write variables when they are called, and stop gradients."""

from __future__ import annotations

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import likelihoods
from keras_fisher._common import random_draws

_LOGITS = likelihoods.Categorical(from_logits=True)


def _network(*middle, dtype="float64"):
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(6),
            *[make() for make in middle],
            layers.Dense(4, activation="tanh"),
            layers.Dense(3),
        ]
    )


def _renormalization():
    return layers.BatchNormalization(renorm=True)


def _everything():
    """Statistics, seeds, a kernel and its vectors."""
    return _network(
        lambda: layers.SpectralNormalization(layers.Dense(5, "tanh")),
        lambda: layers.BatchNormalization(),
        *[_renormalization] * cases.has_keras("3.14"),
        lambda: layers.Dropout(0.3, seed=1),
        lambda: layers.GaussianNoise(0.1, seed=2),
        dtype="float32",
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", *cases.slow(["eager", "xla"])])
@pytest.mark.parametrize(
    "penalty", cases.FISHER_PENALTIES, ids=cases.name_of_penalty
)
def test_each_is_written_once_a_step(penalty, mode):
    # Without an update, what is written is all that changes.
    models = [FisherModel(_everything(), penalty, seed=0), _everything()]
    for model in models:
        training.compiled(
            model,
            optimizer=keras.optimizers.SGD(0.0),
            jit_compile=mode == "xla",
            run_eagerly=mode == "eager",
        )
        training.fit(model, epochs=1)
    found, expected = models[0].model, models[1]
    for a, b in zip(found.variables, expected.variables, strict=True):
        np.testing.assert_allclose(
            a.numpy(), b.numpy(), rtol=2e-5, atol=1e-6, err_msg=a.path
        )


def _penalized_gradient(model, x, method):
    """The gradient of the penalty by the trainable variables."""
    penalty = FisherPenalty(1.0, method=method)
    state = [(v, v.numpy()) for v in model.variables]
    with tf.GradientTape() as tape:
        forward = penalty.forward(model, x, seed=1)
        term = penalty(forward, _LOGITS, seed=2)
    gradients = tape.gradient(term.value, model.trainable_variables)
    written = [v.numpy() for v in model.variables]
    for variable, value in state:
        variable.assign(value)
    return np.concatenate([np.ravel(g) for g in gradients]), written


# Keras rounds inputs to single precision.
_X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")


def _distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_spectral_normalization_is_penalized_at_the_kernel_it_has_written(
    method,
):
    model = _network(lambda: layers.SpectralNormalization(layers.Dense(5)))
    found, written = _penalized_gradient(model, tf.constant(_X), method)
    # A dense layer with that kernel, which nothing is written to.
    plain = _network(lambda: layers.Dense(5))
    values = [
        value
        for variable, value in zip(model.variables, written)
        if variable.trainable
    ]
    plain.set_weights(values)
    expected, _ = _penalized_gradient(plain, tf.constant(_X), "exact")
    assert _distance(found, expected) < (1e-12 if method == "exact" else 1e-6)


class Applied(layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def _half_stopped(x, s=None):
    return x * (tf.stop_gradient(tf.sigmoid(x)) if s is None else s)


def _straight_through(x, s=None):
    return tf.tanh(x + (tf.stop_gradient(tf.round(x) - x) if s is None else s))


def _stopped_by_rounding(x):
    return tf.stop_gradient(tf.round(x) - x)


@pytest.mark.parametrize(
    "function, part, least",
    [
        (_half_stopped, lambda x: tf.sigmoid(x), 0.005),
        (_straight_through, _stopped_by_rounding, 0.05),
    ],
    ids=["stop gradient", "straight through"],
)
def test_what_is_stopped_is_constant_for_exact_and_moves_for_differences(
    function, part, least
):
    stopped = _network(lambda: Applied(function))
    gradients = {
        method: _penalized_gradient(stopped, tf.constant(_X), method)[0]
        for method in ("exact", "finite_difference")
    }
    # The stopped part, as it is at these weights, put in as a number.
    hidden = stopped.layers[0](tf.constant(_X, "float64"))
    held = _network(lambda: Applied(lambda x: function(x, part(hidden))))
    held.set_weights(stopped.get_weights())
    for method in ("exact", "finite_difference"):
        expected, _ = _penalized_gradient(held, tf.constant(_X), method)
        distance = _distance(gradients["exact"], expected)
        assert distance < (1e-12 if method == "exact" else 1e-6), distance
    distance = _distance(gradients["exact"], gradients["finite_difference"])
    assert distance > least, distance
    # Differences are those of the gradient, along itself.
    labels = _LOGITS.sample(stopped(tf.constant(_X)), random_draws.draw(2))
    start = stopped.get_weights()

    def gradient():
        with tf.GradientTape() as tape:
            outputs = stopped(tf.constant(_X), training=True)
            loss = _LOGITS.negative_log_likelihood(labels, outputs)
            loss = tf.reduce_mean(loss)
        return tape.gradient(loss, stopped.trainable_variables)

    here, step, moved = gradient(), 1e-5, []
    for sign in (1, -1):
        stopped.set_weights(
            [w + sign * step * g.numpy() for w, g in zip(start, here)]
        )
        moved.append(np.concatenate([np.ravel(g) for g in gradient()]))
    difference = (moved[0] - moved[1]) / step
    distance = _distance(gradients["finite_difference"], difference)
    assert distance < 1e-5, distance


@cases.since_keras("3.14")
def test_batch_renormalization_holds_its_corrections_constant():
    model = _network(_renormalization)
    exact, differences = (
        _penalized_gradient(model, tf.constant(_X), method)[0]
        for method in ("exact", "finite_difference")
    )
    distance = _distance(exact, differences)
    assert 1e-3 < distance < 1, distance
