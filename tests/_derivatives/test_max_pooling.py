"""Max pooling is TensorFlow's, to the second derivative that is not."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import max_pooling
from keras_fisher._derivatives import second_derivatives

_CALLS = [
    (tf.nn.max_pool, (2, 5, 3), (2, 1, "SAME")),
    (tf.nn.max_pool, (2, 5, 3), ([3], [1], "SAME", "NWC")),
    (tf.nn.max_pool, (2, 4, 5, 3), (3, 1, "SAME")),
    (tf.nn.max_pool, (2, 4, 5, 3), ((2, 3), (1, 2), "SAME", "NHWC")),
    (tf.nn.max_pool, (2, 4, 5, 3), (2, 2, "VALID")),
    (tf.nn.max_pool, (2, 4, 5, 3), (1, (1, 3), "SAME")),
    (tf.nn.max_pool, (2, 4, 5, 3), (1, 2, "VALID")),
    (tf.nn.max_pool, (2, 1, 1, 3), (2, 2, "SAME")),
    (tf.nn.max_pool, (2, 3, 2, 4, 3), (2, 1, "SAME", "NDHWC")),
    (tf.nn.max_pool1d, (2, 5, 3), (2, 1, "SAME")),
    (tf.nn.max_pool2d, (2, 4, 5, 3), ((1, 3, 2, 1), (1, 1, 1, 1), "SAME")),
    (
        tf.nn.max_pool2d,
        (2, 4, 5, 3),
        (2, 1, [[0, 0], [1, 0], [0, 1], [0, 0]]),
    ),
    (tf.nn.max_pool3d, (2, 3, 2, 4, 3), (2, (1, 2, 1), "SAME")),
]


def _with_gradient(pool, x, arguments):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = pool(x, *arguments)
        # Entries that are all different, so that none can be another's.
        weights = tf.reshape(tf.range(tf.size(y)), tf.shape(y))
        total = tf.reduce_sum(tf.cast(weights, y.dtype) * y)
    return y, tape.gradient(total, x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("own, shape, arguments", _CALLS)
def test_outputs_and_gradients_are_tensorflows_to_the_bit(
    own, shape, arguments, dtype
):
    if dtype == "float16" and len(shape) == 5:
        pytest.skip("TensorFlow has no MaxPool3D in float16")
    x = np.random.default_rng(0).normal(size=shape)
    x = tf.constant(x, dtype)
    expected = _with_gradient(own, x, arguments)
    found = _with_gradient(max_pooling.exact(own), x, arguments)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "shape, arguments, options",
    [
        ((2, 5, 3), ([3], "MAX", [1], "SAME"), {}),
        ((2, 4, 5, 3), ([2, 3], "MAX"), {"padding": "SAME"}),
        ((2, 4, 5, 3), ([2, 2], "MAX", [2, 1], "VALID"), {"name": "pool"}),
        ((2, 6, 7, 3), ([2, 2], "MAX"), {"dilations": [2, 1]}),
        ((2, 4, 5, 3), ([2, 3], "AVG", [1, 2], "SAME"), {}),
    ],
)
def test_pools_of_any_kind_are_tensorflows(shape, arguments, options):
    x = tf.constant(np.random.default_rng(0).normal(size=shape))
    expected = _with_gradient(
        lambda x, *a: tf.nn.pool(x, *a, **options), x, arguments
    )
    with second_derivatives.exact():
        found = _with_gradient(
            lambda x, *a: tf.nn.pool(x, *a, **options), x, arguments
        )
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", cases.MODES)
def test_second_derivatives_of_tensorflows_pool_are_those_of_max_pool(mode):
    x = tf.constant(np.random.default_rng(1).normal(size=(2, 6, 3)))

    def squared_norm(pool):
        def function():
            with tf.GradientTape() as outer:
                outer.watch(x)
                with second_derivatives.exact(), tf.GradientTape() as inner:
                    inner.watch(x)
                    y = tf.reduce_sum(pool(x) ** 3)
                square = tf.reduce_sum(inner.gradient(y, x) ** 2)
            return outer.gradient(square, x)

        return cases.compiled(function, mode)()

    np.testing.assert_allclose(
        squared_norm(lambda x: tf.nn.pool(x, [3], "MAX", [1], "SAME")),
        squared_norm(lambda x: tf.nn.max_pool1d(x, 3, 1, "SAME")),
    )


def test_integers_are_left_to_tensorflow():
    x = tf.reshape(tf.range(6), [1, 2, 3, 1])
    found = max_pooling.exact(tf.nn.max_pool2d)(x, 2, 1, "SAME")
    np.testing.assert_array_equal(found[0, ..., 0], [[4, 5, 5], [4, 5, 5]])


def test_tensorflows_second_derivative_is_still_wrong_in_a_graph():
    """If this fails, delete the replacement."""
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 1)))

    def derivative(pool, scale):
        with tf.GradientTape() as outer:
            outer.watch(scale)
            _, gradient = _with_gradient(
                lambda x, *arguments: scale * pool(x, *arguments),
                x,
                (2, 1, "SAME"),
            )
            square = tf.reduce_sum(gradient**2)
        return outer.gradient(square, scale) / square

    one = tf.constant(1.0, tf.float64)
    for pool, expected in (
        (max_pooling.exact(tf.nn.max_pool), 2.0),
        (tf.nn.max_pool, 0.0),
    ):
        found = tf.function(derivative, autograph=False)(pool, one)
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(derivative(pool, one), 2.0)
