"""Max pooling whose second derivative is right, with and without XLA.

XLA's kernel for the gradient of the gradient exists in `float32` alone and
keeps eight bits of each value. Under XLA the first gradient is written so that
its own gradient needs no special kernel: it is linear in what comes from above,
with the places of the maxima as constants. Without XLA, TensorFlow's own
kernels are several times faster, and exact but for pools that keep the shape.
Its kernel for the gradient of the gradient writes into the memory of
what it reads, if that has the shape of its result and nobody else needs it: it
reads zeros then, in a graph. So it is for pools that keep the shape, by stride
1 and `"SAME"` padding, or with axes of length 1. Here padding is added before
the pool, so that its inputs are larger than its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools

import numpy as np
import tensorflow as tf

from keras_fisher._derivatives import custom_gradients


def exact(own: Callable) -> Callable:
    """One of `tf.nn.max_pool` and its likes, with another second derivative."""

    def pooled(pool, x, window, steps, padding):
        if all(size == 1 for size in window) and isinstance(padding, str):
            return tf.strided_slice(x, *_whole(x), steps)
        if padding == "SAME" and _may_keep(x.shape, steps):
            paddings = same_paddings(tf.shape(x), window, steps)
            x = tf.pad(x, paddings, constant_values=-float("inf"))
            padding = "VALID"
        return pool(x, padding)

    return _with_sizes(own, pooled)


def by_max_pool(own: Callable) -> Callable:
    """`tf.nn.pool`, which takes its maxima by a function that nobody replaces.

    Args:
        own: `tf.nn.pool`.
    """

    @functools.wraps(own)
    def pool(
        input,
        window_shape,
        pooling_type,
        strides=None,
        padding="VALID",
        data_format=None,
        dilations=None,
        name=None,
    ):
        is_dilated = dilations is not None and np.any(np.array(dilations) != 1)
        if pooling_type == "MAX" and not is_dilated:
            strides = strides or [1] * len(window_shape)
            return tf.nn.max_pool(
                input, window_shape, strides, padding, data_format, name
            )
        return own(
            input,
            window_shape,
            pooling_type,
            strides,
            padding,
            data_format,
            dilations,
            name,
        )

    return pool


def exact_for_xla(own: Callable) -> Callable:
    """The same, with a gradient that is made of operations XLA has."""

    def pooled(pool, x, window, steps, padding):
        @custom_gradients.custom_gradient
        def function(x):
            def backward(above):
                paddings = _paddings(padding, _shape(x), window, steps)
                return _to_first_maxima(x, above, window, steps, paddings)

            return pool(x, padding), backward

        return function(x)

    return _with_sizes(own, pooled)


def _with_sizes(own: Callable, pooled: Callable) -> Callable:
    """A pool with the arguments of `own`, computed by `pooled`.

    Args:
        own: Of TensorFlow. What `pooled` is not for is left to it.
        pooled: Takes `own` as a function of inputs and padding, inputs of
            floating point, the sizes of windows and strides along all of their
            axes, and the padding.
    """

    def max_pool(input, ksize, strides, padding, data_format=None, name=None):
        x = tf.convert_to_tensor(input)
        # The functions differ in what is meant if none is given.
        options = {} if data_format is None else {"data_format": data_format}

        def pool(x, padding):
            return own(x, ksize, strides, padding, name=name, **options)

        rank = x.shape.rank
        if rank is None or not x.dtype.is_floating:
            return pool(x, padding)
        window = _of_all_axes(ksize, rank, data_format)
        steps = _of_all_axes(strides, rank, data_format)
        return pooled(pool, x, window, steps, padding)

    return max_pool


def _to_first_maxima(
    x: tf.Tensor,
    above: tf.Tensor,
    window: list[int],
    steps: list[int],
    paddings: np.ndarray | tf.Tensor,
) -> tf.Tensor:
    """Sends each gradient to the first maximum of its window."""
    padded = tf.pad(tf.stop_gradient(x), paddings, constant_values=x.dtype.min)
    padded_shape, output_shape = _shape(padded), _shape(above)

    def end(offset):
        return offset + (output_shape - 1) * steps + 1

    def corner(offset):
        """The same corner of every window."""
        values = tf.strided_slice(padded, offset, end(offset), steps)
        return tf.ensure_shape(values, above.shape)

    offsets = list(itertools.product(*map(range, window)))
    # Corners are compared with each other, not with the outputs: a compiler
    # may compute these again with another rounding, and nothing would match.
    largest = corner(offsets[0])
    winner = tf.zeros_like(above, tf.int32)
    for k, offset in enumerate(offsets[1:], start=1):
        values = corner(offset)
        better = values > largest
        winner = tf.where(better, k, winner)
        largest = tf.where(better, values, largest)

    parts = [
        tf.raw_ops.StridedSliceGrad(
            shape=padded_shape,
            begin=tf.constant(offset),
            end=end(offset),
            strides=tf.constant(steps),
            dy=tf.where(winner == k, above, tf.zeros_like(above)),
        )
        for k, offset in enumerate(offsets)
    ]
    result = tf.slice(tf.add_n(parts), paddings[:, 0], _shape(x))
    return tf.ensure_shape(result, x.shape)


def _shape(x: tf.Tensor) -> np.ndarray | tf.Tensor:
    """Numbers, if known: XLA needs those of slices, within loops as well."""
    if x.shape.is_fully_defined():
        return np.array(x.shape, np.int32)
    return tf.shape(x)


def _paddings(padding, shape, window, steps) -> np.ndarray | tf.Tensor:
    """What is added to inputs before and after, of shape `(axes, 2)`."""
    if padding == "SAME":
        return same_paddings(shape, window, steps)
    if padding == "VALID":
        return np.zeros([len(window), 2], np.int32)
    return np.array(padding, np.int32)


def same_paddings(
    shape: np.ndarray | tf.Tensor, window: list[int], steps: list[int]
) -> np.ndarray | tf.Tensor:
    """What `"SAME"` adds to inputs before and after, of shape `(axes, 2)`."""
    covered = (-(-shape // steps) - 1) * steps + window
    total = covered - shape
    if isinstance(total, np.ndarray):
        total = np.maximum(total, 0)
        return np.stack([total // 2, total - total // 2], axis=1)
    total = tf.maximum(total, 0)
    return tf.stack([total // 2, total - total // 2], axis=1)


def _of_all_axes(sizes, rank: int, data_format: str | None) -> list[int]:
    """Sizes of a window with those of the examples and channels, 1."""
    sizes = list(tf.nest.flatten(sizes))
    if len(sizes) == 1:
        sizes *= rank - 2
    if len(sizes) == rank:
        return sizes
    if data_format is not None and data_format.startswith("NC"):
        return [1, 1, *sizes]
    return [1, *sizes, 1]


def _may_keep(shape: tf.TensorShape, steps: list[int]) -> bool:
    """Whether outputs may have this shape, as far as it is known."""
    return all(
        size is None or -(-size // step) == size
        for size, step in zip(shape, steps)
    )


def _whole(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.shape(x)
    return tf.zeros_like(shape), shape
