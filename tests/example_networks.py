"""Networks with all kinds of uses of a variable, for norms of examples."""

from __future__ import annotations

import keras
from keras import layers
import networks

from keras_fisher import likelihoods

LIKELIHOOD = likelihoods.Categorical()


class ClassToken(layers.Layer):
    """Repeats a variable for each example, as vision transformers do."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.position = self.add_weight(
            shape=(shape[1] + 1, shape[-1]), name="position"
        )

    def call(self, x):
        shape = (keras.ops.shape(x)[0], 1, x.shape[-1])
        token = keras.ops.broadcast_to(self.token, shape)
        return keras.ops.concatenate([token, x], axis=1) + self.position


class Arithmetic(layers.Layer):
    """Variables that are transformed before they meet the examples."""

    def build(self, shape):
        self.v = self.add_weight(shape=(shape[-1],), name="v")
        self.u = self.add_weight(shape=(1,), name="u")

    def call(self, x):
        ops = keras.ops
        x = ops.maximum(x, ops.softplus(self.v)) * ops.exp(self.u)
        return (x - self.v) / (1.5 + ops.square(self.v))


class Pick(layers.Layer):
    """Takes some positions, one of them twice."""

    def call(self, x):
        return keras.ops.take(x, [2, 0, 2], axis=1)


class PickOnFirstAxis(layers.Layer):
    """Looks positions up along the first axis."""

    def call(self, x):
        x = keras.ops.transpose(x, (1, 0, 2))
        x = keras.ops.take(x, [2, 0, 2], axis=0)
        return keras.ops.transpose(x, (1, 0, 2))


class WeightNormalized(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")

    def call(self, x):
        norm = keras.ops.norm(self.w, axis=0, keepdims=True)
        return keras.ops.matmul(x, self.w / norm)


class TimeMajor(layers.Layer):
    """Multiplies with the examples behind the time steps."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, activation="tanh")

    def call(self, x):
        x = keras.ops.transpose(x, (1, 0, 2))
        return keras.ops.transpose(self.dense(x), (1, 0, 2))


