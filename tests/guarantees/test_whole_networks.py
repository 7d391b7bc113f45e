"""The penalty's gradient of networks that others build, by differences."""

from __future__ import annotations

import cases
import evaluation
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherPenalty


def _res_next_block(x, filters, groups):
    y = layers.Conv2D(filters, 1, use_bias=False)(x)
    y = layers.Activation("gelu")(layers.BatchNormalization()(y))
    y = layers.Conv2D(filters, 3, padding="same", groups=groups)(y)
    y = layers.Activation("gelu")(layers.BatchNormalization()(y))
    return layers.Add()([y, layers.Conv2D(filters, 1)(x)])


def res_next():
    """Grouped convolutions next to pooling, with residuals."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="tanh")(x)
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    x = _res_next_block(x, 4, groups=2)
    x = layers.MaxPooling2D(2)(x)
    x = _res_next_block(x, 6, groups=3)
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


class ByMatrices(layers.Layer):
    """Bilinear resizing to twice the size, written as two products.

    In any precision; TensorFlow's own computes in 32 bits.
    """

    def call(self, x):
        size = x.shape[1]
        one = np.eye(size, dtype="float32")[:, :, None, None]
        up = tf.image.resize(one, [2 * size, 1])[:, :, 0, 0]
        up = tf.cast(up, x.dtype)
        return tf.einsum("iu,jv,bijc->buvc", up, up, x)


def u_net(upsampling=lambda: layers.UpSampling2D(2, interpolation="bilinear")):
    """Down by pooling, up by resizing and transposed convolutions."""
    x = inputs = keras.Input((8, 8, 2))
    x = top = layers.Conv2D(3, 3, padding="same", activation="tanh")(x)
    x = layers.MaxPooling2D(2)(x)
    x = middle = layers.Conv2D(4, 3, padding="same", activation="softsign")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Conv2D(4, 3, padding="same", activation="tanh")(x)
    x = layers.Conv2DTranspose(4, 2, strides=2)(x)
    x = layers.Concatenate()([x, middle])
    x = upsampling()(x)
    x = layers.Concatenate()([x, top])
    x = layers.Conv2D(3, 3, padding="same", activation="tanh")(x)
    x = layers.AveragePooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


_NETWORKS = {
    "ResNeXt": res_next,
    "U-Net": u_net,
    "U-Net nearest": lambda: u_net(layers.UpSampling2D),
    "U-Net by matrices": lambda: u_net(ByMatrices),
}


def _built(name, dtype):
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(4)
    model = _NETWORKS[name]()
    shape = (networks.BATCH, *model.input_shape[1:])
    # Keras rounds inputs to single precision.
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    return model, tf.constant(x, dtype)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", "xla", *cases.slow(["eager"])])
@pytest.mark.parametrize("name", ["ResNeXt", "U-Net", "U-Net nearest"])
def test_the_gradient_is_that_of_differences(name, mode):
    penalty = FisherPenalty(0.7)
    model, x = _built(name, "float64")
    _, _, gradient = evaluation.run(mode, penalty, model, x)
    if name == "U-Net":
        model, x = _built("U-Net by matrices", "float64")
    value = tf.function(
        lambda: evaluation.evaluated(penalty, model, x)[0], autograph=False
    )
    random = np.random.default_rng(1)
    direction = [random.normal(size=g.shape) for g in gradient]
    expected = networks.directional_difference(
        lambda: float(value()), model.trainable_variables, direction, 1e-6
    )
    found = sum(
        float(tf.reduce_sum(g * d)) for g, d in zip(gradient, direction)
    )
    # The weights are those of float64, resized images those of 32 bits.
    tolerance = 1e-5 if name == "U-Net" else 1e-6
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNeXt", "U-Net"])
def test_xla_agrees_with_the_graph(name):
    for dtype, tolerance in (("float64", 1e-6), ("float32", 1e-3)):
        model, x = _built(name, dtype)
        results = [
            evaluation.run(mode, FisherPenalty(0.7), model, x)
            for mode in ("graph", "xla")
        ]
        gradients = [gradient for _, _, gradient in results]
        distance = evaluation.relative(*gradients)
        assert distance < tolerance, (dtype, distance)
