"""Scales of backward passes in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import loss_scale


@pytest.mark.parametrize("largest", [1e-3, 1.0, 500.0])
def test_scale_is_a_power_of_two_for_16_bits_alone(largest):
    cotangent = tf.constant([largest / 3, -largest])
    for dtype in ("float16", "bfloat16"):
        scale = float(loss_scale.fitting([cotangent], dtype))
        assert np.log2(scale) == round(np.log2(scale))
        assert 128 <= scale * largest <= 256
    assert loss_scale.fitting([cotangent], "float32") == 1
    nothing = loss_scale.fitting([tf.zeros([2])], "float16")
    assert np.isfinite(nothing)


def test_the_largest_of_several_cotangents_counts():
    several = [tf.constant([1e-3]), tf.constant([-4.0], tf.float64)]
    assert float(loss_scale.fitting(several, "float16")) == 64


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
