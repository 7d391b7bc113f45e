"""To measure a model leaves it, and what is trained later, as it was."""

from __future__ import annotations

import cases
import keras
from keras import layers
import numpy as np
import pytest
import training

import keras_fisher
from keras_fisher import FisherModel

_RANDOM = np.random.default_rng(0)
_SEQUENCES = _RANDOM.normal(size=(24, 4, 3)).astype("float32")
_LABELS = _RANDOM.integers(0, 3, 24)


class Unbuilt(keras.Model):
    """Is built by its first call alone."""

    def __init__(self):
        super().__init__()
        self.recurrent = layers.GRU(
            3, dropout=0.3, recurrent_dropout=0.3, seed=1
        )
        self.out = layers.Dense(3)

    def call(self, x, training=None):
        return self.out(self.recurrent(x, training=training))


def _recurrent(layer, activation=None):
    keras.utils.set_random_seed(2)
    if layer is None:
        return Unbuilt()
    return keras.Sequential(
        [
            keras.Input((4, 3)),
            layer(3, dropout=0.3, recurrent_dropout=0.3, seed=1),
            layers.GaussianNoise(0.1, seed=2),
            layers.BatchNormalization(),
            layers.Dense(3, activation=activation),
        ]
    )


_MEASURES = {
    "monte_carlo": lambda m: keras_fisher.fisher_trace(m, _SEQUENCES, seed=0),
    "training": lambda m: keras_fisher.fisher_trace(
        m, _SEQUENCES, estimator="batch", training=True, seed=0
    ),
    "hessian": lambda m: keras_fisher.hessian_trace(
        m, _SEQUENCES, _LABELS, num_probes=2, seed=0
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("measure", _MEASURES)
@pytest.mark.parametrize(
    "layer", [layers.LSTM, *cases.slow([layers.GRU]), None]
)
def test_no_variable_and_no_seed_moves(layer, measure):
    model, other = (training.compiled(_recurrent(layer)) for _ in range(2))
    # An unbuilt model has its seeds, but no weights yet.
    before = {v.path: v.numpy() for v in other.non_trainable_variables}
    assert any("seed" in path for path in before)
    _MEASURES[measure](model)
    measured = model.non_trainable_variables
    for (path, expected), found in zip(before.items(), measured, strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=path)


@pytest.mark.few(1)
@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_training_with_measurements_ends_with_the_weights_of_keras(
    layer, activation
):
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=activation is None
    )
    plain = training.compiled(_recurrent(layer, activation), loss=loss)
    network = _recurrent(layer, activation)
    model = training.compiled(FisherModel(network, trace_every=1), loss=loss)
    for trained in (plain, model):
        trained.fit(_SEQUENCES, _LABELS, 8, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(plain.variables, network.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
