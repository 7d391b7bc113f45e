"""Whose each entry of a tensor is, by rules, against what really moves."""

from __future__ import annotations

import keras
from keras import layers
from keras import ops
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import ownership

_SHAPE = (4, 6)


class Called(layers.Layer):
    """A layer of other people: Keras has never heard of it."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self._function = function
        self.dense = layers.Dense(6)
        self.dropout = layers.Dropout(0.5)
        self.seed_generator = keras.random.SeedGenerator(1)

    def build(self, shape):
        self.dense.build((None, 6))
        self.position = self.add_weight(shape=(4, 6), name="position")

    def call(self, x):
        return self._function(self, x)


def _layer(function) -> Called:
    layer = Called(function)
    layer(np.ones([2, *_SHAPE], "float32"))
    return layer


def _normalized(x, scale, **kwargs):
    statistics = {"offset": 0 * scale, "mean": 0 * scale, "variance": scale}
    return tf.raw_ops.FusedBatchNormV3(
        x=x[:, :, None], scale=scale, **statistics, **kwargs
    ).y


_OWN = {
    "a position for each token": lambda s, x: x + s.position,
    "a product with weights": lambda s, x: s.dense(x),
    "a product with the transposed": lambda s, x: ops.matmul(
        x, ops.transpose(s.position)
    ),
    "attention": lambda s, x: ops.matmul(
        ops.softmax(ops.einsum("bid,bjd->bij", x, x)), x
    ),
    "batched products": lambda s, x: tf.matmul(x, x, transpose_b=True),
    "an ellipsis": lambda s, x: tf.einsum("...d,td->...t", x, s.position),
    "a mean over tokens": lambda s, x: ops.mean(x, axis=1),
    "a maximum that is kept": lambda s, x: x - ops.max(x, -1, keepdims=True),
    "one row for tokens and examples": lambda s, x: ops.reshape(
        s.dense(ops.reshape(x, (-1, 6))), (-1, 4, 6)
    ),
    "a size that is computed": lambda s, x: tf.reshape(
        x, [-1, tf.reduce_prod(tf.shape(x)[1:])]
    ),
    "a token in front": lambda s, x: ops.concatenate(
        [ops.broadcast_to(s.position[None, :1], (x.shape[0], 1, 6)), x], axis=1
    ),
    "a token in front, repeated": lambda s, x: ops.concatenate(
        [ops.repeat(s.position[None, :1], x.shape[0], axis=0), x], axis=1
    ),
    "zeros in front": lambda s, x: ops.concatenate(
        [ops.zeros((x.shape[0], 1, 6)), x], axis=1
    ),
    "padding": lambda s, x: ops.pad(x, ((0, 0), (1, 2), (0, 0))),
    "padding with a weight": lambda s, x: tf.pad(
        x, [[0, 0], [1, 2], [0, 0]], constant_values=s.position[0, 0]
    ),
    "every other": lambda s, x: x[:, ::2, None, -3:],
    "back and forth": lambda s, x: ops.transpose(
        ops.transpose(x, (2, 0, 1)) * 2.0, (1, 2, 0)
    ),
    "halves": lambda s, x: ops.multiply(*ops.split(x, 2, axis=-1)),
    "turned tokens": lambda s, x: ops.roll(ops.flip(x, 1), 1, axis=2),
    "stacked": lambda s, x: ops.stack([x, 2 * x], axis=2),
    "unstacked": lambda s, x: tf.add_n(tf.unstack(x, axis=1)),
    "a sum so far": lambda s, x: ops.cumsum(x, axis=1),
    "dropout": lambda s, x: s.dropout(x, training=True),
    "noise of its own": lambda s, x: (
        x + keras.random.normal(x.shape, seed=s.seed_generator)
    ),
    "noise of TensorFlow's": lambda s, x: x + tf.random.normal(tf.shape(x)),
    "drop path": lambda s, x: (
        x * tf.floor(0.5 + tf.random.uniform([tf.shape(x)[0], 1, 1]))
    ),
    "a convolution": lambda s, x: tf.nn.conv2d(
        x[..., None], s.position[:3, :3, None, None], 1, "SAME"
    ),
    "pooling": lambda s, x: tf.nn.max_pool2d(x[..., None], 2, 2, "VALID"),
    "resizing": lambda s, x: tf.image.resize(x[..., None], (8, 8)),
    "a choice": lambda s, x: ops.where(x > 0, x, s.position),
    "a lookup": lambda s, x: ops.take(
        s.position, ops.cast(x[..., 0] > 0, "int32"), axis=0
    ),
    "picked tokens": lambda s, x: ops.take(x, [0, 2], axis=1),
    "a norm": lambda s, x: ops.normalize(x, axis=-1),
    "what stays in sight": lambda s, x: tf.stop_gradient(x) + tf.nn.gelu(x),
    "a normalization": lambda s, x: _normalized(
        x, s.position[0] ** 2, is_training=False
    ),
    "the same for all": lambda s, x: ops.zeros_like(x) + s.position,
}
_MIXED = {
    "minus the mean": lambda s, x: x - ops.mean(x, axis=0, keepdims=True),
    "by the largest": lambda s, x: x / ops.max(x),
    "a softmax over examples": lambda s, x: ops.softmax(x, axis=0),
    "turned examples": lambda s, x: x + ops.flip(x, axis=0),
    "the neighbor": lambda s, x: x + ops.roll(x, 1, axis=0),
    "only the neighbor": lambda s, x: ops.roll(x, 1, axis=0),
    "the first": lambda s, x: x + x[:1],
    "without the first": lambda s, x: x[1:],
    "all pairs": lambda s, x: tf.einsum("btd,cte->bd", x, x),
    "a sum over examples so far": lambda s, x: ops.cumsum(x, axis=0),
    "a product over examples": lambda s, x: tf.matmul(
        x[:, 0], x[:, 1], transpose_a=True
    ),
    "shuffled rows": lambda s, x: ops.reshape(
        ops.transpose(x, (1, 0, 2)), (-1, 4, 6)
    ),
    "examples in front": lambda s, x: ops.concatenate([x, x], axis=0),
    "transposed": lambda s, x: ops.transpose(x[:, :3], (1, 0, 2)),
    "how many there are": lambda s, x: x / x.shape[0],
    "how many there are, in the graph": lambda s, x: (
        x / tf.cast(tf.shape(x)[0], x.dtype)
    ),
    "the number of the example": lambda s, x: (
        x + tf.range(x.shape[0], dtype=x.dtype)[:, None, None]
    ),
    "another row for each": lambda s, x: (
        x + tf.linspace(0.0, 1.0, x.shape[0])[:, None, None]
    ),
    "a column for each": lambda s, x: (
        x
        + ops.transpose(
            ops.reshape(ops.tile(s.position[0], x.shape[0]), (6, -1))
        )[:, None]
    ),
    "one noise for all": lambda s, x: (
        x + keras.random.normal(x.shape[1:], seed=s.seed_generator)
    ),
    "other code for more": lambda s, x: x * 2 if x.shape[0] == 3 else x + 1,
    "sorted examples": lambda s, x: tf.sort(x, axis=0),
    "rows that examples pick": lambda s, x: tf.gather(
        x, tf.cast(x[:, 0, 0] > 0, tf.int32)
    ),
    "as many as the first says": lambda s, x: tf.reduce_sum(
        tf.math.top_k(x, 2 + tf.cast(x[0, 0, 0] > 0, tf.int32)).values, -1
    ),
    "the first as a kernel": lambda s, x: tf.nn.conv2d(
        x[..., None], x[0, :3, :3, None, None], 1, "SAME"
    ),
    "a normalization over examples": lambda s, x: _normalized(
        x, s.position[0] ** 2, is_training=True
    ),
    "a normalization by the first": lambda s, x: _normalized(
        x, x[0, 0] ** 2, is_training=False
    ),
    "three rows for all": lambda s, x: s.position[:3],
    "the best of all": lambda s, x: (
        tf.gather(x, tf.argmax(tf.reduce_sum(x, [1, 2])))[None] + x
    ),
}


# There is more to know of them than the rules do.
_NOT_KNOWN = {
    "an operation without a rule": lambda s, x: tf.math.digamma(x),
    "rows that weights pick": lambda s, x: ops.concatenate(
        [x, x + tf.boolean_mask(s.position, s.position[:, 0] < 9)], axis=1
    ),
    "a weight without a shape": lambda s, x: (
        x
        + tf.raw_ops.PlaceholderWithDefault(
            input=s.position, shape=tf.TensorShape(None)
        )
    ),
    "a weight for an axis": lambda s, x: tf.reduce_sum(
        x, 1 + tf.cast(s.position[0, 0] > 9, tf.int32)
    ),
    "a row of its own for each token": lambda s, x: tf.transpose(
        tf.gather(
            s.position,
            tf.cast(tf.transpose(x[..., 0]) > 0, tf.int32),
            axis=1,
            batch_dims=1,
        )
    ),
    "a diagonal": lambda s, x: tf.raw_ops.Einsum(
        inputs=[x[:, :, :4]], equation="btt->bt"
    ),
}


def _moves(layer, x) -> bool:
    """Whether an example's row changes if others do, found by trying."""
    rng = np.random.default_rng(1)
    before = np.asarray(layer(x))
    for i in range(len(x)):
        other = rng.normal(size=x.shape).astype("float32")
        other[i] = x[i]
        after = np.asarray(layer(other))
        if len(after) != len(x) or not np.allclose(after[i], before[i]):
            return True
    # Nor if they are fewer, in another place.
    return not np.allclose(np.asarray(layer(x[2:])), before[2:])


