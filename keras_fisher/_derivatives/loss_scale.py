"""Loss scales, which keep backward passes in 16 bits from vanishing.

A backward pass is linear in the cotangent that it starts from: scaled up at
its start and down at its end, it loses nothing to underflow. One rule gives
the scale wherever a pass starts: what fits the cotangent (`fitting`). The step
of a `FisherModel` alone goes by another one, that of its optimizer
(`optimizer.scale_loss`): all passes of a step have to overflow together, so
that the optimizer sees it, skips the step and lowers its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import tensorflow as tf

from keras_fisher._common import dtypes

# Of a 16-bit gradient: far from the largest number, and from the smallest.
_LARGEST_SCALED = 256.0


def fitting(
    cotangents: Sequence[tf.Tensor], compute_dtype
) -> float | tf.Tensor:
    """The loss scale for a backward pass.

    Args:
        cotangents: Where it starts, in 32 bits or more.
        compute_dtype: The dtype of the layers it goes through.

    Returns:
        A power of two, with no gradient; 1.0 for all but 16 bits.
    """
    if tf.as_dtype(compute_dtype).size >= 4:
        return 1.0
    largest = tf.stack(
        [tf.cast(tf.reduce_max(tf.abs(c)), tf.float32) for c in cotangents]
    )
    largest = tf.stop_gradient(tf.maximum(tf.reduce_max(largest), 1e-6))
    power = tf.math.log(_LARGEST_SCALED / largest) / math.log(2.0)
    return tf.pow(2.0, tf.floor(power))


def unscaled(x: tf.Tensor, scale: float | tf.Tensor) -> tf.Tensor:
    """X without the scale that it carries, in its own dtype."""
    if tf.is_tensor(scale):
        scale = tf.cast(scale, dtypes.at_least_single(x.dtype))
    return dtypes.times(x, 1.0 / scale)
