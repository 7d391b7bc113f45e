"""What is compiled for a model lives as long as what it depends on."""

from __future__ import annotations

import gc
import weakref

import keras
from keras import layers
import tensorflow as tf

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
