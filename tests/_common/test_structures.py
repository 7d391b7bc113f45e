"""One tensor, or a list or dict of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher._common import structures


def test_joined_outputs_come_apart_again():
    outputs = {"b": tf.ones([2, 3], tf.float16), "a": tf.zeros([2, 2, 2])}
    joined = structures.join(outputs)
    assert joined.shape == (2, 7)
    for name, found in structures.split(joined, outputs).items():
        assert found.dtype == tf.float32
        np.testing.assert_array_equal(found, outputs[name])


def test_a_single_output_is_joined_as_it_is():
    output = tf.ones([2, 3], tf.float16)
    assert structures.join(output) is output
    assert structures.split(output, output).dtype == tf.float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, 6),
        ([1, None], [2, None]),
        ((1, {"a": 2}), [2, {"a": 4}]),
        (None,) * 2,
    ],
)
def test_functions_are_applied_in_the_structure(given, expected):
    assert structures.apply(lambda x: 2 * x, given) == expected


def test_symbolic_outputs_are_those_of_functional_models_alone():
    network = training.dense_network()
    assert structures.symbolic_outputs(network).shape == (None, 3)
    x = keras.Input((2,))
    several = keras.Model(x, {"a": x, "b": x[:, :1]})
    found = structures.leaves(structures.symbolic_outputs(several))
    assert [output.shape for output in found] == [(None, 2), (None, 1)]
    assert structures.symbolic_outputs(training.Subclassed()) is None
