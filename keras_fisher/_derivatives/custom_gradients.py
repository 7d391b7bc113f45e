"""Custom gradients that stand in loops, branches and functions as well.

TensorFlow hands a custom gradient the tensors that it was called with. Within
the graph of a loop, a branch or a function these may be of the graph around,
which the gradient of that graph cannot reach: it fails, or fails when it is
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


def custom_gradient(function: Callable) -> Callable:
    """As `tf.custom_gradient`, for functions of tensors, in any graph.

    What `function` and its gradient are given is of the graph that each of
    them is called in.
    """
    own = tf.custom_gradient(function)
    return lambda *tensors: own(*map(tf.identity, tensors))
