"""Functions whose intermediate values are computed again, not kept.

`tf.recompute_grad` has no second derivative. `checkpoint` has derivatives of
any order, since the backward pass of a checkpointed function is itself a
checkpointed function, of the inputs and of what comes from above:

    forward:             y = f(x)                   keeps x
    backward:            x̄ = (∂f/∂x)ᵀ ȳ             runs f again; keeps x, ȳ
    backward of that:    derivatives of x̄ in x, ȳ   runs both again

so that the gradient of a gradient norm keeps no intermediate values either.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_fisher._derivatives import custom_gradients
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import second_derivatives


def checkpoint(
    function: Callable[[list], tuple[list, Any]],
    tensors: Sequence[tf.Tensor],
    after: Sequence[tf.Tensor] = (),
) -> tuple[list, Any]:
    """Calls `function`, and again in each backward pass through it.

    Args:
        function: Takes and returns a list of tensors of floating point, and
            beside these anything else that it wants to tell. It has to compute
            the same each time, change nothing, and depend on no variable to
            differentiate by but `tensors`.
        tensors: Its arguments.
        after: Tensors that have to be known before `function` runs.

    Returns:
        Its outputs, and what else it returned in the first call.
    """
    if not tensors:
        return function([])
    told = []

    @custom_gradients.custom_gradient
    def keeping_nothing(*tensors):
        outputs, more = function(_apart(tensors, after))
        told.append(more)

        def backward(*upstream):
            return _backward(function, tensors, upstream)

        return outputs, backward

    return keeping_nothing(*tensors), told[0]


def _backward(function, tensors, upstream) -> list:
    """The derivatives at `tensors`, None where there are none."""
    count = len(tensors)

    def pull_back(both):
        sources, cotangents = both[:count], both[count:]
        with (
            # Below some name: layers called _this cannot stand at the top.
            tf.name_scope("recomputed"),
            tf.GradientTape(watch_accessed_variables=False) as tape,
            second_derivatives.exact(),
        ):
            tape.watch(sources)
            outputs, _ = function(sources)
        gradients = gradients_lib.vector_jacobian(
            tape, outputs, sources, cotangents
        )
        connected = [g is not None for g in gradients]
        return [g for g in gradients if g is not None], connected

    gradients, connected = checkpoint(
        pull_back, [*tensors, *upstream], after=upstream
    )
    gradients = iter(gradients)
    return [next(gradients) if found else None for found in connected]


def _apart(tensors, after) -> list:
    """The same values, of no tape, once those of `after` are known.

    Without the wait, TensorFlow would run the second computation beside the
    first and keep what they have in common.
    """
    if tf.executing_eagerly():
        return [tf.stop_gradient(tensor) for tensor in tensors]
    if after and second_derivatives.compiles():
        # XLA heeds data alone.
        known = _true_when_known(after)
        tensors = [tf.where(known, t, tf.zeros_like(t)) for t in tensors]
    with tf.control_dependencies(after):
        return [tf.stop_gradient(tensor) for tensor in tensors]


def _true_when_known(tensors) -> tf.Tensor:
    """True, which a compiler cannot tell before it knows the tensors."""
    first = [tf.reshape(tensor, [-1])[:1] for tensor in tensors]
    bits = [tf.cast(tf.reduce_max(value), tf.int32) for value in first]
    return tf.not_equal(tf.bitwise.bitwise_or(sum(bits), 1), 0)