_RANDOM = ("dropout", "noise", "drop path")


@pytest.mark.parametrize("name", _OWN)
def test_examples_own_their_rows(name):
    layer = _layer(_OWN[name])
    x = np.random.default_rng(0).normal(size=[5, *_SHAPE]).astype("float32")
    if not any(word in name for word in _RANDOM):
        assert not _moves(layer, x)
    assert ownership.examples_own_rows(layer, x)


@pytest.mark.parametrize("name", _MIXED)
def test_nothing_is_claimed_where_examples_meet(name):
    layer = _layer(_MIXED[name])
    x = np.random.default_rng(0).normal(size=[5, *_SHAPE]).astype("float32")
    if "noise" not in name:
        assert _moves(layer, x)
    assert not ownership.examples_own_rows(layer, x)


@pytest.mark.parametrize("name", _NOT_KNOWN)
def test_nothing_is_claimed_without_knowing(name):
    layer = _layer(_NOT_KNOWN[name])
    x = np.random.default_rng(0).normal(size=[5, *_SHAPE]).astype("float32")
    assert not _moves(layer, x)
    assert not ownership.examples_own_rows(layer, x)


def test_random_numbers_are_allowed_or_not():
    layer = _layer(_OWN["dropout"])
    x = np.ones([5, *_SHAPE], "float32")
    assert ownership.examples_own_rows(layer, x)
    assert not ownership.examples_own_rows(layer, x, may_draw=False)


