"""The whole Hessian of a small network, and what probes see of it."""

from __future__ import annotations

import keras
import networks
import numpy as np
import tensorflow as tf

from keras_fisher._measuring import hessian_trace

# Keras's losses compute in float32 unless told otherwise.
LOSS = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, dtype="float64"
)
Y = np.arange(networks.BATCH) % networks.CLASSES


def whole(model, loss) -> np.ndarray:
    """By central differences of the gradient along each axis, in float64."""
    variables = [v.value for v in model.trainable_variables]

    def gradient():
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(
            value,
            variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return np.concatenate(
            [np.ravel(tf.convert_to_tensor(g)) for g in gradients]
        )

    columns = []
    for variable in model.trainable_variables:
        start = variable.numpy()
        for i in range(start.size):
            moved = []
            for step in (1e-5, -1e-5):
                value = start.copy()
                value.flat[i] += step
                variable.assign(value)
                moved.append(gradient())
            columns.append((moved[0] - moved[1]) / 2e-5)
        variable.assign(start)
    return np.array(columns)


def quadratic_forms(model, matrix, seed, count) -> np.ndarray:
    """vᵀ H v for the probes that hessian_trace draws."""
    values = [tf.constant(v.numpy()) for v in model.trainable_variables]
    forms = []
    for k in range(count):
        probe = hessian_trace._signs(
            values, tf.constant([seed, 0], tf.int64), tf.constant(k)
        )
        v = np.concatenate([np.ravel(p) for p in probe])
        assert set(v) == {-1.0, 1.0}
        forms.append(v @ matrix @ v)
    return np.array(forms)
