"""Which precision things are computed in, and factors in it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# NumPy does not know these.
_DIGITS = {"bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}


def at_least_single(dtype) -> tf.DType:
    """A dtype of floating point, or single precision if that has 16 bits."""
    dtype = tf.as_dtype(dtype)
    return dtype if dtype.size >= 4 else tf.float32


def rounding_unit(dtype) -> float:
    """The distance of 1 to the next larger number of a dtype."""
    dtype = tf.as_dtype(dtype)
    if dtype.name in _DIGITS:
        return 2.0 ** -_DIGITS[dtype.name]
    return float(np.finfo(dtype.as_numpy_dtype).eps)


def precise(x) -> tf.Tensor:
    """A tensor in at least single precision."""
    return tf.cast(x, at_least_single(x.dtype))


def times(x: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """A tensor times a factor, in its dtype; itself if the factor is 1.

    The product is of single precision or better: a loss scale of 65,536 is
    infinite in `float16`.
    """
    if is_one(factor):
        return x
    dtype = at_least_single(x.dtype)
    # Not by a cast, which would round a number to single precision first.
    is_tensor = tf.is_tensor(factor)
    factor = tf.cast(factor, dtype) if is_tensor else tf.constant(factor, dtype)
    return tf.cast(tf.cast(x, dtype) * factor, x.dtype)


def zero_if(condition: tf.Tensor, dtype) -> tf.Tensor:
    """0 where a condition holds, else NaN.

    A constant of NaN would end a program under
    `tf.debugging.enable_check_numerics` even where it is not chosen.
    """
    return tf.sqrt(tf.cast(condition, dtype) - 1.0)


def is_one(factor: float | tf.Tensor) -> bool:
    """Whether a factor is known to be 1, so that it may be left out."""
    return not tf.is_tensor(factor) and factor == 1
