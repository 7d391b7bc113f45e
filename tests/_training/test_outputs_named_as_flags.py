"""Outputs that are called as the flags of noisy labels are."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import GradientPenalty

_NAMES = ("label", "is_noisy")
_X = training.X
_Y = dict(zip(_NAMES, (training.Y, (training.Y > 1).astype("float32"))))
_LOSSES = dict(zip(_NAMES, (training.LOSS, "binary_crossentropy")))


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.heads = [layers.Dense(3), layers.Dense(1, activation="sigmoid")]

    def call(self, x):
        return dict(zip(_NAMES, [head(x) for head in self.heads]))


def _network(kind):
    keras.utils.set_random_seed(1)
    if kind == "subclassed":
        return Named()
    x = keras.Input((6,))
    outputs = [
        layers.Dense(3, name="label")(x),
        layers.Dense(1, activation="sigmoid", name="is_noisy")(x),
    ]
    return keras.Model(
        x, outputs if kind == "list" else dict(zip(_NAMES, outputs))
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("trace_every", [None, 1])
@pytest.mark.parametrize("kind", ["dict", "list", "subclassed"])
def test_they_train_as_plain_keras_does(kind, trace_every):
    weights = None
    if kind != "list":  # Where Keras takes no weights by name.
        weights = dict(zip(_NAMES, (np.ones(50), np.arange(50) / 50)))
    model = FisherModel(_network(kind), trace_every=trace_every)
    found, expected = (
        training.compiled(each, _LOSSES, metrics=None).fit(
            _X, _Y, sample_weight=weights, shuffle=False, verbose=0
        )
        for each in (model, _network(kind))
    )
    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-6)
    evaluated = model.evaluate(_X, _Y, verbose=0, return_dict=True)
    assert not any("accuracy" in name for name in evaluated)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["dict", "list", "subclassed"])
def test_both_are_labels(kind):
    """In the trace with the labels given, and so in penalties."""
    model = FisherModel(_network(kind), GradientPenalty(1.0), trace_every=None)
    training.compiled(model, _LOSSES, metrics=None)
    model.fit(_X, _Y, verbose=0)
    given = keras_fisher.fisher_trace(model, _X, _Y, estimator="empirical")
    flipped = {**_Y, "is_noisy": 1 - _Y["is_noisy"]}
    other = keras_fisher.fisher_trace(model, _X, flipped, estimator="empirical")
    assert abs(given - other) > 1e-3
    assert keras_fisher.hessian_trace(model, _X, _Y, num_probes=2) > 0