class MixExamples(layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


class Tied(keras.Model):
    """An embedding that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(5, 4)
        self.hidden = layers.Dense(4, activation="tanh")

    def call(self, x):
        h = self.hidden(self.embed(x))
        return keras.ops.matmul(h, keras.ops.transpose(self.embed.embeddings))


def two_sequences():
    a, b = (keras.Input(s, dtype=dtype()) for s in ((5, 6), (4, 6)))
    h = layers.MultiHeadAttention(2, 3)(a, b)
    h = layers.GroupQueryAttention(3, 4, 2)(h, b)
    h = layers.GlobalAveragePooling1D()(h)
    return keras.Model([a, b], layers.Dense(3)(h))


def dtype():
    return keras.config.dtype_policy().compute_dtype


def stack(shape, *make):
    """A network of layers that are made when it is built."""

    def build():
        body = [layer() for layer in make]
        head = [layers.Flatten(), layers.Dense(networks.CLASSES)]
        return keras.Sequential(
            [keras.Input(shape, dtype=dtype()), *body, *head]
        )

    return build


def layer(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs)


def tanh(cls, *args, **kwargs):
    return layer(cls, *args, activation="tanh", **kwargs)


ACTIVE = layer(layers.Activation, "tanh")
DENSE = layer(layers.Dense, 5)
# All of their variables are done without a loop over examples.
FAST = {
    "conv1d_causal_dilated": stack(
        (12, 2),
        tanh(layers.Conv1D, 4, 3, dilation_rate=2, padding="causal"),
    ),
    "conv2d_dilated_same": stack(
        (7, 6, 2),
        tanh(layers.Conv2D, 4, (3, 2), dilation_rate=(2, 1), padding="same"),
    ),
    "conv2d_strided_same": stack(
        (7, 6, 2),
        tanh(layers.Conv2D, 4, (3, 2), strides=(2, 3), padding="same"),
    ),
    "conv3d_strided_same": stack(
        (4, 5, 3, 2),
        tanh(layers.Conv3D, 3, (2, 3, 2), strides=(1, 2, 1), padding="same"),
    ),
    "conv1d_groups": stack(
        (9, 4), tanh(layers.Conv1D, 4, 3, groups=2, dilation_rate=2)
    ),
    "conv2d_groups_strided": stack(
        (7, 7, 4),
        tanh(layers.Conv2D, 8, 3, groups=4, strides=2, padding="same"),
    ),
    "conv2d_groups_dilated": stack(
        (7, 7, 4),
        tanh(layers.Conv2D, 4, 3, groups=2, dilation_rate=2, padding="same"),
    ),
    "conv3d_groups": stack((4, 4, 4, 4), tanh(layers.Conv3D, 4, 2, groups=2)),
    "depthwise1d": stack(
        (9, 3),
        tanh(layers.DepthwiseConv1D, 3, depth_multiplier=2, strides=2),
    ),
    "depthwise2d_multiplied": stack(
        (7, 6, 3),
        tanh(
            layers.DepthwiseConv2D,
            3,
            depth_multiplier=2,
            strides=2,
            padding="same",
        ),
    ),
    "depthwise2d_dilated": stack(
        (7, 7, 3),
        tanh(layers.DepthwiseConv2D, 3, dilation_rate=2, padding="same"),
    ),
    "separable1d": stack(
        (9, 3), tanh(layers.SeparableConv1D, 4, 3, padding="same")
    ),
    "transposed1d_same": stack(
        (5, 3),
        tanh(layers.Conv1DTranspose, 4, 3, strides=2, padding="same"),
    ),
    "transposed2d_padded": stack(
        (4, 5, 3),
        tanh(
            layers.Conv2DTranspose,
            4,
            3,
            strides=2,
            padding="same",
            output_padding=1,
        ),
    ),
    "transposed3d": stack(
        (3, 3, 3, 2), tanh(layers.Conv3DTranspose, 2, 2, strides=2)
    ),
    "dense_on_images": stack((2, 4, 3), tanh(layers.Dense, 5)),
    "einsum_heads": stack(
        (4, 6),
        tanh(layers.EinsumDense, "abc,cde->abde", (4, 2, 3), bias_axes="de"),
    ),
    "einsum_by_position": stack(
        (4, 6),
        tanh(layers.EinsumDense, "abc,bcd->abd", (4, 3), bias_axes="bd"),
    ),
    "einsum_over_time": stack(
        (4, 6), tanh(layers.EinsumDense, "abc,bd->adc", (5, 6))
    ),
    "attention_of_two": two_sequences,
    "time_distributed": stack(
        (4, 3, 2),
        lambda: layers.TimeDistributed(layers.Conv1D(3, 2, activation="tanh")),
    ),
    "prelu": stack((4, 6), DENSE, layer(layers.PReLU)),
    "prelu_shared": stack((4, 6), DENSE, layer(layers.PReLU, shared_axes=[1])),
    "rms_norm": stack((4, 6), DENSE, layer(layers.RMSNormalization)),
    "layer_norm_axes": stack(
        (4, 3),
        DENSE,
        layer(layers.LayerNormalization, axis=(1, 2)),
        ACTIVE,
    ),
    "group_norm_axis": stack(
        (4, 4, 4), layer(layers.GroupNormalization, 2, axis=1), ACTIVE
    ),
    "batch_norm_axis": stack(
        (4, 3), DENSE, layer(layers.BatchNormalization, axis=1), ACTIVE
    ),
    "batch_norm_no_scale": stack(
        (4,), DENSE, layer(layers.BatchNormalization, scale=False), ACTIVE
    ),
    "spectral_norm": stack(
        (4,),
        lambda: layers.SpectralNormalization(layers.Dense(4)),
        ACTIVE,
    ),
    "class_token": stack((3, 4), ClassToken, tanh(layers.Dense, 3)),
    "arithmetic": stack((4,), DENSE, Arithmetic),
    "picked": stack((4, 3), DENSE, Pick, ACTIVE),
    "picked_first": stack((4, 3), DENSE, PickOnFirstAxis, ACTIVE),
    "unrolled_lstm": stack((4, 3), layer(layers.LSTM, 3, unroll=True)),
}
# Some of their variables need the loop.
SLOW = {
    "weight_normalized": stack((4,), WeightNormalized, ACTIVE),
    "unrolled_gru": stack((3, 2), layer(layers.GRU, 2, unroll=True)),
    "rnn": stack((3, 2), layer(layers.SimpleRNN, 2)),
    "tied": Tied,
    "time_major": stack((4, 3), TimeMajor),
}
