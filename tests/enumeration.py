"""Networks whose labels can all be listed."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest


def network(shape, *body, dtype="float64"):
    keras.config.set_dtype_policy(dtype)
    model = keras.Sequential(
        [keras.Input(shape, dtype=dtype), *[make() for make in body]]
    )
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(0.5 * random.normal(size=variable.shape))
    x = random.normal(size=(5, *shape)).astype(dtype)
    return model, x


def hidden():
    return layers.Dense(4, activation="tanh")


def classifier(classes, activation=None):
    return network(
        (3,), hidden, lambda: layers.Dense(classes, activation=activation)
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)
