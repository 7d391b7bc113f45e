"""The gradient of a loss, and that of a penalty which may not outweigh it.

    ∇L + min(1, c min(‖∇L‖, ‖ĝ‖) / ‖∇P‖) ∇P

with ĝ the gradient whose square the penalty is. The norms are over all
parameters and, as the optimizer's step is, over all replicas and all batches
whose gradients it accumulates. ‖∇L‖ keeps the penalty from undoing what the
loss does. ‖ĝ‖ lets go of a network whose outputs are constant: there Tr(F) is
nearly zero, and the loss leads out again.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale
from keras_fisher._derivatives.gradients import Gradients
from keras_fisher._training import replicas
from keras_fisher._training.guarded_gradient import added


@dataclasses.dataclass(frozen=True)
class Whole:
    """What goes into the norms: an optimizer step's, or a batch's part of it.

    Attributes:
        loss: ∇L, a dense tensor for each source, or None.
        penalty: ∇P, likewise.
        squared_norm: ‖ĝ‖²; None if there is none to go by.
        scale: The loss scale that ∇L and ∇P carry.
    """

    loss: Gradients
    penalty: Gradients
    squared_norm: tf.Tensor | None
    scale: float | tf.Tensor = 1.0

    @classmethod
    def of_replicas(cls, loss, penalty, squared_norm, scale) -> Whole:
        """From what each replica has, as `bounded_sum` takes it."""
        *sums, squared_norm = replicas.sums([*loss, *penalty, squared_norm])
        *penalty, squared_norm = (
            None if x is None else dtypes.times(x, 1 / replicas.number())
            for x in (*sums[len(loss) :], squared_norm)
        )
        return cls(sums[: len(loss)], penalty, squared_norm, scale)

    def shortening(self, bound: float) -> tuple[tf.Tensor, tf.Tensor]:
        """The factor on ∇P, and ‖∇P‖ / ‖∇L‖, which is 0 where ∇L is."""
        loss = gradients_lib.norm(self.loss, self.scale)
        penalty = gradients_lib.norm(self.penalty, self.scale)
        ratio = tf.math.divide_no_nan(penalty, tf.cast(loss, penalty.dtype))
        limit = longest(bound, self.squared_norm, penalty.dtype, loss)
        return shortening(penalty, limit), ratio


def longest(
    bound: float, squared_norm: tf.Tensor | None, dtype, *lengths: tf.Tensor
) -> tf.Tensor:
    """The longest that a penalty's gradient may be.

    Args:
        bound: c.
        squared_norm: ‖ĝ‖², or None.
        dtype: Of the result.
        *lengths: Others that it may not outweigh.
    """
    if squared_norm is not None:
        lengths = (*lengths, tf.sqrt(squared_norm))
    lengths = [tf.cast(length, dtype) for length in lengths]
    return bound * tf.reduce_min(tf.stack(lengths))


def shortening(length: tf.Tensor, limit: tf.Tensor) -> tf.Tensor:
    """The factor, at most 1, that makes a length at most its limit."""
    is_long = length > limit
    return tf.where(is_long, limit / tf.where(is_long, length, 1.0), 1.0)


def bounded_sum(
    loss: Gradients,
    penalty: Gradients,
    squared_norm: tf.Tensor | None,
    bound: float,
    scale: float | tf.Tensor = 1.0,
    accumulated: Accumulated | None = None,
) -> tuple[Gradients, tf.Tensor]:
    """What a replica hands to the optimizer, which adds up those of all.

    Args:
        loss: Gradients that add up to ∇L over replicas.
        penalty: Gradients whose mean over replicas is ∇P.
        squared_norm: A scalar whose mean over replicas is ‖ĝ‖²; or None.
        bound: c.
        scale: The loss scale that the gradients carry.
        accumulated: The batches of this step so far; None if it has one.

    Returns:
        The gradients, with the loss scale, and ‖∇P‖ / ‖∇L‖ before the bound.
    """
    loss = gradients_lib.dense(loss)
    whole = Whole.of_replicas(loss, penalty, squared_norm, scale)
    weight = 1.0
    if accumulated is not None:
        whole = accumulated.plus(whole)
        weight = dtypes.times(accumulated.weight, scale)
    factor, ratio = whole.shortening(bound)
    factor *= tf.cast(weight / replicas.number(), factor.dtype)
    handed = [
        None if p is None else tf.cast(p, p.dtype if g is None else g.dtype)
        for g, p in zip(loss, whole.penalty)
    ]
    return added(loss, handed, factor), ratio


class Accumulated:
    """The batches of an optimizer step so far.

    The penalty of all of them goes to the optimizer with the last, since only
    then its bound is known.

    Args:
        loss: Variables for the mean of ∇L, one for each source.
        penalty: Variables for that of ∇P.
        squared_norm: A variable for that of ‖ĝ‖².
        steps: Number of batches that make up a step.
        is_last: Whether the batch to come is the last of them.
    """

    def __init__(
        self,
        loss: Sequence,
        penalty: Sequence,
        squared_norm: tf.Variable,
        steps: int,
        is_last: tf.Tensor,
    ):
        self._variables = [*loss, *penalty, squared_norm]
        self._steps = steps
        self._is_last = is_last

    @property
    def weight(self) -> tf.Tensor:
        """The factor on ∇P: the optimizer takes a mean over the batches."""
        return tf.where(self._is_last, float(self._steps), 0.0)

    def plus(self, batch: Whole) -> Whole:
        """The mean, with that of the batches before; kept for the next one."""
        old = [tf.convert_to_tensor(v) for v in self._variables]
        scales = [batch.scale] * (len(old) - 1) + [1.0]
        added_to_them = [
            None
            if x is None
            else loss_scale.unscaled(tf.cast(x, o.dtype), s * self._steps)
            for o, x, s in zip(
                old,
                [*batch.loss, *batch.penalty, batch.squared_norm],
                scales,
            )
        ]
        new = added(old, added_to_them, 1.0)
        # The optimizer skips a batch that is not finite, and so do we.
        is_kept = gradients_lib.has_finite_norm(added_to_them)
        for variable, o, n in zip(self._variables, old, new):
            next_one = tf.where(self._is_last, tf.zeros_like(n), n)
            variable.assign(tf.where(is_kept, next_one, o))
        *gradients, squared_norm = new
        count = len(batch.loss)
        return Whole(
            gradients[:count],
            gradients[count:],
            None if batch.squared_norm is None else squared_norm,
        )
