"""Derivatives on tapes: squared norms, micro-batches, finite differences.

Everything here works on tensors, tapes and functions; no model, likelihood
or penalty is known.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._derivatives import custom_gradients
from keras_fisher._derivatives import loss_scale

# XLA's convolutions on CPUs are much slower in a loop.
_MOST_UNROLLED = 8

Gradients = list  # of tensors, None where a source is not connected


def vector_jacobian(
    tape: tf.GradientTape,
    outputs: tf.Tensor | list[tf.Tensor],
    sources: Sequence,
    cotangent: tf.Tensor | list[tf.Tensor],
) -> Gradients:
    """The gradient of ⟨cotangent, outputs⟩, itself differentiable.

    Args:
        tape: A persistent tape that has watched `sources` and recorded
            `outputs`.
        outputs: Tensor of any shape, or a list of them.
        sources: Variables or tensors.
        cotangent: Tensor of the shape and dtype of `outputs`, or a list.

    Returns:
        A list with a dense tensor for each source, or None for a source that
        the outputs do not depend on.
    """
    return dense(tape.gradient(outputs, sources, output_gradients=cotangent))


def dense(gradients: Gradients) -> Gradients:
    """Gradients as tensors; None stays.

    An embedding's gradient repeats rows, which add up before the square.
    """
    return [
        tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g
        for g in gradients
    ]


def squared_norms(gradients: Gradients, scale=1.0) -> tf.Tensor:
    """‖g/scale‖² of each gradient, in single precision or better.

    Args:
        gradients: Tensors of any shapes; None counts as zero.
        scale: The loss scale that the gradients carry. It is taken out before
            the square, which would overflow with it.

    Returns:
        Tensor of shape `(len(gradients),)`.
    """
    dtype = common_dtype(gradients)
    return tf.stack([_squared_norm(g, dtype, scale) for g in gradients])


def _squared_norm(gradient: tf.Tensor | None, dtype, scale) -> tf.Tensor:
    if gradient is None:
        return tf.zeros([], dtype)
    # Never a square root: its derivative at zero is infinite.
    gradient = loss_scale.unscaled(tf.cast(gradient, dtype), scale)
    return tf.reduce_sum(tf.square(gradient))


def squared_norms_alone(
    gradients: Gradients, differentiable: Sequence[bool], scale=1.0
) -> tf.Tensor:
    """`squared_norms` of gradients that nothing else is computed from.

    That of a dense layer's kernel is a product over the n examples,
    g = Σ_i x_i δ_iᵀ, so that

        ‖g‖² = Σ_ij (x_i · x_j) (δ_i · δ_j).

    With its derivative, that takes 2 n² (d + k) multiplications for a kernel
    of d by k weights, and ‖g‖² from g takes 3 n d k. Where these are more, g
    is never computed. Shapes have to be known when a graph is traced.

    Args:
        gradients: As for `squared_norms`.
        differentiable: Of which of them the squared norm has a derivative.
        scale: As for `squared_norms`.

    Returns:
        Tensor of shape `(len(gradients),)`.
    """
    dtype = common_dtype(gradients)
    norms = []
    for gradient, is_differentiable in zip(gradients, differentiable):
        factors = _factors(gradient)
        if factors is None:
            norm = _squared_norm(gradient, dtype, scale)
        else:
            x, above = (tf.cast(factor, dtype) for factor in factors)
            above = loss_scale.unscaled(above, scale)
            norm = _norm_of_product(x, above)
        # A derivative times zero is not zero if it is infinite.
        norms.append(norm if is_differentiable else tf.stop_gradient(norm))
    return tf.stack(norms)


def _factors(gradient: tf.Tensor | None) -> tuple | None:
    """The x and δ of a gradient xᵀδ, if its norm is cheaper from these."""
    if gradient is None or tf.executing_eagerly():
        return None
    operation = gradient.op
    if not (
        operation.type == "MatMul"
        and operation.get_attr("transpose_a")
        and not operation.get_attr("transpose_b")
        and gradient.dtype in (tf.float32, tf.float64)
    ):
        return None
    x, above = operation.inputs
    n, d, k = x.shape[0], *gradient.shape
    if None in (n, d, k) or 2 * n * (d + k) >= 3 * d * k:
        return None
    return x, above


@custom_gradients.custom_gradient
def _norm_of_product(x: tf.Tensor, above: tf.Tensor):
    """‖xᵀδ‖², with the products that the derivative shares."""
    of_x = tf.matmul(x, x, transpose_b=True)
    of_above = tf.matmul(above, above, transpose_b=True)

    def backward(upstream):
        return (
            2 * upstream * tf.matmul(of_above, x),
            2 * upstream * tf.matmul(of_x, above),
        )

    # Where the contributions of examples cancel, rounding may leave less.
    return tf.maximum(tf.reduce_sum(of_x * of_above), 0), backward


def added(a: Gradients, b: Gradients, factor: float | tf.Tensor) -> Gradients:
    """A + factor b, for gradients of the same sources; None is zero."""
    return [
        x
        if y is None
        else _plus(x, dtypes.times(tf.convert_to_tensor(y), factor))
        for x, y in zip(a, b)
    ]


def _plus(x, y: tf.Tensor) -> tf.Tensor:
    return y if x is None else tf.convert_to_tensor(x) + y


def norm(gradients: Gradients, scale=1.0) -> tf.Tensor:
    """The length of all gradients together, of the dtype of their squares."""
    return tf.sqrt(tf.reduce_sum(squared_norms(gradients, scale)))


def has_finite_norm(gradients: Gradients, scale=1.0) -> tf.Tensor:
    """Whether the squared norm of all gradients is finite; None is zero.

    It is not if there is a NaN or an infinity, nor if gradients are so large
    that their squares overflow, of which optimizers make NaN
    (`global_clipnorm`) or a variable that stands still for good (`Adam`).

    Args:
        gradients: Tensors of any shapes, or None.
        scale: The loss scale that they carry, which does not count.
    """
    dtype = common_dtype(gradients)
    halves = [
        tf.nn.l2_loss(loss_scale.unscaled(tf.cast(g, dtype), scale))
        for g in gradients
        if g is not None
    ]
    return tf.math.is_finite(2.0 * tf.add_n(halves)) if halves else True


def common_dtype(gradients: Gradients) -> tf.DType:
    """Double precision if any is in it, else single precision."""
    if any(g is not None and g.dtype == tf.float64 for g in gradients):
        return tf.float64
    return tf.float32


def sum_over_micro_batches(
    function: Callable[[tf.Tensor, tf.Tensor], list],
    size: int | tf.Tensor,
    micro_batch_size: int | None,
    dtype,
) -> list:
    """Adds up `function` over consecutive micro-batches.

    Args:
        function: Takes the weights of the examples, of shape `(size,)` (1/b
            in a micro-batch of b examples and 0 outside of it), and b;
            returns a list of tensors whose shapes and dtypes are always the
            same.
        size: Number of examples.
        micro_batch_size: Examples in each micro-batch but the last, which
            takes what is left; None for a single one.
        dtype: Dtype of the weights and of b.

    Returns:
        The sums, as a list.
    """
    if micro_batch_size is None:
        count = tf.cast(size, dtype)
        return function(tf.fill([size], 1.0 / count), count)

    positions = tf.range(size)

    def micro_batch(begin):
        end = tf.minimum(begin + micro_batch_size, size)
        count = tf.cast(end - begin, dtype)
        inside = (positions >= begin) & (positions < end)
        return function(tf.cast(inside, dtype) / count, count)

    sums = micro_batch(0)
    if tf.is_tensor(size):
        step = micro_batch_size
        return _loop(micro_batch, step, size, step, sums)
    for begin in range(micro_batch_size, size, micro_batch_size):
        sums = _add(sums, micro_batch(begin))
    return sums


def sum_over_parts(
    function: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], list],
    size: int | tf.Tensor,
    part_size: int | tf.Tensor,
    dtype,
    zeros: list,
) -> list:
    """Adds up `function` over consecutive micro-batches, each by itself.

    All parts are of one size, as XLA wants it: the last one may begin with
    examples of that before, to which it gives no weight.

    Args:
        function: Takes the position of the first example of a part, the
            weights of its examples, of shape `(part_size,)` (1/b in a
            micro-batch of b examples), and b; returns a list of tensors.
        size: Number of examples.
        part_size: Examples in each part, at most `size`.
        dtype: Dtype of the weights and of b.
        zeros: What to add to, like what the function returns.

    Returns:
        The sums, as a list.
    """

    def part(begin):
        first = tf.minimum(begin, size - part_size)
        count = tf.cast(first + part_size - begin, dtype)
        is_new = first + tf.range(part_size) >= begin
        return function(first, tf.cast(is_new, dtype) / count, count)

    is_long = tf.is_tensor(size) or size > _MOST_UNROLLED * part_size
    if is_long and not tf.executing_eagerly():
        return _loop(part, 0, size, tf.maximum(1, part_size), zeros)
    for begin in range(0, size, max(1, part_size)):
        zeros = _add(zeros, part(begin))
    return zeros


def _add(sums: list, others: list) -> list:
    return [a + tf.cast(b, a.dtype) for a, b in zip(sums, others)]


def _loop(function, begin: int, end, step, sums: list) -> list:
    """Adds to sums what a function gives at every so many positions."""
    _, *sums = tf.while_loop(
        lambda begin, *_: begin < end,
        lambda begin, *sums: (begin + step, *_add(sums, function(begin))),
        [tf.constant(begin), *sums],
        # XLA sizes the memory of the second derivative by it, and fails at
        # nothing.
        maximum_iterations=tf.maximum(1, (end - begin + step - 1) // step),
        # One micro-batch's activations in memory at a time.
        parallel_iterations=1,
    )
    return sums


def difference_step(direction: Gradients, at: Sequence, dtype) -> tf.Tensor:
    """The step ε of a forward difference along `direction`.

    Rounding errors shrink with a larger step, the error of the difference
    grows: √u (1 + ‖θ‖) / ‖direction‖, with u the rounding unit, balances both
    up to a factor (Nocedal & Wright, *Numerical Optimization*, section 8.1),
    which is 0.1 by measurement over layer types.

    Args:
        direction: Tensors of the shapes of `at`, or None.
        at: The tensors to be moved.
        dtype: The coarsest dtype in which the gradient is computed.

    Returns:
        A finite scalar of the dtype of the squared norms.
    """
    unit = dtypes.rounding_unit(dtype)
    length = tf.sqrt(tf.reduce_sum(squared_norms(direction)))
    size = tf.sqrt(tf.reduce_sum(squared_norms([tf.identity(a) for a in at])))
    tiny = np.finfo(length.dtype.as_numpy_dtype).tiny
    size = tf.cast(size, length.dtype)
    return (
        0.1 * np.sqrt(unit) * (1.0 + size) / tf.maximum(length, np.sqrt(tiny))
    )


def with_gradient(
    value: tf.Tensor,
    variables: Sequence,
    gradients: Gradients,
    when_used: Callable[[], None] = lambda: None,
) -> tf.Tensor:
    """Gives `value` a gradient that was computed in another way.

    Args:
        value: Scalar.
        variables: Variables or tensors.
        gradients: A tensor of its shape for each variable, or None.
        when_used: Called as somebody differentiates it, or traces that.

    Returns:
        A scalar with the value of `value`, whose derivative with respect to
        each variable is the tensor given for it, and constant otherwise.
    """
    connected = [
        (tf.convert_to_tensor(v), g)
        for v, g in zip(variables, gradients)
        if g is not None
    ]

    @custom_gradients.custom_gradient
    def attach(value, *tensors):
        def backward(upstream):
            when_used()
            return tf.zeros_like(value), *[
                tf.cast(dtypes.times(dtypes.precise(g), upstream), t.dtype)
                for t, (_, g) in zip(tensors, connected)
            ]

        return tf.identity(value), backward

    # Nothing flows through the value, nor through how it came about.
    return attach(tf.stop_gradient(value), *[tensor for tensor, _ in connected])
