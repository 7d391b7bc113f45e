"""Small networks of many layer types, and a brute-force reference for them."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import tensorflow as tf

CLASSES = 3
BATCH = 6


def _head():
    return [layers.Flatten(), layers.Dense(CLASSES)]


def _subclassed():
    class Attention(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = layers.Embedding(11, 6)
            self.attend = layers.MultiHeadAttention(2, 4)
            self.norm = layers.LayerNormalization()
            self.classify = layers.Dense(CLASSES)

        def call(self, x):
            h = self.embed(x)
            h = self.norm(h + self.attend(h, h))
            return self.classify(keras.ops.mean(h, axis=1))

    return Attention()


def _shared():
    x = _input((4,))
    dense = layers.Dense(4, activation="tanh")
    return keras.Model(x, layers.Dense(CLASSES)(dense(dense(x)) + x))


def _two_inputs():
    a, b = _input((4,), "a"), _input((3, 2), "b")
    h = layers.Concatenate()(
        [layers.Dense(4, activation="tanh")(a), layers.GRU(3)(b)]
    )
    return keras.Model({"a": a, "b": b}, layers.Dense(CLASSES)(h))


def _input(shape, name=None):
    # Keras casts to the dtype of the input, float32 unless told otherwise.
    dtype = keras.config.dtype_policy().compute_dtype
    return keras.Input(shape, dtype=dtype, name=name)


def _stack(make, shape):
    return lambda: keras.Sequential([_input(shape), *make(), *_head()])


def _tanh(layer, *args, **kwargs):
    return lambda: [layer(*args, activation="tanh", **kwargs)]


def _then(*makers):
    return lambda: [layer for make in makers for layer in make()]


def _one(layer, *args, **kwargs):
    return lambda: [layer(*args, **kwargs)]


_CONV = _tanh(layers.Conv2D, 4, 3)

NETWORKS = {
    "dense": _stack(_tanh(layers.Dense, 7), (5,)),
    "conv1d": _stack(
        _tanh(layers.Conv1D, 4, 3, strides=2, padding="same"), (9, 2)
    ),
    "conv2d": _stack(_tanh(layers.Conv2D, 4, 3, dilation_rate=2), (6, 6, 2)),
    "conv2d_groups": _stack(_tanh(layers.Conv2D, 4, 3, groups=2), (5, 5, 2)),
    "conv3d": _stack(_tanh(layers.Conv3D, 3, 2, strides=2), (4, 4, 4, 2)),
    "depthwise": _stack(_tanh(layers.DepthwiseConv2D, 3), (5, 5, 2)),
    "separable": _stack(_tanh(layers.SeparableConv2D, 3, 3), (5, 5, 2)),
    "transposed": _stack(
        _tanh(layers.Conv2DTranspose, 2, 3, strides=2), (3, 3, 2)
    ),
    "batch_norm": _stack(
        _then(
            _one(layers.Conv2D, 3, 3),
            _one(layers.BatchNormalization),
            _one(layers.Activation, "tanh"),
        ),
        (5, 5, 2),
    ),
    "layer_norm": _stack(
        _then(
            _one(layers.Dense, 7),
            _one(layers.LayerNormalization),
            _one(layers.Activation, "tanh"),
        ),
        (5,),
    ),
    "group_norm": _stack(
        _then(
            _one(layers.Conv2D, 4, 3),
            _one(layers.GroupNormalization, 2),
            _one(layers.Activation, "tanh"),
        ),
        (5, 5, 2),
    ),
    "embedding": _stack(
        _then(_one(layers.Embedding, 11, 3), _one(layers.Activation, "tanh")),
        (4,),
    ),
    "attention": _subclassed,
    "lstm": _stack(_one(layers.LSTM, 3), (3, 2)),
    "gru": _stack(_one(layers.GRU, 3), (3, 2)),
    "max_pooling_1d": _stack(
        _then(_tanh(layers.Conv1D, 4, 3), _one(layers.MaxPooling1D, 2)),
        (8, 2),
    ),
    "max_pooling_2d": _stack(
        _then(
            _CONV,
            _one(layers.MaxPooling2D, 3, strides=2, padding="same"),
        ),
        (8, 8, 2),
    ),
    "average_pooling": _stack(
        _then(_CONV, _one(layers.AveragePooling2D, 2)), (6, 6, 2)
    ),
    "dropout": _stack(
        _then(_tanh(layers.Dense, 7), _one(layers.Dropout, 0.4, seed=3)),
        (5,),
    ),
    "shared": _shared,
    "two_inputs": _two_inputs,
}
INTEGER_INPUTS = ("embedding", "attention")


def build(name: str, dtype: str = "float64"):
    """A built network with rather large weights, and a batch for it."""
    keras.config.set_dtype_policy(dtype)
    model = NETWORKS[name]()
    random = np.random.default_rng(7)
    float_dtype = model.compute_dtype
    if name in INTEGER_INPUTS:
        # Few tokens, so that they repeat within an example and a batch.
        x = tf.constant(random.integers(0, 4, (BATCH, 4)))
    elif name == "two_inputs":
        x = {
            "a": tf.constant(random.normal(size=(BATCH, 4)), float_dtype),
            "b": tf.constant(random.normal(size=(BATCH, 3, 2)), float_dtype),
        }
    else:
        shape = (BATCH, *model.input_shape[1:])
        x = tf.constant(random.normal(size=shape), float_dtype)
    model(x)
    for variable in model.trainable_variables:
        variable.assign(0.5 * random.normal(size=variable.shape))
    return model, x


def state_of(model) -> list:
    """What a call in training mode may change: statistics and seeds."""
    return [(v, v.numpy().copy()) for v in model.non_trainable_variables]


def restore(state) -> None:
    for variable, value in state:
        variable.assign(value)


def brute_force_trace(model, x, likelihood, labels, groups) -> float:
    """(1/b') Σ_m ‖Σ_{i in m} g_i‖², one backward pass for each example.

    Args:
        model: A network, in training mode from its current state.
        x: The whole batch.
        likelihood: Of the outputs.
        labels: Of the examples in `groups`, concatenated.
        groups: Arrays of positions of the examples in each micro-batch.
    """
    state = state_of(model)
    rows = np.concatenate(groups)
    total, begin = 0.0, 0
    for group in groups:
        gradient = 0.0
        for k in range(begin, begin + len(group)):
            restore(state)
            with tf.GradientTape() as tape:
                outputs = tf.gather(model(x, training=True), rows)
                loss = likelihood.negative_log_likelihood(labels, outputs)[k]
            gradients = tape.gradient(loss, model.trainable_variables)
            gradient = gradient + np.concatenate(
                [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]
            )
        total += float(np.sum(np.square(gradient, dtype="float64")))
        begin += len(group)
    restore(state)
    return total / len(rows)


def directional_difference(function, variables, direction, step=1e-5):
    """The derivative of `function` along `direction`, by differences.

    Of fourth order, so that in float64 about ten digits are right.
    """
    start = [v.numpy().copy() for v in variables]

    def at(h):
        for variable, value, d in zip(variables, start, direction):
            variable.assign(value + h * d)
        return function()

    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    at(0.0)
    return (8 * near - far) / (12 * step)


def squared_norms(model, x, likelihood, labels) -> np.ndarray:
    """‖g_i‖² of each example and variable, from batches of one example.

    Args:
        model: A network, in inference mode.
        x: The whole batch.
        likelihood: Of the outputs.
        labels: Of all examples.
    """
    norms = []
    for i in range(len(labels)):
        one = keras.tree.map_structure(lambda a, i=i: a[i : i + 1], x)
        with tf.GradientTape() as tape:
            outputs = model(one, training=False)
            loss = likelihood.negative_log_likelihood(
                labels[i : i + 1],
                outputs,
                getattr(outputs, "_keras_mask", None),
            )
        gradients = tape.gradient(
            loss,
            model.trainable_variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        norms.append(
            [
                np.sum(np.square(tf.convert_to_tensor(g), dtype="float64"))
                for g in gradients
            ]
        )
    return np.array(norms)
