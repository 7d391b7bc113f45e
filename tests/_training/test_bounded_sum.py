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


def _mean(value=-1.0, dtype="float64"):
    return tf.Variable(value, dtype=dtype)


@pytest.mark.parametrize(
    "mean, bound, factor",
    [
        (-1.0, 1.0, 0.5),
        (-1.0, 3.0, 1.0),
        (100.0, 1.0, 0.5),
        # 2 + (5 - 2) / 100
        (2.0, 1.0, 0.203),
        (2.0, 2.0, 0.406),
    ],
)
@pytest.mark.parametrize(
    "dtype, scale", [("float64", 1.0), ("float64", 8.0), ("float16", 1024.0)]
)
def test_this_norm_and_the_mean_norm_bound(dtype, scale, mean, bound, factor):
    variable = _mean(mean, "float32")
    gradients, ratio = bounded_sum(
        _tensors(_LOSS, dtype, scale),
        _tensors(_PENALTY, dtype, scale),
        variable,
        bound,
        tf.constant(scale),
    )
    assert float(ratio) == 2
    for g, a, b in zip(gradients, _LOSS, _PENALTY):
        assert g.dtype == dtype
        np.testing.assert_allclose(g, scale * (a + factor * b), rtol=1e-3)
    expected = 5.0 if mean < 0 else mean + (5 - mean) / 100
    np.testing.assert_allclose(variable, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "mean, norm, is_step, found, kept",
    [
        (-1.0, 4.0, True, 4.0, 4.0),
        (8.0, 4.0, True, 7.96, 7.96),
        (8.0, 4.0, False, 7.96, 8.0),
        (8.0, np.nan, True, 8.0, 8.0),
        (8.0, np.inf, True, 8.0, 8.0),
        (0.0, 4.0, True, 0.04, 0.04),
        # Nothing is known, and so nothing allowed.
        (-1.0, np.nan, True, 0.0, -1.0),
    ],
)
def test_the_mean_follows_finite_norms(mean, norm, is_step, found, kept):
    variable = _mean(mean)
    norm = tf.constant(norm, "float64")
    result = bounded_sum_lib.followed(variable, norm, tf.constant(is_step))
    np.testing.assert_allclose(result, found, rtol=1e-12)
    np.testing.assert_allclose(variable, kept, rtol=1e-12)


def test_sources_without_a_gradient_count_as_zero():
    gradients, ratio = bounded_sum(
        _tensors([None, _LOSS[1], None]),
        _tensors([_PENALTY[0], None, None]),
        _mean(),
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
    [gradient], ratio = bounded_sum([rows], [own], _mean(), bound=1.0)
    assert float(ratio) == 2
    np.testing.assert_allclose(gradient, [[0.0], [3.0], [3.0]])


def test_where_the_loss_has_no_slope_the_penalty_does_nothing():
    loss = [np.zeros_like(g) for g in _LOSS]
    gradients, ratio = bounded_sum(
        _tensors(loss), _tensors(_PENALTY), _mean(), bound=1.0
    )
    assert float(ratio) == 0
    assert not any(np.any(g) for g in gradients)


def _accumulated(is_last, variables):
    return Accumulated(variables[:2], variables[2:], 2, tf.constant(is_last))


def test_the_last_batch_hands_over_the_penalty_of_all():
    variables = [tf.Variable(np.zeros_like(g)) for g in (*_LOSS, *_PENALTY)]
    mean = _mean()
    steps = [(False, 1.0), (True, 3.0)]
    handed = []
    for is_last, times in steps:
        gradients, _ = bounded_sum(
            _tensors(_LOSS, scale=times),
            _tensors(_PENALTY, scale=times),
            mean,
            bound=1.0,
            accumulated=_accumulated(is_last, variables),
        )
        handed.append(gradients)
    for first, last, a, b in zip(*handed, _LOSS, _PENALTY):
        np.testing.assert_array_equal(first, a)
        # Of means 2 a and 2 b, the optimizer takes half of the sum.
        np.testing.assert_allclose((first + last) / 2, 2 * a + b)
    assert not any(np.any(v) for v in variables)
    assert float(mean) == 10  # of the step, not of a batch


@pytest.mark.parametrize("is_last", [False, True])
def test_a_batch_that_is_not_finite_is_not_accumulated(is_last):
    variables = [tf.Variable(g) for g in (*_LOSS, *_PENALTY)]
    bad = [_PENALTY[0] * np.nan, _PENALTY[1]]
    gradients, _ = bounded_sum(
        _tensors(_LOSS),
        _tensors(bad),
        _mean(),
        bound=1.0,
        accumulated=_accumulated(is_last, variables),
    )
    # The optimizer sees it, and skips the batch.
    assert np.isnan(gradients[0]).any()
    for v, g in zip(variables, [*_LOSS, *_PENALTY]):
        np.testing.assert_array_equal(v, g)
