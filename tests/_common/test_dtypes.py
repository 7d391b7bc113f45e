"""Precision, and factors in it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._common import dtypes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [1 / 3, 2, tf.constant(0.1)])
def test_a_product_has_the_dtype_and_the_digits_of_the_tensor(dtype, factor):
    x = tf.constant([1.0, 7.0], dtype)
    found = dtypes.times(x, factor)
    assert found.dtype == dtype
    expected = np.array([1, 7], dtype) * np.asarray(factor, dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("factor", [2.0**17, tf.constant(2.0**17)])
def test_a_factor_may_be_larger_than_the_numbers_of_the_dtype(factor):
    x = tf.constant([2.0**-10], tf.float16)
    found = dtypes.times(x, factor)
    assert found.dtype == tf.float16 and found.numpy() == [2.0**7]


def test_a_factor_of_one_costs_nothing():
    x = tf.constant([1.0, 7.0])
    assert dtypes.times(x, 1) is x
    assert dtypes.times(x, 1.0) is x
    # What is not known to be 1 has to be multiplied by.
    assert not dtypes.is_one(tf.constant(1.0))


@pytest.mark.parametrize(
    "name, unit",
    [("float64", 2**-52), ("float16", 2**-10), ("bfloat16", 2**-7)],
)
def test_the_rounding_unit_is_the_step_from_one(name, unit):
    assert dtypes.rounding_unit(name) == unit
    dtype = tf.as_dtype(name)
    one = tf.ones([], dtype)
    assert one + tf.cast(unit, dtype) > one
    assert one + tf.cast(unit / 2, dtype) == one
