"""α: a number that may be changed at any time, or a function of the step."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks

_ALLOWED = (
    "a finite number of at least 0, a `keras.optimizers.schedules."
    "LearningRateSchedule`, or a scalar `keras.Variable`"
)


class Alpha:
    """The strength of a penalty, as a step reads it.

    A number becomes a variable as soon as something is traced with it, so
    that a later one takes effect at the next step. It has the precision of a
    Python float, and takes that of the penalty where it is used.

    Args:
        value: A number, a schedule of the optimizer step, or a variable.
    """

    def __init__(self, value: Any):
        self._schedule = self._variable = self._number = None
        self.moves: bool = True  # whether it is or was anything but one number
        if isinstance(value, LearningRateSchedule):
            self._schedule = value
        elif isinstance(value, keras.Variable) and value.shape == ():
            self._variable = value
            if not tf.inside_function():
                _checked(self._current())
        else:
            self._number = _checked(value)
            self.moves = False
        self._is_given = self._variable is not None
        # One that is made as a step is traced lives no longer than that.
        self._is_constant = tf.inside_function()

    @property
    def value(self) -> float | LearningRateSchedule | keras.Variable:
        """What was given, or the number that it now is."""
        if self._schedule is not None:
            return self._schedule
        return self._variable if self._is_given else self._current()

    def assign(self, value: Any) -> None:
        """Takes another number, from the next step on.

        Raises:
            ValueError: If it is none, or a schedule decides on α.
        """
        if self._schedule is not None or isinstance(
            value, (LearningRateSchedule, keras.Variable)
        ):
            raise ValueError(
                "α is a number, a schedule or a variable for as long as its "
                "penalty lives. A number can be assigned to a number or a "
                "variable, and nothing to a schedule. Received: "
                f"alpha={value!r}, where it was {self.value!r}. Give the model "
                "another penalty: "
                "`model.penalty = FisherPenalty(alpha=...)`."
            )
        number = _checked(value)
        if self._is_constant:
            raise ValueError(
                "A step was traced with this α as a constant, in a loop of "
                "your own on replicas or with a penalty that is made within "
                "the step. Make the penalty outside of it, with "
                "`alpha=keras.Variable(..., trainable=False)`, and assign that."
            )
        self.moves = True
        if self._variable is None:
            self._number = number
        else:
            self._variable.assign(number)

    def at(self, step: int | tf.Tensor | None) -> float | tf.Tensor:
        """α at an optimizer step, which only a schedule has to know."""
        if self._schedule is not None:
            if step is None:
                raise ValueError(
                    "α follows a schedule, so the penalty has to know the "
                    "optimizer step. Pass `step=optimizer.iterations`."
                )
            return self._schedule(tf.convert_to_tensor(step))
        if self._variable is None:
            if tf.executing_eagerly():
                return self._number
            # No replica makes a variable while the others do not.
            self._is_constant |= tf.distribute.has_strategy()
            if self._is_constant:
                return self._number
        return tf.convert_to_tensor(self.variable())

    def variable(self) -> keras.Variable | None:
        """Where the number is, to be saved with a model; None if scheduled."""
        if self._schedule is None and self._variable is None:
            with tf.init_scope():
                self._variable = keras.Variable(
                    np.float64(self._number),
                    dtype="float64",
                    trainable=False,
                    autocast=False,
                    # All replicas assign the same.
                    aggregation="only_first_replica",
                    name="fisher_alpha",
                )
        return self._variable

    def config(self) -> float | dict[str, Any]:
        """What `Alpha(...)` takes again, as JSON can hold it."""
        if self._schedule is not None:
            return keras.saving.serialize_keras_object(self._schedule)
        return self._current()

    @classmethod
    def of_config(cls, config: Any) -> Alpha:
        if isinstance(config, dict):
            config = keras.saving.deserialize_keras_object(config)
        return cls(config)

    def __reduce__(self) -> tuple[Any, ...]:
        # Variables cannot be pickled; a copy has one of its own.
        return Alpha.of_config, (self.config(),)

    def _current(self) -> float:
        if self._variable is None:
            return self._number
        with tf.init_scope():
            return float(keras.ops.convert_to_numpy(self._variable))


def _checked(value: Any) -> float:
    return checks.number(
        "alpha", value, lambda alpha: 0 <= alpha < math.inf, _ALLOWED
    )
