"""Scales of backward passes in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import loss_scale


@pytest.mark.parametrize("length", [1e-3, 1.0, 500.0])
@pytest.mark.parametrize("by_example", [False, True])
def test_scale_is_a_power_of_two_for_16_bits_alone(length, by_example):
    cotangent = length * tf.constant([[0.6, -0.8], [0.0, 0.0]])
    for dtype in ("float16", "bfloat16"):
        scale = float(loss_scale.fitting([cotangent], dtype, by_example))
        assert np.log2(scale) == round(np.log2(scale))
        assert 8 <= scale * length <= 16
    assert loss_scale.fitting([cotangent], "float32") == 1
    nothing = loss_scale.fitting([tf.zeros([2])], "float16")
    assert np.isfinite(nothing)


def test_sums_are_over_all_or_over_each_example():
    cotangent = tf.ones([64, 4])
    assert float(loss_scale.fitting([cotangent], "float16")) == 1
    assert float(loss_scale.fitting([cotangent], "float16", True)) == 8


def test_several_cotangents_count_together():
    several = [tf.constant([3.0]), tf.constant([-4.0], tf.float64)]
    assert float(loss_scale.fitting(several, "float16")) == 2


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_the_pass_of_a_square_starts_with_length_one(norm):
    """Or less, where the gradients of examples are long."""
    scale, factor, examples = tf.constant(2.0**12), 0.1, 16
    found = loss_scale.of_square(scale, factor, norm**2, examples)
    start = float(found / scale) * 2 * factor * norm
    least = 1 / max(1, 4 * norm)
    assert least / 2 <= start <= least
    assert loss_scale.of_square(1.0, factor, norm**2, examples) == 1
    for nothing in (0.0, norm):
        found = loss_scale.of_square(scale, nothing, 0.0, examples)
        assert np.isfinite(found)


@pytest.mark.parametrize("scale", [1.0, 3.0, tf.constant(8.0)])
def test_a_scale_is_taken_out_in_the_dtype_of_the_gradient(scale):
    gradient = tf.constant([1.0, 7.0], tf.float64)
    np.testing.assert_allclose(
        loss_scale.unscaled(gradient * float(scale), scale),
        gradient,
        rtol=1e-15,
    )


@pytest.mark.parametrize("scale", [2.0**17, tf.constant(2.0**17)])
def test_a_scale_may_be_larger_than_the_numbers_of_the_gradient(scale):
    found = loss_scale.unscaled(tf.constant([2.0**7], tf.float16), scale)
    assert found.dtype == tf.float16 and found.numpy() == [2.0**-10]
