"""Max pooling whose second derivative is right where shapes stay.

TensorFlow's kernel for the gradient of the gradient writes into the memory of
what it reads, if that has the shape of its result and nobody else needs it: it
reads zeros then, in a graph. So it is for pools that keep the shape, by stride
1 and `"SAME"` padding, or with axes of length 1. Here padding is added before
the pool, so that its inputs are larger than its outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


def exact(own: Callable) -> Callable:
    """One of `tf.nn.max_pool` and its likes, with another second derivative."""

    def max_pool(input, ksize, strides, padding, data_format=None, name=None):
        x = tf.convert_to_tensor(input)
        # The functions differ in what is meant if none is given.
        options = {"name": name}
        if data_format is not None:
            options["data_format"] = data_format
        if x.shape.rank is None or not x.dtype.is_floating:
            return own(x, ksize, strides, padding, **options)
        window = _of_all_axes(ksize, x.shape.rank, data_format)
        steps = _of_all_axes(strides, x.shape.rank, data_format)
        if all(size == 1 for size in window) and isinstance(padding, str):
            return tf.strided_slice(x, *_whole(x), steps, name=name)
        if padding == "SAME" and _may_keep(x.shape, steps):
            paddings = same_paddings(tf.shape(x), window, steps)
            x = tf.pad(x, paddings, constant_values=-float("inf"))
            padding = "VALID"
        return own(x, ksize, strides, padding, **options)

    return max_pool


def same_paddings(
    shape: tf.Tensor, window: list[int], steps: list[int]
) -> tf.Tensor:
    """What `"SAME"` adds to inputs before and after, of shape `(axes, 2)`."""
    covered = (-(-shape // steps) - 1) * steps + window
    total = tf.maximum(covered - shape, 0)
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
