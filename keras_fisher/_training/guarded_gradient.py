"""The gradient of a penalty, kept from the weights where it is not finite.

A penalty can overflow where the loss does not: its gradient is of second
order. One guard stands between it and all that it goes to, for `FisherModel`
and `FisherRegularization` alike: differentiate, check, replace, store.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives.gradients import Gradients
from keras_fisher._training import replicas


@dataclasses.dataclass(frozen=True)
class GuardedGradient:
    """A gradient with a penalty in it, and whether it may be used.

    Attributes:
        gradients: As computed: a dense tensor for each source, or None.
        is_usable: Boolean scalar: whether the value of the penalty and the
            squared norm of the gradients are finite.
        scale: The loss scale that the gradients carry.
    """

    gradients: Gradients
    is_usable: tf.Tensor
    scale: float | tf.Tensor

    def for_optimizer(
        self, loss: tf.Tensor, skips_steps: bool
    ) -> tuple[Gradients, tf.Tensor]:
        """What goes to the optimizer, and the loss that goes to the logs.

        Where it cannot be used, an optimizer that skips steps is given NaN;
        others get zeros, and the loss becomes NaN. A loss that is not finite
        itself is left to Keras.

        Args:
            loss: Scalar or vector.
            skips_steps: Whether the optimizer skips steps with gradients that
                are not finite.
        """
        if skips_steps:
            # For all replicas, by the gradients of the first.
            is_kept = replicas.on_all_replicas(self.is_usable)
            return self.where(is_kept, not_a_number=True), loss
        is_kept = self.is_usable | ~tf.reduce_all(tf.math.is_finite(loss))
        return self.where(is_kept), loss + dtypes.zero_if(is_kept, loss.dtype)

    def where(
        self, condition: tf.Tensor, not_a_number: bool = False
    ) -> Gradients:
        """The gradients if the condition holds, else zeros or NaN."""

        def otherwise(dtype):
            if not_a_number:
                return dtypes.zero_if(condition, dtype)
            return tf.zeros([], dtype)

        return self._each(lambda g: tf.where(condition, g, otherwise(g.dtype)))

    def unscaled(self) -> GuardedGradient:
        """Without a scale, in single precision or better."""
        gradients = self._each(
            lambda g: loss_scale.unscaled(dtypes.precise(g), self.scale)
        )
        return dataclasses.replace(self, gradients=gradients, scale=1.0)

    def times(self, factor: tf.Tensor) -> GuardedGradient:
        """The gradients times a factor."""
        scaled = self._each(lambda g: dtypes.times(g, factor))
        return dataclasses.replace(self, gradients=scaled)

    def _each(self, function: Callable) -> Gradients:
        return [None if g is None else function(g) for g in self.gradients]

    def store(self, variables: Sequence) -> None:
        """Stores the gradients without their scale; zeros for unusable ones.

        Args:
            variables: One for each source.
        """
        for variable, gradient in zip(variables, self.where(self.is_usable)):
            if gradient is None:
                gradient = tf.zeros(variable.shape, variable.dtype)
            variable.assign(loss_scale.unscaled(gradient, self.scale))


def guarded_gradient(
    tape: tf.GradientTape,
    objective: tf.Tensor,
    sources: Sequence,
    penalty: tf.Tensor,
    scale: float | tf.Tensor = 1.0,
) -> GuardedGradient:
    """Differentiates a penalty, or a sum that it is in.

    Args:
        tape: Has recorded the objective.
        objective: Scalar that is differentiated.
        sources: What to differentiate by.
        penalty: The value of the penalty.
        scale: The loss scale in the objective, which does not count where the
            gradients are checked.

    Raises:
        ValueError: If a layer has no second derivative.
    """
    with second_derivatives.explained():
        gradients = tape.gradient(objective, sources)
    gradients = gradients_lib.dense(gradients)
    is_usable = tf.math.is_finite(penalty) & gradients_lib.has_finite_norm(
        gradients, scale
    )
    return GuardedGradient(gradients, is_usable, scale)
