"""Layers of somebody else's, with derivatives that are right or wrong."""

from __future__ import annotations

from keras import layers
import numpy as np
import tensorflow as tf


@tf.custom_gradient
def wrong_in_x(x):
    y = tf.tanh(x)
    return y, lambda above: above * tf.stop_gradient(1 - y**2)


@tf.custom_gradient
def wrong_by_half(x):
    y = tf.tanh(x)
    slope = 1 - tf.tanh(x) ** 2
    mixed = 0.5 * slope + tf.stop_gradient(0.5 * slope)
    return y, lambda above: above * mixed


@tf.custom_gradient
def wrong_in_the_cotangent(x):
    @tf.custom_gradient
    def backward(above):
        return 2 * above, lambda above: 3 * above

    return 2 * x, backward


@tf.custom_gradient
def right(x):
    return tf.tanh(x), lambda above: above * (1 - tf.tanh(x) ** 2)


@tf.custom_gradient
def broken(x):
    @tf.custom_gradient
    def backward(above):
        def backward_of_that(_):
            raise RuntimeError("no way back from there")

        return above * tf.cos(x), backward_of_that

    return tf.sin(x), backward


def outside_of_xla(x):
    """`x`, by something that XLA refuses to compile."""
    zero = tf.numpy_function(np.zeros_like, [x], x.dtype)
    zero.set_shape(x.shape)
    return x + tf.stop_gradient(zero)


class Applied(layers.Layer):
    """A function of somebody else's."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)
