"""SAM, which the penalties are compared with."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from sharpness_aware import SharpnessAwareModel
import tensorflow as tf


def _regression_step(jit):
    """One step of SAM on a network with batch normalization."""
    inputs = keras.Input((4,), dtype="float64")
    x = keras.layers.Dense(5, dtype="float64")(inputs)
    x = keras.layers.BatchNormalization(dtype="float64")(x)
    x = keras.layers.Dense(3, dtype="float64")(keras.ops.tanh(x))
    network = keras.Model(inputs, x)
    model = SharpnessAwareModel(network, rho=0.25, dtype="float64")
    model.compile(
        keras.optimizers.SGD(0.125),  # no rounding
        keras.losses.MeanSquaredError(dtype="float64"),
        jit_compile=jit,
    )
    return network, model


@pytest.mark.parametrize("jit", [False, True])
def test_sharpness_aware_step_equals_the_formula(jit):
    network, model = _regression_step(jit)
    random = np.random.default_rng(0)
    # Keras rounds numbers of arrays to single precision.
    x, y = (random.integers(-8, 8, size=(8, n)) / 4 for n in (4, 3))
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((copy(x, training=True) - y) ** 2)
        return tape.gradient(loss, [v.value for v in copy.trainable_variables])

    start = [v.numpy() for v in copy.trainable_variables]
    gradients_at_start = gradients()
    statistics = [v.numpy() for v in copy.non_trainable_variables]
    norm = np.sqrt(sum(np.sum(g.numpy() ** 2) for g in gradients_at_start))
    for variable, value, g in zip(
        copy.trainable_variables, start, gradients_at_start
    ):
        variable.assign(value + 0.25 * g.numpy() / norm)
    expected = [a - 0.125 * g.numpy() for a, g in zip(start, gradients())]

    model.fit(x, y, batch_size=8, verbose=0)
    for variable, value in zip(network.trainable_variables, expected):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=1e-9, atol=1e-12
        )
    for variable, value in zip(network.non_trainable_variables, statistics):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=1e-9, atol=1e-12
        )
