"""Layers without a second derivative."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher._derivatives import second_derivatives


class _Recomputed(keras.layers.Wrapper):
    """Keeps no activations."""

    def call(self, x):
        return tf.recompute_grad(lambda x: self.layer(x))(x)


@pytest.mark.parametrize(
    "method, message",
    [
        ("exact", "no second derivative.*Rematerialization"),
        ("finite_difference", "its variables.*Rematerialization"),
    ],
)
def test_what_recompute_grad_cannot_do_is_an_error(method, message):
    model = keras.Sequential(
        [keras.Input((3,)), _Recomputed(keras.layers.Dense(2))]
    )
    model = keras_fisher.FisherModel(model, FisherPenalty(method=method))
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones([4, 3]), np.zeros(4, int), verbose=0)


class _Unfinished(keras.layers.Layer):
    def call(self, x):
        raise NotImplementedError("to be written")


def test_what_a_layer_of_the_user_has_not_implemented_stays_its_error():
    model = keras.Sequential([_Unfinished(), keras.layers.Dense(2)])
    with pytest.raises(NotImplementedError), second_derivatives.explained():
        model(np.ones([4, 3]))


class _Quantized(keras.layers.Layer):
    """TensorFlow registers the gradient of its gradient as constant."""

    def call(self, x):
        return tf.quantization.fake_quant_with_min_max_args(x, -2.0, 2.0)


class _SparseSum(keras.layers.Layer):
    """Of another operation of the kind."""

    def call(self, x):
        a, b = tf.sparse.from_dense(x), tf.sparse.from_dense(x**2)
        return tf.reshape(tf.sparse.to_dense(tf.sparse.add(a, b)), tf.shape(x))


def _quantized(layer, penalty, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            layer(name="of_a_user"),
            keras.layers.Dense(2),
        ]
    )
    model = keras_fisher.FisherModel(model, penalty)
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


_X, _Y = np.random.default_rng(0).normal(size=(8, 3)), np.arange(8) % 2


@pytest.mark.parametrize("layer", [_Quantized, _SparseSum])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(
    "kwargs, place",
    [
        ({}, r", in \S*of_a_user"),
        ({"run_eagerly": True}, ""),
        ({"jit_compile": True}, r", in \S*of_a_user"),
    ],
    ids=["graph", "eager", "xla"],
)
def test_a_gradient_that_tapes_would_lose_is_an_error(
    layer, kwargs, place, micro_batch_size
):
    if layer is _SparseSum and "jit_compile" in kwargs:
        pytest.skip("XLA has no sparse tensors")
    penalty = FisherPenalty(0.1, micro_batch_size=micro_batch_size)
    model = _quantized(layer, penalty, **kwargs)
    before = [v.numpy() for v in model.model.variables]
    with pytest.raises(
        ValueError, match=f"not differentiable{place}.*|finite_difference"
    ) as error:
        model.fit(_X, _Y, verbose=0)
    assert re.search(f"registered as not differentiable{place}", str(error))
    for a, b in zip(before, model.model.variables):
        np.testing.assert_array_equal(a, b)


def test_it_is_none_where_only_first_derivatives_are_taken():
    penalty = FisherPenalty(0.1, method="finite_difference")
    model = _quantized(_Quantized, penalty)
    model.fit(_X, _Y, verbose=0)
    assert keras_fisher.fisher_trace(model, _X) > 0
    model = keras_fisher.FisherModel(model.model, trace_every=1)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(_X, _Y, verbose=0)


def test_hessian_trace_takes_differences_there():
    # Wide enough that nothing is cut off: the identity, but for rounding.
    class Identity(_Quantized):
        def call(self, x):
            return tf.quantization.fake_quant_with_min_max_args(
                x, -20.0, 20.0, num_bits=16
            )

    traces = []
    for layer in (Identity, keras.layers.Identity):
        keras.utils.set_random_seed(0)
        model = _quantized(layer, None)
        traces.append(
            keras_fisher.hessian_trace(
                model, _X.astype("float32"), _Y, num_probes=16, seed=0
            )
        )
    assert float(traces[0]) == pytest.approx(float(traces[1]), rel=0.05)


def test_what_is_stopped_on_purpose_is_no_gradient_that_is_lost():
    """Within a function TensorFlow asks the registry for it, by its name."""

    @tf.function
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.tanh(x) * tf.stop_gradient(tf.exp(x))
        return tape.gradient(y, x)

    @tf.function
    def curvature(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = slope(x)
        with second_derivatives.complete():
            return tape.gradient(y, x)

    x = np.linspace(-1.0, 1.0, 5)
    expected = -2 * np.tanh(x) * (1 - np.tanh(x) ** 2) * np.exp(x)
    np.testing.assert_allclose(curvature(tf.constant(x)), expected, rtol=1e-12)


def test_the_registry_is_as_before():
    registry = second_derivatives._REGISTRY
    before = registry.lookup
    with second_derivatives.complete():
        assert registry.lookup is not before
        # Of other registries nothing is known.
        with second_derivatives.complete():
            pass
    assert registry.lookup is before
