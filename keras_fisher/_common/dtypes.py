"""Which precision things are computed in."""

from __future__ import annotations

import tensorflow as tf


def at_least_single(dtype) -> tf.DType:
    """A dtype of floating point, or single precision if that has 16 bits."""
    dtype = tf.as_dtype(dtype)
    return dtype if dtype.size >= 4 else tf.float32


def precise(x) -> tf.Tensor:
    """A tensor in at least single precision."""
    return tf.cast(x, at_least_single(x.dtype))
