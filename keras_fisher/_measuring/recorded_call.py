"""A call of a layer from copies of its weights, which changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._common import structures


def call(
    layer: keras.layers.Layer, weights: Sequence, x: Any, training: bool
) -> tuple[tf.Tensor, keras.StatelessScope]:
    """Calls a layer on other values of its trainable variables.

    Nothing that the layer keeps is changed.

    Returns:
        Its outputs, and the scope with what it would have changed.
    """
    mapping = [*zip(layer.trainable_variables, weights)]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        outputs = layer(x, training=training)
    return outputs, scope


class Call(NamedTuple):
    """A recorded call, from copies of the weights and inputs to outputs.

    Attributes:
        weights: Copies of the trainable variables.
        x: Copies of the inputs.
        structure: The outputs, a tensor or several.
        outputs: The same in one tensor.
        scope: What the call would have changed.
        tape: Persistent tape from `weights` to `outputs`.
    """

    weights: list
    x: Any
    structure: Any
    outputs: tf.Tensor
    scope: keras.StatelessScope
    tape: tf.GradientTape

    @property
    def mask(self) -> Any:
        """Keras masks of the outputs, or None, in their structure."""
        return structures.apply(keras_layers.mask_of, self.structure)


def recorded_call(
    layer: keras.layers.Layer,
    x: Any,
    training: bool,
    *,
    has_row_for_each: bool = True,
) -> Call:
    """Calls a layer on copies of its weights and inputs, on a tape.

    Args:
        layer: The layer.
        x: Its inputs.
        training: The mode that it is called in.
        has_row_for_each: Whether the outputs have a row for each of the
            inputs.
    """
    # Operations get the same names whenever this comes first in a graph, by
    # which `Layout` finds them again.
    weights = [tf.identity(v.value) for v in layer.trainable_variables]
    x = examples_lib.apply(tf.identity, x)
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape:
        for weight in weights:
            tape.watch(weight)
        structure, scope = call(layer, weights, x, training)
        if has_row_for_each:
            structure = _of_known_size(structure, x)
        outputs = structures.join(structure)
    return Call(weights, x, structure, outputs, scope, tape)


def _of_known_size(outputs: Any, x: Any) -> Any:
    """Outputs with the number of examples that some layers lose."""
    size = examples_lib.tensors(x)[0].shape[0]

    def sized(output):
        if output.shape.rank is None or output.shape[0] is not None:
            return output
        known = tf.ensure_shape(output, [size, *output.shape[1:]])
        return keras_layers.with_mask(known, keras_layers.mask_of(output))

    return keras.tree.map_structure(sized, outputs)
