"""Loss scales, which keep backward passes in 16 bits from vanishing.

A backward pass is linear in the cotangent that it starts from: scaled up at
its start and down at its end, it loses nothing to underflow. One rule gives
the scale wherever a first pass starts: what fits the cotangent (`fitting`);
and one that of the pass through it (`of_square`). The step of a `FisherModel`
alone goes by another one, that of its optimizer (`optimizer.scale_loss`): all
passes of a step have to overflow together, so that the optimizer sees it, skips
the step and lowers its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import tensorflow as tf

from keras_fisher._common import dtypes

# Of scaled cotangents, all together. A weight's gradient is a sum of as many
# products with activations; as the labels are drawn, their signs are, and the
# sum is about as large as this times an activation. That leaves room for
# activations in the thousands below the largest number in `float16`, and for
# gradients of 1e-5 of it above the smallest.
_LENGTH = 16.0

# Below it a length counts as this.
_TINY = 1e-25


def is_used(compute_dtype) -> bool:
    """Whether layers that compute in a dtype want a scale: in 16 bits."""
    return tf.as_dtype(compute_dtype).size < 4


def fitting(
    cotangents: Sequence[tf.Tensor], compute_dtype, by_example: bool = False
) -> float | tf.Tensor:
    """The loss scale for a backward pass.

    Args:
        cotangents: Where it starts, in 32 bits or more.
        compute_dtype: The dtype of the layers it goes through.
        by_example: Whether gradients are summed over positions of each example
            alone, and not over examples, the first axis.

    Returns:
        A power of two, with no gradient; 1.0 for all but 16 bits.
    """
    if not is_used(compute_dtype):
        return 1.0
    squares = tf.add_n([_squares(c, by_example) for c in cotangents])
    length = tf.sqrt(tf.reduce_max(squares))
    return _power_of_two(_LENGTH / tf.maximum(length, 1e-6))


def _squares(cotangent: tf.Tensor, by_example: bool) -> tf.Tensor:
    squares = tf.square(tf.cast(cotangent, tf.float32))
    first = 1 if by_example else 0
    return tf.reduce_sum(squares, axis=[*range(first, len(squares.shape))])


def of_square(
    scale: float | tf.Tensor,
    factor: float | tf.Tensor,
    squared_norm: tf.Tensor,
    examples: int | tf.Tensor,
) -> float | tf.Tensor:
    """The loss scale for the backward pass of f ‖ĝ‖².

    It goes through the one that gave ĝ: from 2 f ĝ / S, with S the scale of
    that. Here the length of it becomes 1, and less where examples have large
    gradients, of the length √B ‖ĝ‖: with these, outputs move fast along ĝ.

    Args:
        scale: S, as from `fitting`.
        factor: f.
        squared_norm: ‖ĝ‖².
        examples: B, of which ĝ is the mean.

    Returns:
        A power of two, with no gradient; 1.0 if that is S.
    """
    if dtypes.is_one(scale):
        return 1.0
    scale, factor, square, examples = (
        tf.cast(x, tf.float32) for x in (scale, factor, squared_norm, examples)
    )
    length = 2.0 * factor * tf.sqrt(square)
    length *= tf.maximum(1.0, tf.sqrt(examples * square))
    return _power_of_two(scale / tf.maximum(length, _TINY))


def _power_of_two(x: tf.Tensor) -> tf.Tensor:
    """The next smaller one."""
    power = tf.math.log(tf.stop_gradient(x)) / math.log(2.0)
    return tf.pow(2.0, tf.floor(power))


def unscaled(x: tf.Tensor, scale: float | tf.Tensor) -> tf.Tensor:
    """X without the scale that it carries, in its own dtype."""
    if tf.is_tensor(scale):
        scale = tf.cast(scale, dtypes.at_least_single(x.dtype))
    return dtypes.times(x, 1.0 / scale)
