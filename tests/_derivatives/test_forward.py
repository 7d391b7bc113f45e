"""The forward pass of a subset of the batch, and running it again."""

from __future__ import annotations

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import forward as forward_lib


@pytest.mark.parametrize("name", ["dense", "batch_norm", "two_inputs"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_outputs_keep_the_order_of_the_batch(name, mode):
    model, x = networks.build(name)
    expected = model(x, training=True)

    def run():
        forward = forward_lib.run(model, x, fraction=0.5, seed=3)
        everything = tf.range(networks.BATCH)
        rows = forward.subset.of(everything)
        return forward.outputs, forward.subset_outputs, rows

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    outputs, part, rows = run()
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)
    np.testing.assert_allclose(part, tf.gather(expected, rows), rtol=1e-9)
    assert len(set(rows.numpy())) == 3


class _Positions(keras.layers.Layer):
    """A layer of other people, which tells how many examples it has seen."""

    def build(self, shape):
        self.position = self.add_weight(shape=tuple(shape)[1:])
        self.seen = []

    def call(self, x):
        self.seen.append(x.shape[0])
        return x + self.position


@pytest.mark.parametrize("jit", [False, True])
def test_parts_run_apart_through_layers_of_other_people(jit):
    model = keras.Sequential([keras.Input((4,)), layer := _Positions()])
    x = tf.random.stateless_normal([6, 4], [0, 1])
    expected = model(x)
    layer.seen.clear()

    @tf.function(jit_compile=jit, autograph=False)
    def run():
        return forward_lib.run(model, x, fraction=1 / 3, seed=3).outputs

    np.testing.assert_allclose(run(), expected, rtol=1e-6)
    # The first two are traces that look at it.
    assert layer.seen == [3, 4, 2, 4]


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


@pytest.mark.slow
def test_every_part_is_equally_likely():
    model, x = networks.build("dense")
    seed = keras.random.SeedGenerator(0)
    counts = np.zeros(networks.BATCH)
    for _ in range(600):
        forward = forward_lib.run(model, x, fraction=1 / 3, seed=seed)
        rows = forward.subset.of(tf.range(networks.BATCH)).numpy()
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
    np.testing.assert_array_equal(outputs, forward.subset_outputs)
    moved = [t + 0.1 for t in targets]
    _, outputs = forward.replay(moved)
    assert not np.allclose(outputs, forward.subset_outputs)
    for variable, value in before:
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("layer", ["SimpleRNN", "GRU", "LSTM"])
def test_replay_begins_where_a_stateful_layer_began(layer):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 3, 2)),
            getattr(keras.layers, layer)(3, stateful=True),
            keras.layers.Dense(2),
        ]
    )
    x = tf.random.stateless_normal([4, 3, 2], [0, 1])
    for _ in range(2):
        forward = forward_lib.run(model, x, replayable=True)
        left = [s.numpy() for s in model.layers[0].states]
        _, outputs = forward.replay(forward.targets)
        np.testing.assert_array_equal(outputs, forward.subset_outputs)
        for state, value in zip(model.layers[0].states, left):
            np.testing.assert_array_equal(state.numpy(), value)


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
    assert (forward.batch_size, forward.subset.size) == (1, 1)
    expected = model(x[:1], training=True)
    np.testing.assert_array_equal(forward.outputs, expected)
    np.testing.assert_array_equal(forward.subset_outputs, expected)


class _Noisy(keras.layers.Layer):
    """A layer of other people that draws, by TensorFlow or within Keras."""

    def __init__(self, draw):
        super().__init__()
        self._draw = draw

    def call(self, x):
        return x + self._draw(x)


def _behind(*layers):
    x = keras.Input((4,))
    return keras.Sequential([x, *layers, keras.layers.Dense(3)])


@pytest.mark.parametrize(
    "model, options, expected",
    [
        (_behind(), {}, True),
        (_behind(), {"fraction": 0.5}, True),
        (_behind(), {"fraction": 0.95}, False),
        (_behind(), {"watch_inputs": True}, False),
        (_behind(), {"part_size": 8}, False),
        (_behind(), {"part_size": None}, False),
        (_behind(keras.layers.Dropout(0.5)), {}, False),
        (_behind(keras.layers.BatchNormalization()), {}, False),
        (_behind(_Noisy(lambda x: 0.0)), {}, True),
        (_behind(_Noisy(lambda x: tf.random.normal(tf.shape(x)))), {}, False),
        (
            _behind(
                _Noisy(tf.function(lambda x: tf.random.normal(tf.shape(x))))
            ),
            {},
            False,
        ),
    ],
    ids=[
        "dense",
        "fraction",
        "large fraction",
        "watched",
        "one part",
        "no parts",
        "dropout",
        "batch normalization",
        "own layer",
        "own draws",
        "draws in a function",
    ],
)
def test_parts_run_alone_where_that_gives_the_same(model, options, expected):
    found = []

    @tf.function(autograph=False)
    def run(x):
        kwargs = {"part_size": 2, **options}
        forward = forward_lib.run(model, x, seed=1, **kwargs)
        found.append(forward.is_divisible)
        if not expected:
            return forward.subset_outputs, forward.subset_outputs
        return forward.subset_outputs[1:3], forward.part(1, 2).outputs

    whole, part = run(tf.random.normal([8, 4]))
    assert found == [expected]
    np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)


def test_sparse_and_ragged_examples_have_no_parts():
    x = keras.Input((4,), sparse=True)
    model = keras.Model(x, keras.layers.Dense(3)(x))
    forward = forward_lib.run(
        model, tf.sparse.from_dense(tf.eye(8, 4)), part_size=2
    )
    assert not forward.is_divisible
