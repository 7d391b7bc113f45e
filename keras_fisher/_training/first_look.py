"""Shows the inputs of one step to a function on the host, before the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class FirstLook:
    """Looks at real inputs, once: no others are made up to try a model on.

    Args:
        look: Function of the inputs. What it raises ends the step before it
            changes anything; a graph tells of it by an error of TensorFlow's.
        is_needed: Function that says whether there is anything to look for,
            asked when a step is traced.
    """

    def __init__(
        self, look: Callable[[Any], None], is_needed: Callable[[], bool]
    ):
        self._function = look
        self._is_needed = is_needed
        self._is_done = False
        self._error: Exception | None = None

    def look(self, x: Any) -> None:
        """Looks at concrete inputs, unless that was done."""
        if self._is_done or not self._is_needed():
            return
        self._is_done = True
        try:
            self._function(x)
        except Exception as error:
            self._is_done = False  # Who goes on is told again.
            self._error = error
            raise

    def raise_error(self) -> None:
        """Raises what `look` has raised within a graph."""
        error, self._error = self._error, None
        if error is not None:
            raise error from None

    def step(self, number: Any, at: int | None, x: Any) -> list:
        """To be called in each step, before it; at one step it looks.

        Args:
            number: Of the step, a scalar tensor or variable.
            at: The step at which to look; None for none.
            x: The inputs of one replica.

        Returns:
            Operations that the step has to wait for.
        """
        if at is None or self._is_done or not self._is_needed():
            return []
        if tf.executing_eagerly():
            if int(number) == at:
                self.look(x)
            return []
        # A function on the host takes tensors of the dense kind alone.
        leaves = tf.nest.flatten(x, expand_composites=True)

        def look(*values):
            given = iter(values)
            flat = [None if leaf is None else next(given) for leaf in leaves]
            self.look(tf.nest.pack_sequence_as(x, flat, True))

        there = [leaf for leaf in leaves if leaf is not None]

        def looked():
            with tf.control_dependencies([tf.py_function(look, there, [])]):
                return tf.constant(True)

        return [tf.cond(number == at, looked, lambda: tf.constant(False))]
