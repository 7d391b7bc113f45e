"""Linear functions whose derivatives are themselves, of any order.

For y = A x, the gradient of ⟨u, y⟩ at x is Aᵀu, and that of ⟨d, Aᵀu⟩ at u is
A d again. Of resizing, TensorFlow knows the first; the second it lacks, or
registers as not differentiable, which tapes take for zero. Of slices, XLA
lacks the second.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from keras_fisher._derivatives import custom_gradients


def linear(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable:
    """A linear function of a tensor, with derivatives of any order.

    Args:
        function: Linear, with a first derivative in TensorFlow.
    """

    @custom_gradients.custom_gradient
    def applied(x):
        def backward(above):
            return _transposed(x, above)

        return function(x), backward

    @custom_gradients.custom_gradient
    def _transposed(x, above):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            # Only its shape counts.
            at = tf.stop_gradient(x)
            tape.watch(at)
            y = function(at)
        result = tape.gradient(y, at, output_gradients=above)

        def backward(direction):
            return tf.zeros_like(x), applied(direction)

        return result, backward

    return applied


def resize(own: Callable) -> Callable:
    """`tf.image.resize`, linear in its images, with all its derivatives."""

    def resized(images, size, method="bilinear", *args, **kwargs):
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating:
            return own(images, size, method, *args, **kwargs)
        # In single precision TensorFlow computes it, and gives the result,
        # whatever it gets, unless pixels are only picked. Its gradients do not
        # always know.
        if method != tf.image.ResizeMethod.NEAREST_NEIGHBOR:
            images = tf.cast(images, tf.float32)
        return linear(lambda x: own(x, size, method, *args, **kwargs))(images)

    return resized


def slices(own: Callable) -> Callable:
    """`tf.slice`, linear in what it cuts from, with all its derivatives."""

    def sliced(input_, begin, size, name=None):
        x = tf.convert_to_tensor(input_)
        if not x.dtype.is_floating:
            return own(x, begin, size, name)
        return linear(lambda x: own(x, begin, size, name))(x)

    return sliced
