"""Layers without a second derivative."""

from __future__ import annotations

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
