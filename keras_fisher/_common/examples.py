"""Inputs by their examples: dense, sparse and ragged tensors, and None.

What is optional in a model may be None, and stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def tensors(x: Any) -> list:
    """All inputs that are there."""
    return [leaf for leaf in keras.tree.flatten(x) if leaf is not None]


def apply(function: Callable, x: Any) -> Any:
    """`function` of each input that is there, in their structure."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else function(leaf), x
    )


def number(x: Any) -> int | tf.Tensor:
    """How many there are in the first tensor, an integer if it is known."""
    first = tensors(x)[0]
    known = first.shape[0]
    if known is not None:
        return int(known)
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], tf.int32)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.shape(first)[0]


def rows(x: Any, begin: Any, end: Any) -> Any:
    """Neighbours, from one position to another; None for the end."""
    return apply(lambda tensor: _rows(tensor, begin, end), x)


def neighbours(x: Any, first: Any, size: Any) -> Any:
    """So many of dense tensors, from a position on that XLA need not know."""
    known = None if tf.is_tensor(size) else size

    def some(tensor):
        rest = tensor.shape.rank - 1
        cut = tf.slice(tensor, [first, *[0] * rest], [size, *[-1] * rest])
        # Layers ask for it, and a slice that begins anywhere has lost it.
        return tf.ensure_shape(cut, [known, *tensor.shape[1:]])

    return apply(some, x)


def one(x: Any, position: Any) -> Any:
    """A batch of a single one."""

    def alone(tensor):
        if isinstance(tensor, tf.RaggedTensor):
            return _counted(tensor[position : position + 1], 1)
        return tensor[position][None]

    return apply(alone, x)


def with_again(x: Any, chosen: tf.Tensor) -> Any:
    """All, and behind them some of them once more."""

    def longer(tensor):
        joined = tf.concat([tensor, tf.gather(tensor, chosen)], axis=0)
        if isinstance(tensor, tf.RaggedTensor):
            joined = _counted(joined, tensor.shape[0] + chosen.shape[0])
        return joined

    return apply(longer, x)


def has_ragged(x: Any) -> bool:
    """Whether examples are of different sizes."""
    return any(isinstance(leaf, tf.RaggedTensor) for leaf in tensors(x))


def turned(tensor: Any, first: tf.Tensor) -> Any:
    """All in their order from `first` on, the first after the last."""
    if isinstance(tensor, tf.Tensor):
        return tf.roll(tensor, -first, axis=0)
    parts = [_rows(tensor, first, None), _rows(tensor, 0, first)]
    if isinstance(tensor, tf.SparseTensor):
        return _of_shape(tf.sparse.concat(0, parts), tensor)
    return tf.concat(parts, axis=0)


def _rows(tensor: Any, begin: Any, end: Any) -> Any:
    if not isinstance(tensor, tf.SparseTensor):
        return tensor[begin:end]
    shape = tensor.dense_shape
    begin = tf.cast(begin, tf.int64)
    end = shape[0] if end is None else tf.cast(end, tf.int64)
    start = tf.concat([[begin], tf.zeros_like(shape[1:])], axis=0)
    size = tf.concat([[end - begin], shape[1:]], axis=0)
    return _of_shape(tf.sparse.slice(tensor, start, size), tensor)


def _counted(ragged: tf.RaggedTensor, count: int) -> tf.RaggedTensor:
    """With the number of rows, which its operations lose."""
    splits = tf.ensure_shape(ragged.row_splits, [count + 1])
    return tf.RaggedTensor.from_row_splits(
        ragged.values, splits, validate=False
    )


def _of_shape(sparse: tf.SparseTensor, like: tf.SparseTensor):
    """With what is known of the shape: layers ask for it."""
    shape = [sparse.shape[0] if sparse.shape.rank else None, *like.shape[1:]]
    sparse.set_shape(shape)
    return sparse
