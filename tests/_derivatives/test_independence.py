"""Which layers let the examples of a batch see each other."""

from __future__ import annotations

import functools

import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import forward
from keras_fisher._derivatives.independence import are_known_to_be_independent
from keras_fisher._derivatives.independence import examples_are_independent


class Custom(layers.Layer):
    def call(self, x):
        return x - tf.reduce_mean(x, axis=0, keepdims=True)


def _functional(layer):
    x = keras.Input((4, 2))
    return keras.Model(x, layer(layers.Dense(2, name="first")(x)))


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dense(3),
        layers.MaxPooling1D(2),
        layers.Dropout(0.5),
        layers.LSTM(3),
        layers.Bidirectional(layers.GRU(3)),
        layers.TimeDistributed(layers.Dense(3)),
        layers.LayerNormalization(),
        layers.BatchNormalization(trainable=False),
        keras.Sequential([layers.Flatten(), layers.Dense(3)]),
        _functional(layers.Dense(3)),
    ],
    ids=lambda layer: layer.name,
)
def test_examples_are_independent_in(layer):
    assert are_known_to_be_independent(_functional(layer))


@pytest.mark.parametrize(
    "layer",
    [
        Custom(),
        layers.BatchNormalization(),
        layers.Lambda(lambda x: x - tf.reduce_mean(x)),
        layers.ActivityRegularization(0.1),
        layers.Dense(3, activity_regularizer="l2"),
        layers.TimeDistributed(layers.BatchNormalization()),
        layers.SpectralNormalization(layers.Dense(3)),
        layers.Masking(),
        layers.MixUp(),
        layers.Softmax(axis=0),
        layers.UnitNormalization(axis=0),
        # Known with a rank alone, which layers do not have.
        layers.Softmax(axis=-3),
        layers.UnitNormalization(axis=-2),
        layers.Dropout(0.5, noise_shape=(1, None, None)),
        keras.Sequential([Custom()]),
        _functional(_functional(layers.BatchNormalization())),
    ],
    ids=lambda layer: layer.name,
)
def test_examples_are_not_known_to_be_independent_in(layer):
    assert not are_known_to_be_independent(_functional(layer))


class _Shifted:
    """An activation that is an object."""

    def __call__(self, x):
        return x - tf.reduce_mean(x, axis=0)

    def shifted(self, x):
        return self(x)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "activation",
    [
        functools.partial(keras.activations.softmax, axis=0),
        keras.ops.flip,
        functools.partial(keras.ops.cumsum, axis=0),
        _Shifted(),
        _Shifted().shifted,
    ],
    ids=["softmax", "flip", "cumsum", "object", "method"],
)
def test_activations_may_go_over_the_batch(activation):
    for layer in (
        layers.Dense(3, activation=activation),
        layers.Activation(activation),
    ):
        model = _functional(layer)
        assert not are_known_to_be_independent(model)
        x = tf.random.stateless_normal([6, *model.input_shape[1:]], [0, 1])
        found = tf.function(
            lambda x, model=model: (
                forward.run(model, x, fraction=0.5, seed=2).outputs
            )
        )(x)
        np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


def test_layers_of_keras_that_mix_the_batch_are_known_to():
    x = keras.Input((2048,))
    spectrogram = layers.MelSpectrogram(
        fft_length=256, sequence_stride=128, num_mel_bins=8
    )
    assert not are_known_to_be_independent(keras.Model(x, spectrogram(x)))
    x = keras.Input((3, 4, 5))
    for axes, expected in (((1,), True), ((1, 2), True), ((-4,), False)):
        attention = layers.MultiHeadAttention(2, 2, attention_axes=axes)
        model = keras.Model(x, attention(x, x))
        assert are_known_to_be_independent(model) == expected, axes


class _NormalizedCell(layers.Layer):
    """A cell of the user's with batch normalization."""

    def __init__(self, units):
        super().__init__()
        self.state_size = units
        self.dense = layers.Dense(units)
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((None, self.state_size))

    def call(self, x, states, training=False):
        y = self.norm(self.dense(x), training=training) + states[0]
        return y, [y]


