"""The sum of two gradients of which one has a longest length."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._training import bounded_sum as bounded_sum_lib
from keras_fisher._training.bounded_sum import Accumulated
from keras_fisher._training.bounded_sum import bounded_sum

_LOSS = [np.array([3.0, 0.0]), np.array([[0.0], [4.0]])]  # of length 5
_PENALTY = [np.array([0.0, 8.0]), np.array([[6.0], [0.0]])]  # of length 10


def _tensors(arrays, dtype="float64", scale=1.0):
    return [
        None if a is None else tf.constant(a * scale, dtype) for a in arrays
    ]


@pytest.mark.parametrize(
    "length, limit, expected",
    [
        (2.0, 1.0, 0.5),
        (1.0, 2.0, 1.0),
        (0.0, 0.0, 1.0),
        (1.0, 0.0, 0.0),
        (1.0, np.inf, 1.0),
        # What is no number already is left to others.
        (np.nan, 1.0, 1.0),
        (1.0, np.nan, 1.0),
    ],
)
def test_shortening_makes_a_length_at_most_its_limit(length, limit, expected):
    found = bounded_sum_lib.shortening(tf.constant(length), tf.constant(limit))
    assert float(found) == expected


@pytest.mark.parametrize(
    "squared_norm, bound, factor",
    [
        (None, 1.0, 0.5),
        (None, 3.0, 1.0),
        (100.0, 1.0, 0.5),
        (4.0, 1.0, 0.2),
        (4.0, 2.0, 0.4),
        (0.0, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize(
    "dtype, scale", [("float64", 1.0), ("float64", 8.0), ("float16", 1024.0)]
)
def test_both_lengths_bound(dtype, scale, squared_norm, bound, factor):
    gradients, ratio = bounded_sum(
        _tensors(_LOSS, dtype, scale),
        _tensors(_PENALTY, dtype, scale),
        None if squared_norm is None else tf.constant(squared_norm, "float32"),
        bound,
        tf.constant(scale),
    )
    assert float(ratio) == 2
    for g, a, b in zip(gradients, _LOSS, _PENALTY):
        assert g.dtype == dtype
        np.testing.assert_allclose(g, scale * (a + factor * b), rtol=1e-3)


def test_sources_without_a_gradient_count_as_zero():
    gradients, ratio = bounded_sum(
        _tensors([None, _LOSS[1], None]),
        _tensors([_PENALTY[0], None, None]),
        None,
        bound=1.0,
    )
    assert float(ratio) == 2
    np.testing.assert_allclose(gradients[0], _PENALTY[0] / 2)
    np.testing.assert_array_equal(gradients[1], _LOSS[1])
    assert gradients[2] is None


def test_rows_of_an_embedding_add_up_before_the_norm():
    rows = tf.IndexedSlices(
        tf.constant([[1.0], [2.0]]), tf.constant([1, 1]), tf.constant([3, 1])
    )
    own = tf.constant([[0.0], [0.0], [6.0]])
    [gradient], ratio = bounded_sum([rows], [own], None, bound=1.0)
    assert float(ratio) == 2
    np.testing.assert_allclose(gradient, [[0.0], [3.0], [3.0]])


def test_where_the_loss_has_no_slope_the_penalty_does_nothing():
    loss = [np.zeros_like(g) for g in _LOSS]
    gradients, ratio = bounded_sum(
        _tensors(loss), _tensors(_PENALTY), None, bound=1.0
    )
    assert float(ratio) == 0
    assert not any(np.any(g) for g in gradients)


def _accumulated(is_last, variables):
    return Accumulated(
        variables[:2], variables[2:4], variables[4], 2, tf.constant(is_last)
    )


def test_the_last_batch_hands_over_the_penalty_of_all():
    variables = [tf.Variable(np.zeros_like(g)) for g in (*_LOSS, *_PENALTY)] + [
        tf.Variable(0.0, dtype="float64")
    ]
    steps = [(False, 1.0), (True, 3.0)]
    handed = []
    for is_last, times in steps:
        gradients, _ = bounded_sum(
            _tensors(_LOSS, scale=times),
            _tensors(_PENALTY, scale=times),
            tf.constant(1e6, "float64"),
            bound=1.0,
            accumulated=_accumulated(is_last, variables),
        )
        handed.append(gradients)
    for first, last, a, b in zip(*handed, _LOSS, _PENALTY):
        np.testing.assert_array_equal(first, a)
        # Of means 2 a and 2 b, the optimizer takes half of the sum.
        np.testing.assert_allclose((first + last) / 2, 2 * a + b)
    assert not any(np.any(v) for v in variables)


@pytest.mark.parametrize("is_last", [False, True])
def test_a_batch_that_is_not_finite_is_not_accumulated(is_last):
    variables = [tf.Variable(g) for g in (*_LOSS, *_PENALTY)]
    variables.append(tf.Variable(4.0, dtype="float64"))
    bad = [_PENALTY[0] * np.nan, _PENALTY[1]]
    gradients, _ = bounded_sum(
        _tensors(_LOSS),
        _tensors(bad),
        tf.constant(1.0, "float64"),
        bound=1.0,
        accumulated=_accumulated(is_last, variables),
    )
    # The optimizer sees it, and skips the batch.
    assert np.isnan(gradients[0]).any()
    for v, g in zip(variables, [*_LOSS, *_PENALTY, 4.0]):
        np.testing.assert_array_equal(v, g)
