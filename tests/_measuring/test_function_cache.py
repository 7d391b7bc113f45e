"""What is compiled for a model lives as long as what it depends on."""

from __future__ import annotations

import gc
import itertools
import weakref

import foreign
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._measuring import function_cache


def _model():
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(2), layers.Dense(2)]
    )


def test_made_once_for_a_key_and_a_state_of_the_model():
    model = _model()
    made = []

    def kept(key="a"):
        return function_cache.kept(
            model, key, [], lambda: made.append(key) or len(made)
        )

    assert kept() == kept() == 1
    assert kept("b") == 2
    model.layers[0].trainable = False
    assert kept() == 3
    model.layers[0].trainable = True
    model.jit_compile = True
    assert function_cache.uses_xla(model)
    assert kept() == kept() == 4
    assert made == ["a", "b", "a", "a"]


def test_models_are_told_apart_and_let_go():
    model, other = _model(), _model()
    assert function_cache.kept(
        model, "a", [], object
    ) is not function_cache.kept(other, "a", [], object)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_made_again_for_another_loss():
    model, loss = _model(), keras.losses.Huber(delta=1.0)
    first = function_cache.kept(model, "a", [loss], object)
    assert function_cache.kept(model, "a", [loss], object) is first
    loss.delta = 2.0
    assert function_cache.kept(model, "a", [loss], object) is not first


def test_functions_are_traced_even_where_the_program_runs_them_eagerly():
    tf.config.run_functions_eagerly(True)
    try:
        with function_cache.in_graphs():
            assert not tf.function(tf.executing_eagerly)()
        assert tf.function(tf.executing_eagerly)()
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize(
    "of, jit_compile",
    itertools.product(["fisher_trace", "hessian_trace"], [False, True]),
)
def test_compiled_by_xla_if_the_model_is(of, jit_compile):
    """XLA refuses what runs outside of it; TensorFlow does not."""
    outside = foreign.Applied(foreign.outside_of_xla)
    model = keras.Sequential([keras.Input((4,)), outside, layers.Dense(3)])
    model.compile(loss="mse", jit_compile=jit_compile)
    batch = np.ones([2, 4], "float32"), np.ones([2, 3], "float32")
    measure = getattr(keras_fisher, of)
    if jit_compile:
        with pytest.raises(tf.errors.InvalidArgumentError, match="XLA_"):
            measure(model, *batch)
    else:
        assert np.isfinite(measure(model, *batch))


def test_each_mode_of_the_network_has_a_function_of_its_own():
    def network():
        keras.utils.set_random_seed(0)
        norm = layers.BatchNormalization()
        return keras.Sequential([keras.Input((2,)), norm, layers.Dense(3)])

    def trace(model, training):
        return keras_fisher.fisher_trace(
            model,
            np.float32([[1.0, 2.0], [3.0, 5.0], [2.0, 9.0]]),
            estimator="batch",
            likelihood="categorical",
            training=training,
            seed=0,
        )

    model = network()
    kept = [trace(model, training) for training in (False, True)]
    anew = [trace(network(), training) for training in (False, True)]
    np.testing.assert_allclose(kept, anew, rtol=1e-6)
    assert kept[0] != pytest.approx(kept[1], rel=0.01)
