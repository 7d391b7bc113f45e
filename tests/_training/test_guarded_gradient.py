"""A gradient that is not finite reaches nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import gradients
from keras_fisher._training.guarded_gradient import GuardedGradient
from keras_fisher._training.guarded_gradient import guarded_gradient

_NAN = float("nan")


def _cubic(x, scale=1.0, factor=1.0):
    """Guards the gradient of factor Σ x³, scaled."""
    x = tf.Variable(x)
    with tf.GradientTape() as tape:
        penalty = factor * tf.reduce_sum(x**3)
        objective = scale * penalty
    unused = tf.Variable(0.0)
    return guarded_gradient(tape, objective, [x, unused], penalty, scale)


@pytest.mark.parametrize("scale", [1.0, 2.0**15, tf.constant(2.0**15)])
def test_a_finite_gradient_is_usable_whatever_its_scale(scale):
    guarded = _cubic([1.0, 2.0], scale)
    assert bool(guarded.is_usable)
    assert guarded.gradients[1] is None
    np.testing.assert_allclose(
        guarded.gradients[0], np.array([3.0, 12.0]) * float(scale)
    )
    # Its square overflows with the scale, which does not count.
    assert bool(_cubic([1.0, 1e8], scale).is_usable)


@pytest.mark.parametrize(
    ("x", "factor"),
    [
        ([1.0, _NAN], 1.0),
        ([1.0, 1e20], 1.0),  # both overflow
        ([6e12, 6e12], 1e-8),  # the value does
        ([1e12, 1.0], 1e-4),  # the square of the gradient does
    ],
)
def test_what_is_not_finite_is_not_usable(x, factor):
    assert not bool(_cubic(x, factor=factor).is_usable)


@pytest.mark.parametrize("usable", [True, False])
def test_what_is_stored_has_no_scale_and_is_finite(usable):
    gradient = tf.constant([8.0, 4.0 if usable else float("inf")])
    guarded = GuardedGradient([gradient, None], tf.constant(usable), 4.0)
    variables = [tf.Variable([7.0, 7.0]), tf.Variable([7.0])]
    guarded.store(variables)
    expected = [2.0, 1.0] if usable else [0.0, 0.0]
    np.testing.assert_array_equal(variables[0], expected)
    np.testing.assert_array_equal(variables[1], [0.0])


@pytest.mark.parametrize("loss", [2.0, [2.0, 3.0], _NAN, [_NAN, 3.0]])
@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.parametrize("skips", [True, False])
def test_optimizers_get_what_they_can_take(loss, usable, skips):
    value = 5.0 if usable else float("inf")
    guarded = GuardedGradient(
        [tf.constant([value]), None], tf.constant(usable), 1.0
    )
    [gradient, nothing], told = guarded.for_optimizer(tf.constant(loss), skips)
    assert nothing is None
    if usable:
        kept, expected = 5.0, loss
    elif skips:
        kept, expected = _NAN, loss
    elif np.isfinite(loss).all():
        kept, expected = 0.0, np.full(np.shape(loss), _NAN)
    else:
        # That is Keras's to deal with.
        kept, expected = float("inf"), loss
    np.testing.assert_array_equal(gradient, [kept])
    np.testing.assert_array_equal(told, expected)


def test_gradients_are_added_whatever_they_are():
    rows = tf.IndexedSlices(
        tf.constant([[1.0], [2.0]]), tf.constant([1, 1]), tf.constant([2, 1])
    )
    ones = tf.ones([2, 1])
    sums = gradients.added(
        [rows, None, ones, None], [ones, ones, None, None], 0.5
    )
    np.testing.assert_array_equal(sums[0], [[0.5], [3.5]])
    np.testing.assert_array_equal(sums[1], [[0.5], [0.5]])
    assert sums[2] is ones and sums[3] is None


def test_a_layer_without_second_derivative_is_explained():
    images = tf.Variable(tf.random.normal([1, 4, 4, 1]))
    with tf.GradientTape() as tape:
        with tf.GradientTape() as inner:
            resized = tf.raw_ops.ResizeBicubic(images=images, size=[2, 2])
            value = tf.reduce_sum(resized**2)
        penalty = tf.reduce_sum(inner.gradient(value, images) ** 2)
    with pytest.raises(ValueError, match=r"finite_difference.*ResizeBicubic"):
        guarded_gradient(tape, penalty, [images], penalty)
