"""The gradient of a loss, and that of a penalty which may not outweigh it.

    ∇L + min(1, c min(‖∇L‖, m) / ‖∇P‖) ∇P

with m the mean of ‖∇L‖ over the last hundred steps or so. The norms are over
all parameters and, as the optimizer's step is, over all replicas and all
batches whose gradients it accumulates. ‖∇L‖ keeps the penalty from undoing what
the loss does. m keeps a step at which the loss is steep, as happens with large
learning rates, from being followed by as large a step of the penalty: of that
networks die. c itself grows over the first steps (`Penalty.bound_at`).
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
from keras_fisher._training.measurements import is_something

_RATE = 0.01  # at which the mean of ‖∇L‖ follows it


@dataclasses.dataclass(frozen=True)
class Whole:
    """What goes into the norms: an optimizer step's, or a batch's part of it.

    Attributes:
        loss: ∇L, a dense tensor for each source, or None.
        penalty: ∇P, likewise.
        scale: The loss scale that both carry.
    """

    loss: Gradients
    penalty: Gradients
    scale: float | tf.Tensor = 1.0

    @classmethod
    def of_replicas(cls, loss, penalty, scale) -> Whole:
        """From what each replica has, as `bounded_sum` takes it."""
        sums = replicas.sums([*loss, *penalty])
        penalty = [
            None if x is None else dtypes.times(x, 1 / replicas.number())
            for x in sums[len(loss) :]
        ]
        return cls(sums[: len(loss)], penalty, scale)

    def norms(self) -> tuple[tf.Tensor, tf.Tensor]:
        """‖∇L‖ and ‖∇P‖."""
        loss = gradients_lib.norm(self.loss, self.scale)
        penalty = gradients_lib.norm(self.penalty, self.scale)
        return tf.cast(loss, penalty.dtype), penalty


def shortening(length: tf.Tensor, limit: tf.Tensor) -> tf.Tensor:
    """The factor, at most 1, that makes a length at most its limit."""
    is_long = length > limit
    return tf.where(is_long, limit / tf.where(is_long, length, 1.0), 1.0)


def followed(mean, norm: tf.Tensor, is_step: bool | tf.Tensor) -> tf.Tensor:
    """The mean of a norm over steps, with that of another one.

    Args:
        mean: A variable for it, negative before the first step; changed.
        norm: Of the step. One that is not finite is left out.
        is_step: Whether there is a step.

    Returns:
        The mean; 0 if no norm was finite.
    """
    old = tf.convert_to_tensor(mean)
    norm = tf.cast(norm, old.dtype)
    new = tf.where(is_something(old), old + _RATE * (norm - old), norm)
    new = tf.where(tf.math.is_finite(norm), new, old)
    mean.assign(tf.where(is_step, new, old))
    return tf.maximum(new, 0.0)


def bounded_sum(
    loss: Gradients,
    penalty: Gradients,
    mean,
    bound: float | tf.Tensor,
    scale: float | tf.Tensor = 1.0,
    accumulated: Accumulated | None = None,
) -> tuple[Gradients, tf.Tensor]:
    """What a replica hands to the optimizer, which adds up those of all.

    Args:
        loss: Gradients that add up to ∇L over replicas.
        penalty: Gradients whose mean over replicas is ∇P.
        mean: A variable for the mean of ‖∇L‖, negative if there is none yet.
        bound: c.
        scale: The loss scale that the gradients carry.
        accumulated: The batches of this step so far; None if it has one.

    Returns:
        The gradients, with the loss scale, and ‖∇P‖ / ‖∇L‖ before the bound,
        which is 0 where ‖∇L‖ is.
    """
    loss = gradients_lib.dense(loss)
    whole = Whole.of_replicas(loss, penalty, scale)
    weight, is_step = 1.0, True
    if accumulated is not None:
        whole = accumulated.plus(whole)
        weight = dtypes.times(accumulated.weight, scale)
        is_step = accumulated.is_last
    of_loss, of_penalty = whole.norms()
    typical = tf.cast(followed(mean, of_loss, is_step), of_loss.dtype)
    limit = tf.cast(bound, of_loss.dtype) * tf.minimum(of_loss, typical)
    factor = shortening(of_penalty, limit)
    factor *= tf.cast(weight / replicas.number(), factor.dtype)
    handed = [
        None if p is None else tf.cast(p, p.dtype if g is None else g.dtype)
        for g, p in zip(loss, whole.penalty)
    ]
    ratio = tf.math.divide_no_nan(of_penalty, of_loss)
    return gradients_lib.added(loss, handed, factor), ratio


class Accumulated:
    """The batches of an optimizer step so far.

    The penalty of all of them goes to the optimizer with the last, since only
    then its bound is known.

    Args:
        loss: Variables for the mean of ∇L, one for each source.
        penalty: Variables for that of ∇P.
        steps: Number of batches that make up a step.
        is_last: Whether the batch to come is the last of them.
    """

    def __init__(
        self,
        loss: Sequence,
        penalty: Sequence,
        steps: int,
        is_last: tf.Tensor,
    ):
        self._variables = [*loss, *penalty]
        self._steps = steps
        self.is_last = is_last

    @property
    def weight(self) -> tf.Tensor:
        """The factor on ∇P: the optimizer takes a mean over the batches."""
        return tf.where(self.is_last, float(self._steps), 0.0)

    def plus(self, batch: Whole) -> Whole:
        """The mean, with that of the batches before; kept for the next one."""
        old = [tf.convert_to_tensor(v) for v in self._variables]
        added_to_them = [
            None
            if x is None
            else loss_scale.unscaled(
                tf.cast(x, o.dtype), batch.scale * self._steps
            )
            for o, x in zip(old, [*batch.loss, *batch.penalty])
        ]
        new = gradients_lib.added(old, added_to_them, 1.0)
        # The optimizer skips a batch that is not finite, and so do we.
        is_kept = gradients_lib.has_finite_norm(added_to_them)
        for variable, o, n in zip(self._variables, old, new):
            next_one = tf.where(self.is_last, tf.zeros_like(n), n)
            variable.assign(tf.where(is_kept, next_one, o))
        count = len(batch.loss)
        return Whole(new[:count], new[count:])
