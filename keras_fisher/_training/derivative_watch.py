"""Looks at second derivatives that nobody knows, before they are first used."""

from __future__ import annotations

from typing import Any
import warnings

import keras
import tensorflow as tf

from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import derivative_check

_EXAMPLES = 4


class DerivativeWatch:
    """Compares, once, the layers of a network that are not in the catalogue.

    Args:
        network: The wrapped model, built.
    """

    def __init__(self, network: keras.Model):
        self._network = network
        self._is_done = False

    def step(self, number: tf.Tensor, at: int | None, x: Any) -> list:
        """To be called in each step, before it; at one step it looks.

        Args:
            number: Of the step.
            at: The step at which to look; None for none.
            x: The inputs of one replica.

        Returns:
            Operations that the step has to wait for.
        """
        leaves = keras.tree.flatten(x)
        is_wanted = at is not None and not self._is_done
        if (
            not is_wanted
            or not all(map(tf.is_tensor, leaves))
            or not catalogue.unknown(self._network)
        ):
            return []
        few = [leaf[:_EXAMPLES] for leaf in leaves]

        def look(*leaves):
            self._look(keras.tree.pack_sequence_as(x, leaves))

        if tf.executing_eagerly():
            if int(number) == at:
                look(*few)
            return []

        def looked():
            with tf.control_dependencies([tf.py_function(look, few, [])]):
                return tf.constant(True)

        return [tf.cond(number == at, looked, lambda: tf.constant(False))]

    def _look(self, x: Any) -> None:
        if self._is_done:
            return
        self._is_done = True
        network = self._network
        found = derivative_check.check(network, x, catalogue.unknown(network))
        wrong = [str(each) for each in found if each.verdict == "differs"]
        if wrong:
            warnings.warn(
                "Second derivatives of some layers, as backpropagation gives "
                "them, are not those that differences of the first ones give: "
                f"{'; '.join(wrong)}. The gradient of the penalty is wrong by "
                "as much. A `tf.custom_gradient` needs a gradient that can be "
                "differentiated itself; what stops gradients on purpose "
                "counts as constant. Give the penalty "
                '`method="finite_difference"`, which goes by first '
                "derivatives alone, or see `keras_fisher.check_derivatives`.",
                UserWarning,
                stacklevel=2,
            )
