"""Inputs, outputs and labels: one tensor, or a list or dict of them."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import dtypes


def leaves(outputs: Any) -> list[tf.Tensor]:
    """All tensors."""
    return keras.tree.flatten(outputs)


def apply(function: Callable, outputs: Any) -> Any:
    """`function` of each tensor, in the structure that the tensors have.

    In place of tensors there may be None (masks), which stays.
    """
    if isinstance(outputs, dict):
        return {key: apply(function, each) for key, each in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [apply(function, each) for each in outputs]
    return None if outputs is None else function(outputs)


def taken_out(labels: Any, several: bool) -> Any:
    """Labels as outputs are: those of one output may be in a list, for Keras.

    Args:
        labels: Of all outputs.
        several: Whether there are several outputs.
    """
    is_in_list = isinstance(labels, (list, tuple)) and len(labels) == 1
    return labels[0] if is_in_list and not several else labels


def join(outputs: Any) -> tf.Tensor:
    """One tensor of shape `(batch, ...)`; several are laid side by side."""
    if tf.is_tensor(outputs):
        return outputs
    flat = [_flat(dtypes.precise(each)) for each in leaves(outputs)]
    widest = tf.float64 if any(t.dtype == tf.float64 for t in flat) else None
    return tf.concat([tf.cast(t, widest or t.dtype) for t in flat], axis=1)


def split(joined: tf.Tensor, like: Any) -> Any:
    """What `join` has joined, in the structure and the shapes of `like`.

    Args:
        joined: From `join`, perhaps with other examples.
        like: Outputs of known shape but for the number of examples.

    Returns:
        Tensors in 32 bits or more.
    """
    if tf.is_tensor(like):
        return dtypes.precise(joined)
    sizes = [math.prod(each.shape[1:]) for each in leaves(like)]
    parts = tf.split(joined, sizes, axis=1)
    return keras.tree.pack_sequence_as(
        like,
        [
            tf.cast(
                tf.reshape(part, [-1, *each.shape[1:]]),
                dtypes.at_least_single(each.dtype),
            )
            for part, each in zip(parts, leaves(like))
        ],
    )


def _flat(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, math.prod(x.shape[1:])])


def symbolic_outputs(model: Any) -> Any:
    """The outputs of a functional model in their structure, else None."""
    try:
        shapes = model.output_shape
    except (AttributeError, ValueError):
        return None
    # Shapes are in a list where the outputs are in a dict.
    if not isinstance(model, keras.Sequential) and isinstance(
        model.output, dict
    ):
        return model.output
    return keras.tree.map_shape_structure(keras.KerasTensor, shapes)


def output_names(model: Any, outputs: Any = None) -> set[str]:
    """What the outputs of a model are called, as far as it is known.

    Args:
        model: Any model; those of a functional one have names.
        outputs: Its outputs, if they are there: keys of a dict are names.
    """
    known = getattr(model, "output_names", None) or ()
    if outputs is None:
        outputs = symbolic_outputs(model)
    return {*known, *(outputs if isinstance(outputs, dict) else ())}
