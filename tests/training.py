"""A small network, its data, and how it is trained."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from keras_fisher import FisherPenalty

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(50, 6)).astype("float32")
Y = RANDOM.integers(0, 3, size=50)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class LikeliestLabels(FisherPenalty):
    """The Fisher Penalty with labels that no draw decides."""

    def labels(self, likelihood, outputs, y, seed):
        return tf.argmax(outputs, axis=-1)


def network(outputs=3, dropout=True, batch_norm=True, activation=None):
    """With all that a step may change beside weights."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8),
        keras.layers.BatchNormalization() if batch_norm else None,
        keras.layers.Activation("tanh"),
        keras.layers.Dropout(0.3, seed=5) if dropout else None,
        keras.layers.Dense(outputs, activation=activation),
    ]
    return keras.Sequential([layer for layer in layers if layer is not None])


def dense_network(inputs=4, hidden=(5,), outputs=3, dtype=None, seed=None):
    """Dense layers with tanh, and logits."""
    if seed is not None:
        keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            *[
                keras.layers.Dense(units, activation="tanh", dtype=dtype)
                for units in hidden
            ],
            keras.layers.Dense(outputs, dtype=dtype),
        ]
    )


def compiled(model, loss=LOSS, optimizer=None, **kwargs):
    """Compiles a model, and returns it."""
    if optimizer is None:
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    kwargs.setdefault("metrics", ["accuracy"])
    model.compile(optimizer, loss, **kwargs)
    return model


def fit(model, epochs=2, **kwargs):
    """Trains a model on `X` and `Y`, in batches of 8."""
    return model.fit(
        X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs
    )


def weights(model):
    """The trainable ones, as arrays."""
    return [v.numpy() for v in model.trainable_variables]


def assert_equal(actual, expected):
    """Fails unless arrays are equal to the bit."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.drop = keras.layers.Dropout(0.3, seed=5)
        self.out = keras.layers.Dense(3)

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))
