"""Examples of dense, sparse and ragged tensors."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._common import examples

_TABLE = np.array([[1, 0, 2], [0, 0, 0], [0, 3, 0], [4, 0, 0]], "float32")
_MAKE = {
    "dense": tf.constant,
    "sparse": tf.sparse.from_dense,
    "ragged": lambda table: tf.RaggedTensor.from_tensor(table),
}


def _values(tensor):
    if isinstance(tensor, tf.SparseTensor):
        return tf.sparse.to_dense(tensor).numpy()
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.to_tensor().numpy()
    return tensor.numpy()


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("name", _MAKE)
def test_rows_and_turns(name, in_graph):
    tensor = _MAKE[name](_TABLE)

    def parts(tensor, first):
        number = examples.number({"a": None, "b": tensor})
        return number, [
            examples.rows({"a": None, "b": tensor}, 1, first)["b"],
            examples.rows(tensor, first, None),
            examples.turned(tensor, first),
        ]

    if in_graph:
        spec = tf.type_spec_from_value(tensor)
        if name != "ragged":
            shape = [None, 3]
            spec = type(spec)(shape, tf.float32)
        parts = tf.function(
            parts, input_signature=[spec, tf.TensorSpec([], tf.int32)]
        )
    for first in (1, 3, 4):
        number, found = parts(tensor, tf.constant(first))
        assert int(number) == 4
        expected = [_TABLE[1:first], _TABLE[first:], np.roll(_TABLE, -first, 0)]
        for a, b in zip(found, expected, strict=True):
            if b.size:
                np.testing.assert_array_equal(_values(a), b)
            assert a.shape[0] in (None, len(b))


_OF_ANY_LENGTH = {
    "dense": tf.constant([[[1.0]], [[2.0]], [[3.0]]]),
    "ragged": tf.ragged.constant([[1.0], [], [2.0, 3.0]]),
    "nested": tf.ragged.constant([[[1.0], []], [], [[2.0, 3.0]]]),
}


def _lists(tensor):
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.to_list()
    return tensor.numpy().tolist()


@pytest.mark.parametrize("name", _OF_ANY_LENGTH)
def test_single_and_repeated_ones_are_counted(name):
    tensor = _OF_ANY_LENGTH[name]
    x = {"a": None, "b": tensor}
    values = _lists(tensor)

    @tf.function
    def found(x, i, chosen):
        one, longer = examples.one(x, i), examples.with_again(x, chosen)
        assert one["b"].shape[0] == 1
        assert longer["b"].shape[0] == 5
        return one, longer

    chosen = [2, 0]
    for i in range(3):
        one, longer = found(x, tf.constant(i), tf.constant(chosen))
        expected = [values[i]], values + [values[k] for k in chosen]
        for tensor, rows in zip((one["b"], longer["b"]), expected, strict=True):
            is_ragged = isinstance(tensor, tf.RaggedTensor)
            assert is_ragged == (name != "dense")
            assert is_ragged == examples.has_ragged({"a": None, "b": tensor})
            assert _lists(tensor) == rows


@pytest.mark.parametrize("name", _OF_ANY_LENGTH)
def test_their_number_is_found_in_a_graph(name):
    tensor = _OF_ANY_LENGTH[name]

    @tf.function
    def number(x):
        return examples.number({"a": None, "b": x})

    spec = tf.type_spec_from_value(tensor)
    unknown = type(spec)([None] * spec.shape.rank, spec.dtype)
    found = number.get_concrete_function(unknown)(tensor)
    assert (found.dtype, int(found)) == (tf.int32, 3)


def test_layers_find_the_shape_of_sparse_rows():
    @tf.function(input_signature=[tf.SparseTensorSpec([None, 3], tf.float32)])
    def width(tensor):
        assert examples.rows(tensor, 0, 2).shape[1] == 3
        turned = examples.turned(tensor, tf.constant(1))
        assert turned.shape[1] == 3
        return tf.constant(0)

    width(tf.sparse.from_dense(_TABLE))


def test_what_is_not_there_stays_away():
    assert examples.tensors({"a": None, "b": 1}) == [1]
    found = examples.apply(lambda x: x + 1, {"a": None, "b": (1, 2)})
    assert found == {"a": None, "b": (2, 3)}
