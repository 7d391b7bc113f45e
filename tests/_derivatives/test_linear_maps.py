"""Resizing is linear: its gradient has one, whatever TensorFlow says."""

from __future__ import annotations

from cases import MODES
from cases import compiled
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import linear_maps
from keras_fisher._derivatives import second_derivatives

# XLA has no kernels for these, nor has plain training with them.
_WITHOUT_XLA = ["nearest", "bicubic", "lanczos3", "antialias"]


def _resize(method: str, size=(5, 3)):
    options = {"method": method}
    if method == "antialias":
        options = {"method": "bilinear", "antialias": True}
    # Looked up when it is called, as Keras does.
    return lambda x: tf.image.resize(x, size, **options)


def _as_matrix(function, shape) -> np.ndarray:
    """Of a linear function of one image, from its values alone."""
    units = tf.reshape(
        tf.eye(int(np.prod(shape)), dtype=tf.float32), [-1, *shape]
    )
    return tf.reshape(function(units), [len(units), -1]).numpy().T


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "method",
    ["bilinear", "nearest", "bicubic", "lanczos3", "antialias"],
)
@pytest.mark.impossible("no kernel", method=_WITHOUT_XLA, mode="xla")
def test_both_derivatives_are_those_of_the_matrix(method, mode, dtype):
    shape = (4, 6, 1)
    function = _resize(method)
    matrix = _as_matrix(function, shape)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *shape))
    v = random.normal(size=(2, 5, 3, 1))

    def derivatives(x, v):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                with second_derivatives.exact():
                    y = function(x)
                curved = tf.reduce_sum(tf.cast(v, y.dtype) * y**3)
            gradient = inner.gradient(curved, x)
            square = tf.reduce_sum(gradient**2)
        return gradient, outer.gradient(square, x)

    found = compiled(derivatives, mode)(
        tf.constant(x, dtype), tf.constant(v, dtype)
    )
    flat = x.reshape(2, -1)
    y, w = flat @ matrix.T, v.reshape(2, -1)
    gradient = (3 * w * y**2) @ matrix
    second = (2 * gradient @ matrix.T * 6 * w * y) @ matrix
    tolerance = 2e-2 if dtype == "float16" else 1e-4
    for a, b in zip(found, (gradient, second)):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            tf.reshape(a, [2, -1]),
            b,
            rtol=tolerance,
            atol=tolerance * abs(b).max(),
        )


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest", "bicubic"])
def test_keras_resizes_with_what_is_replaced(interpolation):
    calls = []

    def counted(images, size, *args, **kwargs):
        calls.append(size)
        return _own(images, size, *args, **kwargs)

    _own = tf.image.resize
    tf.image.resize = counted
    try:
        x = tf.ones([1, 4, 4, 1])
        keras.layers.Resizing(3, 3, interpolation=interpolation)(x)
        keras.ops.image.resize(x, (3, 3), interpolation=interpolation)
    finally:
        tf.image.resize = _own
    assert len(calls) == 2, calls


def test_integers_are_left_alone():
    x = tf.reshape(tf.range(16), [1, 4, 4, 1])
    resize = linear_maps.resize(tf.image.resize)
    found = resize(x, (2, 2), method="nearest")
    assert found.dtype == tf.int32
    cut = linear_maps.slices(tf.slice)(tf.range(9), [2], [3])
    np.testing.assert_array_equal(cut, [2, 3, 4])


def test_forward_values_are_tensorflows():
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 4, 1)))
    plain = tf.image.resize(x, (7, 5))
    with second_derivatives.exact():
        found = tf.image.resize(x, (7, 5))
    assert found.dtype == plain.dtype
    np.testing.assert_array_equal(found, plain)


def test_derivatives_of_any_order():
    times = linear_maps.linear(lambda x: 3.0 * x)
    x = tf.constant(2.0)
    with tf.GradientTape() as third:
        third.watch(x)
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                y = times(x) ** 4
            gradient = first.gradient(y, x)
        curvature = second.gradient(gradient, x)
    assert float(gradient) == 4 * 81 * 8.0
    assert float(curvature) == 12 * 81 * 4.0
    assert float(third.gradient(curvature, x)) == 24 * 81 * 2.0