class _Counts(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )

    def call(self, x):
        self.calls.assign_add(1.0)
        return x * 2


class _CountsByItself(layers.Layer):
    def build(self, shape):
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x * 2


class _AddsALoss(layers.Layer):
    def build(self, shape):
        self.weight = self.add_weight(shape=())

    def call(self, x):
        self.add_loss(self.weight**2)
        return x * 2


class _Masks(layers.Layer):
    def compute_mask(self, x, previous_mask=None):
        return tf.reduce_any(x > 0, axis=-1)

    def call(self, x):
        return x * 2


class _Doubles(layers.Layer):
    def call(self, x):
        return x * 2


@pytest.mark.parametrize(
    "layer_class, is_claimed",
    [
        (_Counts, False),
        (_CountsByItself, False),
        (_AddsALoss, False),
        (_Masks, False),
        (_Doubles, True),
    ],
)
def test_nothing_is_claimed_of_a_layer_that(layer_class, is_claimed):
    x = np.ones([4, *_SHAPE], "float32")
    layer = layer_class()
    layer(x)
    assert ownership.examples_own_rows(layer, x) == is_claimed


def test_all_outputs_and_inputs_count():
    a, b = keras.Input((4,)), keras.Input((4,))
    x = [np.ones([5, 4], "float32")] * 2
    own = keras.Model([a, b], {"sum": a + b, "first": a})
    assert ownership.examples_own_rows(own, x)
    mixed = keras.Model([a, b], {"sum": a + b, "mean": a - ops.mean(b, 0)})
    assert not ownership.examples_own_rows(mixed, x)


def test_inputs_without_known_rows_are_left():
    layer = _layer(_OWN["a position for each token"])
    assert not ownership.examples_own_rows(layer, tf.ones([]))
    assert not ownership.examples_own_rows(
        layer, keras.KerasTensor((None, None, 6))
    )
    assert not ownership.examples_own_rows(
        layer, tf.sparse.from_dense(tf.ones([5, 4]))
    )


def test_looking_changes_nothing():
    layer = _layer(_OWN["dropout"])
    before = [v.numpy() for v in layer.variables]
    ownership.examples_own_rows(layer, np.ones([5, *_SHAPE], "float32"))
    for old, variable in zip(before, layer.variables):
        np.testing.assert_array_equal(old, variable.numpy())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_convolutional_networks_of_other_people(batch_norm):
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Conv2D(4, 3, strides=2)
            self.depthwise = layers.DepthwiseConv2D(3)
            self.norm = layers.BatchNormalization()
            self.up = layers.Conv2DTranspose(3, 3)
            self.last = layers.Dense(2)

        def call(self, x, training=None):
            x = ops.relu(self.depthwise(self.first(x)))
            x = self.norm(x, training=training and batch_norm)
            return self.last(ops.mean(self.up(x), axis=(1, 2)))

    network = Network()
    x = np.ones([4, 12, 12, 3], "float32")
    network(x)
    assert ownership.examples_own_rows(network, x) != batch_norm