@pytest.mark.parametrize(
    "layer",
    [
        layers.LSTM(4, activity_regularizer="l2"),
        layers.Pipeline([layers.Dense(4), layers.BatchNormalization()]),
        layers.RNN([_NormalizedCell(4), _NormalizedCell(4)]),
        layers.RNN([layers.GRUCell(4), _NormalizedCell(4)]),
        layers.Dense(4, activation=lambda t: t - tf.reduce_mean(t, 0)),
        layers.Bidirectional(layers.GRU(4, activity_regularizer="l2")),
    ],
    ids=["loss", "pipeline", "cells", "one cell", "activation", "both ways"],
)
def test_what_layers_hold_may_make_examples_dependent(layer):
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layer(inputs))
    assert not are_known_to_be_independent(model)


@pytest.mark.parametrize(
    "layer",
    [
        layers.RNN([layers.GRUCell(4), layers.LSTMCell(4)]),
        layers.Bidirectional(layers.LSTM(4)),
        layers.TimeDistributed(layers.Dense(4, activation="gelu")),
        layers.Pipeline([layers.Dense(4), layers.LayerNormalization()]),
    ],
    ids=lambda layer: layer.name,
)
def test_layers_that_hold_harmless_ones_are_known(layer):
    inputs = keras.Input((5, 3))
    assert are_known_to_be_independent(keras.Model(inputs, layer(inputs)))


def test_other_operations_and_subclassed_models_count_as_dependent():
    x = keras.Input((4,))
    y = layers.Dense(3)(x)
    model = keras.Model(x, y - keras.ops.mean(y, axis=0))
    assert not are_known_to_be_independent(model)
    attention, _ = networks.build("attention")
    assert not are_known_to_be_independent(attention)
    assert not are_known_to_be_independent(
        layers.Embedding(3, 2, mask_zero=True)
    )
    assert not are_known_to_be_independent(
        layers.RNN(layers.LSTMCell(3), stateful=True)
    )


@pytest.mark.parametrize(
    "function, independent",
    [
        (lambda x, y: x + y, True),
        (lambda x, y: keras.ops.relu(2 * x - y) / 3, True),
        (lambda x, y: x * np.arange(4.0), True),
        (lambda x, y: x * np.ones([1, 4]), True),
        # One row for each example of a batch of six.
        (lambda x, y: x * np.ones([6, 4]), False),
        # The batch of y is aligned with the second axis of the other.
        (lambda x, y: x[:, None] * y, False),
        (lambda x, y: x - keras.ops.mean(x, axis=0), False),
        (lambda x, y: keras.ops.flip(x, axis=0) + y, False),
    ],
)
def test_elementwise_operations_are_looked_into(function, independent):
    x, y = keras.Input((4,)), keras.Input((4,))
    # Keras 3.12 wants all inputs to be used.
    model = keras.Model([x, y], [function(x, y), 2 * x, 2 * y])
    assert are_known_to_be_independent(model) == independent


class _Positions(layers.Layer):
    """As everybody has written it once."""

    def build(self, shape):
        self.position = self.add_weight(shape=tuple(shape)[1:])

    def call(self, x):
        return x + self.position


@pytest.mark.parametrize(
    "layer, independent",
    [
        (_Positions(), True),
        (Custom(), False),
        (layers.BatchNormalization(), False),
        (layers.Lambda(lambda x: 2 * x), True),
        (keras.Sequential([_Positions(), layers.Dense(2)]), True),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_other_layers_are_looked_into_where_a_step_is_traced(
    layer, independent
):
    model, found = _functional(layer), []

    @tf.function
    def step(x):
        found.append(examples_are_independent(model, x))

    step(tf.ones([5, 4, 2]))
    assert found == [independent]
    # Eagerly each step would trace the model again.
    assert not examples_are_independent(model, tf.ones([5, 4, 2]))


@pytest.mark.parametrize("kind", [layers.Softmax, layers.UnitNormalization])
def test_axes_from_the_end_may_be_those_of_the_examples(kind):
    flat = keras.Sequential([keras.Input((6,)), kind(axis=-2)])
    long = keras.Sequential([keras.Input((4, 6)), kind(axis=-2)])

    @tf.function(autograph=False)
    def found():
        return examples_are_independent(
            flat, tf.zeros([8, 6])
        ), examples_are_independent(long, tf.zeros([8, 4, 6]))

    assert [*map(bool, found())] == [False, True]
