"""What is read off Keras layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher._common import keras_layers
from keras_fisher.layers import Rematerialization


def test_a_snapshot_holds_statistics_and_random_states():
    network = training.network()
    x = tf.constant(training.X)
    snapshot = keras_layers.snapshot(network)
    first = network(x, training=True)
    assert not np.allclose(network(x, training=True), first)
    for variable, value in snapshot:
        variable.assign(value)
    np.testing.assert_array_equal(network(x, training=True), first)


def test_layers_are_built_by_a_call_if_they_are_not():
    model = training.Subclassed()
    keras_layers.build_by_call(model, training.X)
    assert len(model.weights) == 4
    model.call = None
    keras_layers.build_by_call(model, training.X)


def test_wrappers_that_only_run_a_layer_are_seen_through():
    dense = keras.layers.Dense(2, dtype="float16")
    wrapped = Rematerialization(Rematerialization(dense))
    assert keras_layers.unwrapped(wrapped) is dense
    assert keras_layers.compute_dtype(wrapped) == "float16"
    distributed = keras.layers.TimeDistributed(dense)
    assert keras_layers.unwrapped(distributed) is distributed


def test_frozen_layers_are_named_with_what_follows():
    network = training.dense_network()
    keras_layers.check_trainable(network, "nothing moves")
    network.trainable = False
    with pytest.raises(ValueError, match=rf"nothing moves.*{network.name}"):
        keras_layers.check_trainable(network, "nothing moves")


@pytest.mark.parametrize("mask", [None, tf.constant([True, False])])
def test_masks_are_found_where_they_were_put(mask):
    tensor = keras_layers.with_mask(tf.ones([2, 1]), mask)
    assert keras_layers.mask_of(tensor) is mask
