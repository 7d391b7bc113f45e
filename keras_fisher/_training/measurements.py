"""What steps have measured, as each tells it and as callbacks read it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Stands for what was not measured, in tensors: no trace and no penalty is
# below zero. NaN there would end programs under
# `tf.debugging.enable_check_numerics`.
NOT_MEASURED = -1.0


def is_something(value):
    """Whether a number was measured, or is NaN because it overflowed."""
    return ~(value < 0)


class Observed(NamedTuple):
    """What one step has to tell besides its logs.

    Attributes:
        traces: Tr(F) of each trainable variable; None if not measured.
        penalty: Value of the penalty; None if there is no fresh one.
        is_usable: Whether it could be used, it and its gradient being finite.
        batch_size: Number of examples, an `int64` scalar.
        ratio: ‖∇P‖ / ‖∇L‖ before the bound; None without one.
        alpha: α of this step; None without a penalty.
    """

    traces: tf.Tensor | None = None
    penalty: tf.Tensor | None = None
    is_usable: tf.Tensor | None = None
    batch_size: tf.Tensor | None = None
    ratio: tf.Tensor | None = None
    alpha: tf.Tensor | None = None

    def tensors(self, variables: int, dtype) -> dict[str, tf.Tensor]:
        """Fields of `Measurements`, of one shape and dtype for all steps.

        Args:
            variables: Number of trainable variables.
            dtype: Of what is measured.
        """
        nothing = tf.constant(NOT_MEASURED, dtype)
        traces, penalty, _, size, ratio, alpha = self
        return {
            "trace_by_variable": tf.fill([variables], nothing)
            if traces is None
            else tf.cast(traces, dtype),
            "penalty": nothing if penalty is None else tf.cast(penalty, dtype),
            "batch_size": tf.zeros([], tf.int64) if size is None else size,
            "ratio": nothing if ratio is None else tf.cast(ratio, dtype),
            "alpha": nothing if alpha is None else tf.cast(alpha, dtype),
        }


class Measurements(NamedTuple):
    """What the steps of the last call of the train function have measured.

    Attributes:
        step: Optimizer steps, counted from 0, of shape `(measured,)`: the
            number of updates that came before.
        trace_by_variable: Tr(F) of each trainable variable, of shape
            `(measured, variables)`; NaN where a step has measured none.
        penalty: Value of the penalty, of shape `(measured,)`; NaN where a
            step has measured Tr(F) alone.
        batch_size: Number of examples, of all replicas, of shape
            `(measured,)`.
        ratio: ‖∇P‖ / ‖∇L‖, of the gradients of penalty and loss before the
            bound, of shape `(measured,)`; NaN where a step has none.
        alpha: α of the penalty, of shape `(measured,)`; NaN without a penalty.
    """

    step: np.ndarray
    trace_by_variable: np.ndarray
    penalty: np.ndarray
    batch_size: np.ndarray
    ratio: np.ndarray
    alpha: np.ndarray

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Measurements:
        """From what `Observed.tensors` has made of steps."""
        return cls(
            **{
                key: np.where(is_something(values), values, np.nan)
                if key in ("trace_by_variable", "penalty", "ratio", "alpha")
                else values
                for key, values in tensors.items()
            }
        )


NOTHING_MEASURED = Measurements(
    np.zeros([0], np.int64),
    np.zeros([0, 0]),
    np.zeros([0]),
    np.zeros([0], np.int64),
    np.zeros([0]),
    np.zeros([0]),
)
