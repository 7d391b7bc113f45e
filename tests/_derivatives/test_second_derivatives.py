"""TensorFlow's wrong second derivatives are replaced, and nothing else is.

These tests fail if Keras stops calling what `second_derivatives` replaces.
"""

from __future__ import annotations

import contextlib
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import second_derivatives


def _second_derivative(function, x, v, around=second_derivatives.exact):
    """The gradient of ‖∇ Σ v f(x)‖², with `exact` around the forward pass."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape(persistent=True) as inner:
            inner.watch(x)
            with around():
                y = function(x)
        gradient = inner.gradient(y, x, output_gradients=v)
        square = tf.reduce_sum(gradient**2)
    return gradient, outer.gradient(square, x)


_POOLS = [
    ("1d", keras.layers.MaxPooling1D, (2,), (7, 3)),
    ("2d", keras.layers.MaxPooling2D, (2,), (6, 7, 2)),
    ("2d overlap", keras.layers.MaxPooling2D, (3, 2, "same"), (7, 6, 2)),
    ("2d uneven", keras.layers.MaxPooling2D, ((3, 2), (1, 3)), (7, 8, 2)),
    ("3d", keras.layers.MaxPooling3D, (2, None, "same"), (3, 4, 5, 2)),
    # These keep the shape, or may.
    ("1d same", keras.layers.MaxPooling1D, (2, 1, "same"), (5, 2)),
    ("2d same", keras.layers.MaxPooling2D, (3, 1, "same"), (4, 5, 2)),
    ("3d same", keras.layers.MaxPooling3D, (2, 1, "same"), (2, 3, 4, 2)),
    ("2d points", keras.layers.MaxPooling2D, (2, 2, "same"), (1, 1, 3)),
    ("2d unknown", keras.layers.MaxPooling2D, (3, 2, "same"), (None, 5, 2)),
    ("2d window 1", keras.layers.MaxPooling2D, (1, 1), (3, 4, 2)),
    ("2d subsampled", keras.layers.MaxPooling2D, (1, 2, "same"), (3, 4, 2)),
]

# Whole numbers, so that many windows have a tie: the first maximum wins. (Not
# so in TensorFlow's own 3-D and XLA's own overlapping pools, which disagree.)
_TIED = [(2,), ((3, 2), (1, 3))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "layer, arguments, shape",
    [p[1:] for p in _POOLS],
    ids=[p[0] for p in _POOLS],
)
@pytest.mark.impossible(
    "TensorFlow has no kernel",
    layer=keras.layers.MaxPooling3D,
    dtype="float64",
)
def test_max_pooling_equals_tensorflows_own_eager_kernels(
    layer, arguments, shape, jit, dtype
):
    pool = layer(*arguments, dtype=dtype)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *(size or 3 for size in shape)))
    if arguments in _TIED:
        x = np.round(2 * x)
    x = tf.constant(x, dtype)

    def function(x):
        # Curved on both sides of the pool.
        return pool(x**3) ** 2

    v = tf.constant(random.normal(size=function(x).shape), dtype)
    # Eagerly none of them writes into what it reads.
    expected = _second_derivative(function, x, v, contextlib.nullcontext)
    found = tf.function(
        lambda x: _second_derivative(function, x, v),
        jit_compile=jit,
        autograph=False,
        input_signature=[tf.TensorSpec([None, *shape], dtype)],
    )(x)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("jit", [False, True])
def test_pools_of_keras_have_a_gradient_of_their_own_under_xla_alone(jit):
    replaced = []

    def pooled(x):
        with tf.GradientTape() as tape, second_derivatives.exact():
            tape.watch(x)
            y = keras.layers.MaxPooling2D(2)(x)
        tape.gradient(y, x)
        kinds = {
            op.type for op in tf.compat.v1.get_default_graph().get_operations()
        }
        replaced.append("MaxPoolGrad" not in kinds)
        return y

    inner = tf.function(pooled, autograph=False)
    outer = tf.function(inner, jit_compile=jit, autograph=False)
    outer(tf.ones([1, 4, 4, 1]))
    assert replaced == [jit]


def _grouped(pool):
    # Keras computes it in a function of its own, compiled by XLA.
    convolution = keras.layers.Conv2D(4, 3, groups=2, dtype="float64")
    return lambda x: convolution(pool(convolution(x)))


def _in_a_loop(pool):
    paddings = [[0, 0], [1, 0], [1, 0], [0, 0]]

    def function(x):
        return tf.while_loop(
            lambda i, _: i < 2,
            lambda i, y: [i + 1, tf.pad(pool(y**3), paddings)],
            [tf.constant(0), x],
            maximum_iterations=2,
        )[1]

    return function


def _after_a_loop(pool):
    def function(x):
        y = tf.map_fn(lambda row: tf.sin(row), x)
        return pool(y**2)

    return function


@pytest.mark.few(1)
@pytest.mark.parametrize("surroundings", [_grouped, _in_a_loop, _after_a_loop])
@pytest.mark.parametrize("jit", [False, True])
def test_pooling_is_exact_in_any_surroundings(surroundings, jit):
    pool = keras.layers.MaxPooling2D(2, 1, dtype="float64")
    function = surroundings(pool)
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(2, 7, 7, 4)))
    v = tf.constant(random.normal(size=function(x).shape))
    _, found = tf.function(
        lambda x: _second_derivative(function, x, v),
        jit_compile=jit,
        autograph=False,
    )(x)
    _compare_with_differences(function, x, v, found)


def _compare_with_differences(function, x, v, found, h=1e-5, rtol=1e-6):
    """Along a direction, of the square of the gradient."""

    def square(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return float(
            tf.reduce_sum(tape.gradient(y, x, output_gradients=v) ** 2)
        )

    direction = np.random.default_rng(2).normal(size=x.shape)
    slope = (square(x + h * direction) - square(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(np.sum(found * direction), slope, rtol=rtol)


def test_softsign_has_a_second_derivative():
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 5)))
    v = tf.constant(np.random.default_rng(1).normal(size=(3, 5)))
    gradient, found = _second_derivative(keras.activations.softsign, x, v)
    size = 1 + abs(x)
    np.testing.assert_allclose(gradient, v / size**2, rtol=1e-12)
    expected = 2 * (v / size**2) * v * -2 * tf.sign(x) / size**3
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moments_are_tensorflows(keepdims, dtype):
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 3, 2)), dtype)
    expected = tf.nn.moments(x, [0, 1], keepdims=keepdims)
    with second_derivatives.exact():
        found = tf.nn.moments(x, [0, 1], keepdims=keepdims)
    for a, b in zip(found, expected):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a, b, rtol=1e-2 if dtype == "float16" else 1e-5
        )


def test_moments_take_variables_of_keras():
    """As of a kernel that is standardized."""
    kernel = keras.Variable(np.random.default_rng(0).normal(size=(4, 3)))
    expected = tf.nn.moments(kernel, [0])
    with second_derivatives.exact():
        found = tf.nn.moments(kernel, [0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_second_derivative_of_the_variance_is_exact():
    x = tf.constant(np.random.default_rng(0).normal(size=5))

    def derivatives():
        with tf.GradientTape() as tape:
            tape.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                variance = tf.nn.moments(x, [0])[1]
            gradient = inner.gradient(variance, x)
        return tape.jacobian(gradient, x)

    # Of Σ (x_i - m)² / n: 2/n (δ_ij - 1/n).
    expected = 2 / 5 * (np.eye(5) - 1 / 5)
    with second_derivatives.exact():
        np.testing.assert_allclose(derivatives(), expected, atol=1e-12)
    # If this fails, TensorFlow is exact by itself: delete the replacement.
    assert not np.allclose(derivatives(), expected)


def test_batch_normalization_of_keras_uses_what_is_replaced():
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 2)))
    layer = keras.layers.BatchNormalization(dtype="float64")
    v = tf.constant(np.random.default_rng(1).normal(size=(6, 2)))

    def function(x):
        return layer(x, training=True) ** 2

    _, found = _second_derivative(function, x, v)

    _compare_with_differences(function, x, v, found)


def test_replacement_ends_when_the_last_thread_leaves():
    original = tf.nn.moments
    inside, leave = threading.Event(), threading.Event()

    def other():
        with second_derivatives.exact():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with second_derivatives.exact():
        thread.start()
        inside.wait()
    assert tf.nn.moments is not original
    leave.set()
    thread.join()
    assert tf.nn.moments is original


@pytest.mark.parametrize(
    "context", [second_derivatives.exact, second_derivatives.complete]
)
@pytest.mark.parametrize("jit", [False, True])
def test_threads_may_leave_in_the_order_in_which_they_came(context, jit):
    """Also those that trace for XLA."""

    def functions():
        return (
            tf.nn.max_pool,
            tf.nn.convolution,
            tf.slice,
            second_derivatives._REGISTRY.lookup,
        )

    before, inside = functions(), context()

    @tf.function(jit_compile=jit)
    def trace():
        other = context()
        other.__enter__()
        inside.__exit__(None, None, None)
        other.__exit__(None, None, None)

    inside.__enter__()
    assert functions() != before
    trace()
    assert functions() == before


def test_replacement_ends_after_an_error():
    original = tf.nn.moments
    with pytest.raises(RuntimeError), second_derivatives.exact():
        raise RuntimeError
    assert tf.nn.moments is original
