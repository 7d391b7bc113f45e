"""Derivatives of convolutions are TensorFlow's, computed in another way."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import convolutions
from keras_fisher._derivatives import second_derivatives

# The shapes of an example and of the kernel, and arguments.
_REPLACED = [
    ("2d", (6, 5, 3), (3, 3, 3, 2), dict(padding="SAME")),
    ("2d valid", (6, 5, 3), (3, 2, 3, 2), dict(padding="VALID")),
    ("2d even", (5, 6, 2), (4, 2, 2, 3), dict(padding="SAME", strides=1)),
    ("2d large", (2, 2, 2), (5, 3, 2, 2), dict(padding="SAME")),
    ("2d 1x1", (4, 3, 2), (1, 1, 2, 3), dict(strides=[1, 1])),
    ("1d", (7, 2), (3, 2, 3), dict(padding="SAME", data_format="NWC")),
    ("1d even", (7, 2), (4, 2, 3), dict(padding="SAME", dilations=[1])),
]
_LEFT = [
    ("stride", (6, 5, 3), (3, 3, 3, 2), dict(padding="SAME", strides=2)),
    ("dilated", (7, 7, 2), (3, 3, 2, 2), dict(dilations=(2, 2))),
    ("3d", (3, 4, 5, 2), (2, 2, 2, 2, 3), dict(padding="SAME")),
]


def _derivatives(function, x, w):
    """Of a function of both, and of the squared norm of its gradient."""
    with tf.GradientTape() as outer:
        outer.watch([x, w])
        with tf.GradientTape() as inner:
            inner.watch([x, w])
            # Curved, so that nothing vanishes.
            y = function(x, w)
            loss = tf.reduce_sum(tf.sin(y))
        first = inner.gradient(loss, [x, w])
        square = sum(tf.reduce_sum(g**2 + 0.1 * g**3) for g in first)
    return y, *first, *outer.gradient(square, [x, w])


@pytest.mark.parametrize("batch", [4, None])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "shape, kernel, arguments",
    [case[1:] for case in _REPLACED],
    ids=[case[0] for case in _REPLACED],
)
def test_derivatives_are_tensorflows(shape, kernel, arguments, eager, batch):
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(4, *shape)))
    w = tf.constant(random.normal(size=kernel))

    def derivatives(convolution, eager=False):
        def function(x, w):
            return _derivatives(
                lambda x, w: convolution(x, w, **arguments), x, w
            )

        if eager:
            return function(x, w)
        signature = [
            tf.TensorSpec([batch, *shape], x.dtype),
            tf.TensorSpec(kernel, w.dtype),
        ]
        return tf.function(function, signature, autograph=False)(x, w)

    expected = derivatives(tf.nn.convolution)
    found = derivatives(convolutions.convolution, eager)
    for name, a, b in zip(["y", "x", "w", "xx", "ww"], found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "shape, kernel, arguments",
    [case[1:] for case in _REPLACED],
    ids=[case[0] for case in _REPLACED],
)
def test_no_gradient_kernel_runs(shape, kernel, arguments):
    function = tf.function(
        lambda x, w: _derivatives(
            lambda x, w: convolutions.convolution(x, w, **arguments), x, w
        ),
        autograph=False,
    )
    graph = function.get_concrete_function(
        tf.TensorSpec([None, *shape]), tf.TensorSpec(kernel)
    ).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert "Conv2D" in kinds
    assert not {k for k in kinds if k.startswith("Conv2DBackprop")}


@pytest.mark.parametrize(
    "shape, kernel, arguments",
    [case[1:] for case in _LEFT],
    ids=[case[0] for case in _LEFT],
)
def test_others_are_left_to_tensorflow(shape, kernel, arguments):
    x, w = tf.random.normal([2, *shape]), tf.random.normal(kernel)

    @tf.function
    def kinds(convolution):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = convolution(x, w, **arguments)
        gradient = tape.gradient(y, x)
        graph = tf.compat.v1.get_default_graph()
        found.append({o.type for o in graph.get_operations()} - {"Const"})
        return y, gradient

    found = []
    expected = kinds(tf.nn.convolution)
    for a, b in zip(kinds(convolutions.convolution), expected):
        np.testing.assert_array_equal(a, b)
    assert found[0] == found[1]


def test_half_precision_is_left_alone():
    x, w = tf.ones([1, 4, 4, 1], "float16"), tf.ones([2, 2, 1, 1], "float16")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = convolutions.convolution(x, w)
    np.testing.assert_array_equal(y, tf.nn.convolution(x, w))
    assert tape.gradient(y, x).dtype == tf.float16


@pytest.mark.parametrize("layer", ["Conv1D", "Conv2D"])
@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_convolutions_of_keras_are_replaced_where_that_is_faster(
    layer, faster, jit, monkeypatch
):
    monkeypatch.setattr(second_derivatives, "_runs_on_eigen", lambda: faster)
    dimensions = int(layer[4])
    convolution = getattr(keras.layers, layer)(2, 3, padding="same")
    convolution.build([None, *[5] * dimensions, 1])
    kinds = set()

    @tf.function(jit_compile=jit, autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            with second_derivatives.exact():
                y = convolution(x)
        result = tape.gradient(y, x)
        graph = tf.compat.v1.get_default_graph()
        kinds.update(operation.type for operation in graph.get_operations())
        return result

    gradient(tf.ones([1, *[5] * dimensions, 1]))
    assert ("Conv2DBackpropInput" in kinds) == (jit or not faster), kinds


def test_what_decides_is_still_there(monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    mkl = second_derivatives._pywrap_util_port
    monkeypatch.setattr(mkl, "IsMklEnabled", lambda: False)
    assert second_derivatives._runs_on_eigen()
    monkeypatch.setattr(mkl, "IsMklEnabled", lambda: True)
    assert not second_derivatives._runs_on_eigen()
    monkeypatch.setattr(mkl, "IsMklEnabled", lambda: False)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert not second_derivatives._runs_on_eigen()
