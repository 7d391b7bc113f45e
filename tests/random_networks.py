"""Random small networks, likelihoods and batches, as hypothesis strategies.

What is drawn is plain data, which says everything of a case when it is
printed; `build` and `batch` make the network and the tensors from it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hypothesis import strategies as st
import keras
from keras import layers
import networks
import numpy as np
import tensorflow as tf

import keras_fisher
from keras_fisher import likelihoods

# All of them smooth, so that finite differences hold.
_ACTIVATIONS = ("tanh", "sigmoid", "softplus", "silu", "gelu")
_FAMILIES = ("categorical", "bernoulli", "gaussian")
_STDDEV = 0.7
_WORDS = 4  # few, so that they repeat within an example and a batch

_ANYWHERE = (
    *("dense", "batch_norm", "layer_norm", "dropout", "residual", "shared"),
    *("nested", "rematerialized"),
)
_BLOCKS = {  # by the number of axes next to that of the examples
    1: _ANYWHERE,
    2: (
        *(*_ANYWHERE, "conv", "group_norm", "max_pooling", "average_pooling"),
        *("lstm", "gru", "attention", "transposed"),
    ),
    3: (
        *(*_ANYWHERE, "conv", "group_norm", "max_pooling", "average_pooling"),
        *("depthwise", "separable"),
    ),
}
# Keras's dropout draws other masks there, and loops take a minute to compile.
_NOT_FOR_XLA = ("dropout", "nested", "lstm", "gru")
_ENDS = {1: ("keep",), 2: ("keep", "flatten", "average", "last")}
_ENDS[3] = ("keep", "flatten", "average")


class Block(NamedTuple):
    """A layer or a few; `size` is that of what it computes, or of a kernel."""

    kind: str
    size: int
    activation: str


class Network(NamedTuple):
    """Says everything of a network.

    Attributes:
        shape: Shape of an input, without the examples.
        embedding: `""` for real inputs; `"plain"` or `"masked"` for words.
        joined: Size of a second input, which is joined in at the end; 0 for
            none.
        blocks: In their order.
        end: How further axes are left behind; `"keep"` for not at all.
        family: Of the likelihood.
        outputs: Size of the last axis of the outputs.
        from_logits: Whether outputs are logits rather than probabilities.
        dtype: Of everything.
        seed: Of the weights.
    """

    shape: tuple[int, ...]
    embedding: str
    joined: int
    blocks: tuple[Block, ...]
    end: str
    family: str
    outputs: int
    from_logits: bool
    dtype: str
    seed: int

    @property
    def is_integer(self) -> bool:
        return self.embedding != ""

    @property
    def treats_examples_alone(self) -> bool:
        """Whether each example is computed by itself, without a mask.

        A subset of the batch may then run apart, with random masks of its own.
        """
        return not self.has("batch_norm") and self.embedding != "masked"

    def has(self, kind: str) -> bool:
        return any(block.kind == kind for block in self.blocks)


@st.composite
def random_networks(
    draw,
    *,
    integer_inputs: bool = True,
    for_xla: bool = False,
    single: bool = True,
    most_blocks: int = 3,
    families=_FAMILIES,
) -> Network:
    """Strategy for networks.

    Args:
        draw: From hypothesis.
        integer_inputs: Whether inputs may be words.
        for_xla: Whether to leave out what XLA does otherwise or slowly.
        single: Whether single precision is tried now and then.
        most_blocks: Largest number of blocks.
        families: Likelihoods to choose from.
    """
    axes = draw(st.sampled_from((1, 1, 2, 2, 3)))
    bounds = {1: [(1, 5)], 2: [(2, 5), (1, 3)], 3: [(2, 4), (2, 4), (1, 3)]}
    shape = tuple(draw(st.integers(*each)) for each in bounds[axes])
    embedding = ""
    if axes == 2 and integer_inputs:
        embedding = draw(st.sampled_from(("", "plain", "masked", "masked")))
    blocks = []
    counts = st.sampled_from((1, 2, *range(most_blocks + 1)))
    for _ in range(draw(counts)):
        kinds = [
            kind
            for kind in _BLOCKS[axes]
            if not (for_xla and kind in _NOT_FOR_XLA)
        ]
        blocks.append(
            Block(
                draw(st.sampled_from(kinds)),
                draw(st.integers(1, 4)),
                draw(st.sampled_from(_ACTIVATIONS)),
            )
        )
    family = draw(st.sampled_from(families))
    joined = draw(st.sampled_from((0, 0, 0, 2)))
    # Nothing to join where axes are kept.
    ends = _ENDS[axes][1:] if joined and axes > 1 else _ENDS[axes]
    ends = [end for end in ends if not (for_xla and end == "last")]
    if embedding == "masked" and "keep" in ends:
        ends += 2 * ["keep"]  # where the outputs have a mask
    return Network(
        shape=shape,
        embedding=embedding,
        joined=joined,
        blocks=tuple(blocks),
        end=draw(st.sampled_from(ends)),
        family=family,
        outputs=draw(st.integers(2 if family == "categorical" else 1, 4)),
        from_logits=family == "gaussian" or draw(st.integers(0, 3)) > 0,
        dtype="float32"
        if single and draw(st.integers(0, 4)) == 4
        else "float64",
        seed=draw(st.integers(0, 999)),
    )


def build(network: Network) -> keras.Model:
    """The network, with rather large weights that its seed determines."""
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy(network.dtype)
    dtype = "int64" if network.is_integer else network.dtype
    shape = network.shape[:-1] if network.is_integer else network.shape
    inputs = x = keras.Input(shape, dtype=dtype, name="a")
    if network.is_integer:
        x = layers.Embedding(
            _WORDS, network.shape[-1], mask_zero=network.embedding == "masked"
        )(x)
    for block in network.blocks:
        x = _applied(block, x)
    x = _ended(network.end, x)
    if network.joined:
        joined = keras.Input((network.joined,), dtype=network.dtype, name="b")
        inputs = {"a": inputs, "b": joined}
        x = layers.Concatenate()([x, layers.Dense(2, "tanh")(joined)])
    activation = {"categorical": "softmax", "bernoulli": "sigmoid"}
    x = layers.Dense(
        network.outputs,
        None if network.from_logits else activation[network.family],
    )(x)
    model = keras.Model(inputs, x)
    _randomize(model, network.seed)
    return model


def _applied(block: Block, x):
    kind, size, activation = block
    channels = x.shape[-1]

    def dense(units=size):
        return layers.Dense(units, activation)

    if kind == "attention":
        attended = layers.MultiHeadAttention(1 + size % 2, 2)(x, x)
        return layers.Add()([x, attended])
    if kind == "residual":
        h = dense(channels)(x)
        return (x + h, x * h, layers.Add()([x, h]), x - h)[size - 1]
    if kind == "shared":
        layer = dense(channels)
        return layer(layer(x))
    inside = [dense(), layers.LayerNormalization(), dense(channels)]
    if kind == "rematerialized":
        block = keras.Sequential(inside)
        return keras_fisher.layers.Rematerialization(block)(x)
    if kind == "nested":
        dropout = layers.Dropout(0.2, seed=size)
        return keras.Sequential([*inside, dropout])(x)
    x = _layer_of(block, axes=len(x.shape) - 1, channels=channels)(x)
    if kind.endswith("_norm"):
        x = layers.Activation(activation)(x)
    return x


def _layer_of(block: Block, axes: int, channels: int) -> layers.Layer:
    """The layer that a block is, if it is a single one."""
    kind, size, activation = block

    def of_rank(one, two):
        return one if axes == 2 else two

    if kind == "dense":
        return layers.Dense(size, activation)
    if kind == "conv":
        conv = of_rank(layers.Conv1D, layers.Conv2D)
        return conv(
            size,
            1 + size % 3,
            strides=1 + size // 4,
            padding="same",
            activation=activation,
        )
    if kind == "transposed":
        return layers.Conv1DTranspose(2, 2, 2, activation=activation)
    if kind == "depthwise":
        return layers.DepthwiseConv2D(2, padding="same", activation=activation)
    if kind == "separable":
        return layers.SeparableConv2D(
            size, 2, padding="same", activation=activation
        )
    if kind == "batch_norm":
        return layers.BatchNormalization()
    if kind == "layer_norm":
        return layers.LayerNormalization()
    if kind == "group_norm":
        return layers.GroupNormalization(math.gcd(size, channels))
    if kind == "dropout":
        return layers.Dropout(0.3, seed=size)
    if kind == "max_pooling":
        pool = of_rank(layers.MaxPooling1D, layers.MaxPooling2D)
        return pool(2, strides=1 + size % 2, padding="same")
    if kind == "average_pooling":
        pool = of_rank(layers.AveragePooling1D, layers.AveragePooling2D)
        return pool(2, strides=1 + size % 2, padding="same")
    if kind == "lstm":
        return layers.LSTM(size, return_sequences=True)
    assert kind == "gru", kind
    return layers.GRU(size, return_sequences=True)


def _ended(end: str, x):
    axes = len(x.shape) - 1
    if end == "flatten":
        return layers.Flatten()(x)
    if end == "last":
        return layers.GRU(2)(x)
    if end == "average":
        pool = {
            2: layers.GlobalAveragePooling1D,
            3: layers.GlobalAveragePooling2D,
        }
        return pool[axes]()(x)
    return x


def _randomize(model, seed: int) -> None:
    random = np.random.default_rng(seed)
    for variable in model.weights:
        value = 0.5 * random.normal(size=variable.shape)
        if "variance" in variable.path:
            value = 0.5 + np.abs(value)
        variable.assign(value)


def batch(network: Network, model: keras.Model, size: int, seed: int):
    """Inputs and labels, as tensors; numbers that `float32` holds as well."""
    random = np.random.default_rng(seed)

    def real(*shape):
        numbers = random.normal(size=shape).astype("float32")
        return tf.constant(numbers, network.dtype)

    if network.is_integer:
        words = random.integers(0, _WORDS, size=(size, *network.shape[:-1]))
        words[:, 0] = 1  # an example is not all mask
        x = tf.constant(words)
    else:
        x = real(size, *network.shape)
    if network.joined:
        x = {"a": x, "b": real(size, network.joined)}
    shape = (size, *model.output_shape[1:])
    if network.family == "categorical":
        y = tf.constant(random.integers(0, shape[-1], size=shape[:-1]))
    elif network.family == "bernoulli":
        y = tf.constant(random.integers(0, 2, size=shape), network.dtype)
    else:
        y = real(*shape)
    return x, y


def likelihood_of(network: Network) -> likelihoods.Likelihood:
    """What the outputs of the network mean."""
    if network.family == "gaussian":
        return likelihoods.Gaussian(_STDDEV)
    return {
        "categorical": likelihoods.Categorical,
        "bernoulli": likelihoods.Bernoulli,
    }[network.family](network.from_logits)


def loss_of(network: Network) -> keras.losses.Loss:
    """The loss that Keras has for them."""
    if network.family == "gaussian":
        return keras.losses.MeanSquaredError()
    return {
        "categorical": keras.losses.SparseCategoricalCrossentropy,
        "bernoulli": keras.losses.BinaryCrossentropy,
    }[network.family](from_logits=network.from_logits)


def negative_log_likelihoods(network: Network, y, outputs, mask=None):
    """-log p(y|x) at each position, of shape `(batch, positions)`.

    Written without `keras_fisher`; up to constants.
    """
    if network.family == "gaussian":
        each = 0.5 * tf.square((y - outputs) / _STDDEV)
    elif network.family == "bernoulli":
        each = (
            tf.nn.sigmoid_cross_entropy_with_logits(y, outputs)
            if network.from_logits
            else -tf.math.log(tf.where(y > 0.5, outputs, 1 - outputs))
        )
    else:
        each = (
            tf.nn.sparse_softmax_cross_entropy_with_logits(y, outputs)
            if network.from_logits
            else -tf.math.log(
                tf.gather(outputs, y, axis=-1, batch_dims=y.shape.rank)
            )
        )[..., None]
    if mask is not None:
        each *= tf.cast(mask, each.dtype)[..., None]
    return tf.reshape(each, [each.shape[0], -1])


def gradients_of_examples(
    network: Network, model, x, labels, rows=None, *, training, by_inputs=False
) -> list[list[np.ndarray]]:
    """Gradients of -log p(y_i|x_i), one backward pass for each example.

    Args:
        network: What the model is.
        model: From its current state, which is left as it is.
        x: The whole batch.
        labels: Of the examples in `rows`.
        rows: Positions of examples; all by default.
        training: The mode of the call.
        by_inputs: Whether to differentiate by the inputs rather than by the
            trainable variables.

    Returns:
        For each example, a gradient for each variable or input.
    """
    rows = (
        np.arange(keras.tree.flatten(x)[0].shape[0]) if rows is None else rows
    )
    state = networks.state_of(model)
    sources = (
        keras.tree.flatten(x)
        if by_inputs
        else [v.value for v in model.trainable_variables]
    )
    with tf.GradientTape(persistent=True) as tape:
        if by_inputs:
            tape.watch(sources)
        outputs = model(x, training=training)
        mask = getattr(outputs, "_keras_mask", None)
        losses = negative_log_likelihoods(
            network,
            labels,
            tf.gather(outputs, rows),
            None if mask is None else tf.gather(mask, rows),
        )
        losses = tf.unstack(tf.reduce_sum(losses, axis=1))
    networks.restore(state)
    return [
        [
            np.asarray(tf.convert_to_tensor(g), "float64")
            for g in tape.gradient(
                loss,
                sources,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        ]
        for loss in losses
    ]
