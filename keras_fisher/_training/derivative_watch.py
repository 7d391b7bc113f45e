"""Looks at second derivatives that nobody knows, before they are first used."""

from __future__ import annotations

from typing import Any
import warnings

import keras
import tensorflow as tf

from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import derivative_check
from keras_fisher._training.first_look import FirstLook

_EXAMPLES = 4


def of(network: keras.Model) -> FirstLook:
    """Compares, once, the layers of a network that are not in the catalogue.

    Args:
        network: The wrapped model, built when it is looked at.
    """
    return FirstLook(
        lambda x: _look(network, x), lambda: bool(catalogue.unknown(network))
    )


def _look(network: keras.Model, x: Any) -> None:
    if not all(map(tf.is_tensor, keras.tree.flatten(x))):
        return
    unknown = catalogue.unknown(network)
    try:
        found = derivative_check.check(
            network, x, unknown, examples=_EXAMPLES, repeats=False
        )
    except Exception:  # Layers may run in graphs alone, and nothing is known.
        return
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
            "derivatives alone (for smooth models, and others in `float64`), "
            "or see `keras_fisher.check_derivatives`.",
            UserWarning,
            stacklevel=2,
        )
