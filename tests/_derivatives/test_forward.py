"""The forward pass of a part of the batch, and running it again."""

from __future__ import annotations

import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import forward as forward_lib


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
    assert forward_lib.examples_are_independent(_functional(layer))


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
        keras.Sequential([Custom()]),
        _functional(_functional(layers.BatchNormalization())),
    ],
    ids=lambda layer: layer.name,
)
def test_examples_are_not_known_to_be_independent_in(layer):
    assert not forward_lib.examples_are_independent(_functional(layer))


def test_other_operations_and_subclassed_models_count_as_dependent():
    x = keras.Input((4,))
    y = layers.Dense(3)(x)
    model = keras.Model(x, y - keras.ops.mean(y, axis=0))
    assert not forward_lib.examples_are_independent(model)
    attention, _ = networks.build("attention")
    assert not forward_lib.examples_are_independent(attention)
    assert not forward_lib.examples_are_independent(
        layers.Embedding(3, 2, mask_zero=True)
    )
    assert not forward_lib.examples_are_independent(
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
    model = keras.Model([x, y], function(x, y))
    assert forward_lib.examples_are_independent(model) == independent


@pytest.mark.parametrize("name", ["dense", "batch_norm", "two_inputs"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_outputs_keep_the_order_of_the_batch(name, mode):
    model, x = networks.build(name)
    expected = model(x, training=True)

    def run():
        forward = forward_lib.run(model, x, fraction=0.5, seed=3)
        everything = tf.range(networks.BATCH)
        rows = forward.of_part(everything)
        return forward.outputs, forward.part_outputs, rows

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    outputs, part, rows = run()
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)
    np.testing.assert_allclose(part, tf.gather(expected, rows), rtol=1e-9)
    assert len(set(rows.numpy())) == 3


def test_state_is_updated_once():
    """Also by a part of the batch, with its batch statistics."""
    model, x = networks.build("batch_norm")
    state = networks.state_of(model)
    model(x, training=True)
    expected = [v.numpy() for v in model.non_trainable_variables]
    for fraction in (1.0, 0.5):
        networks.restore(state)
        forward_lib.run(model, x, fraction=fraction)
        for v, value in zip(model.non_trainable_variables, expected):
            np.testing.assert_allclose(v.numpy(), value, rtol=1e-12)


def test_every_part_is_equally_likely():
    model, x = networks.build("dense")
    seed = keras.random.SeedGenerator(0)
    counts = np.zeros(networks.BATCH)
    for _ in range(600):
        forward = forward_lib.run(model, x, fraction=1 / 3, seed=seed)
        rows = forward.of_part(tf.range(networks.BATCH)).numpy()
        assert len(rows) == 2
        assert (rows[1] - rows[0]) % networks.BATCH == 1
        counts[rows] += 1
    error = np.sqrt(600 * (1 / 3) * (2 / 3))
    assert np.abs(counts - 200).max() < 4 * error, counts


@pytest.mark.parametrize("name", ["dropout", "batch_norm", "two_inputs"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_replay_on_the_same_values_gives_the_same_outputs(name, fraction):
    model, x = networks.build(name)
    forward = forward_lib.run(
        model, x, fraction=fraction, watch_inputs=True, replayable=True
    )
    before = networks.state_of(model)
    targets = [tf.identity(t) for t in forward.targets]
    _, outputs = forward.replay(targets)
    np.testing.assert_array_equal(outputs, forward.part_outputs)
    moved = [t + 0.1 for t in targets]
    _, outputs = forward.replay(moved)
    assert not np.allclose(outputs, forward.part_outputs)
    for variable, value in before:
        np.testing.assert_array_equal(variable.numpy(), value)


def test_undifferentiated_pass_is_the_plain_one_to_the_last_bit():
    model, x = networks.build("batch_norm", "float32")
    state = networks.state_of(model)
    expected = model(x, training=True)
    networks.restore(state)
    forward = forward_lib.run(model, x, differentiable=False)
    np.testing.assert_array_equal(forward.outputs, expected)


@pytest.mark.parametrize("name", ["dense", "conv2d", "lstm"])
def test_a_part_that_is_the_whole_batch_leaves_no_rest_to_run(name):
    model, x = networks.build(name)
    forward = forward_lib.run(model, x[:1], fraction=0.3)
    assert (forward.batch_size, forward.part_size) == (1, 1)
    expected = model(x[:1], training=True)
    np.testing.assert_array_equal(forward.outputs, expected)
    np.testing.assert_array_equal(forward.part_outputs, expected)
