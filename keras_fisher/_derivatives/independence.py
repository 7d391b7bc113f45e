"""Whether layers let the examples of a batch see each other."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import ownership


def examples_are_independent(
    layer: keras.layers.Layer, x: Any, *, may_draw: bool = True
) -> bool:
    """Whether a layer is known to treat each example on its own.

    Then it does not mix the batch, keep state from call to call (but for
    seeds), add a loss or make a mask. Keras's own layers are known; other
    people's are traced and looked into, unless all runs eagerly, where each
    step would do so.

    Args:
        layer: A built layer or model.
        x: Its inputs.
        may_draw: Whether it may draw random numbers for each example.
    """
    if keras_layers.seeds_in(layer) and not may_draw:
        return False
    if are_known_to_be_independent(layer):
        return True
    return not (
        tf.executing_eagerly() or _goes_over_batches(layer)
    ) and ownership.examples_own_rows(layer, x, may_draw=may_draw)


def mixes_some_batches(layer: keras.layers.Layer) -> bool:
    """Whether it goes by the values in a batch if examples see each other."""
    return any(
        isinstance(each, keras.layers.MelSpectrogram)
        for each in keras_layers.operations_in(layer)
    )


def _goes_over_batches(layer: keras.layers.Layer) -> bool:
    """Whether there is batch normalization in it: then no trace is needed."""
    return any(
        isinstance(each, keras.layers.BatchNormalization) and each.trainable
        for each in keras_layers.operations_in(layer)
    )


def are_known_to_be_independent(layer: keras.layers.Layer) -> bool:
    """The same without a trace: of Keras's own layers, and of nothing else.

    Of Sequential and functional models that are made of them, too, and of
    elementwise operations such as `x + y`.
    """
    if not keras_layers.is_keras_own(keras_layers.unwrapped(layer)):
        return False
    if isinstance(layer, keras.Model):
        return all(
            are_known_to_be_independent(operation)
            if isinstance(operation, keras.layers.Layer)
            else _is_elementwise(operation)
            for operation in getattr(layer, "operations", layer.layers)
        )
    if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
        return False
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        return False
    if isinstance(layer, _DEPENDENT) or layer.activity_regularizer:
        return False
    # What is not Keras's is ours here, and so are the functions in it.
    if keras_layers.is_keras_own(layer) and not all(
        map(_is_activation, catalogue.functions_in(layer))
    ):
        return False
    if _goes_along_examples(layer) or getattr(layer, "mask_zero", False):
        return False
    inside = [o for o in keras_layers.operations_in(layer) if o is not layer]
    return all(map(are_known_to_be_independent, inside))


def _is_activation(function: Any) -> bool:
    """Whether it is one of Keras's, which go along the last axis at most."""
    return any(function is each for each in vars(keras.activations).values())


def _goes_along_examples(layer: keras.layers.Layer) -> bool:
    """Whether arguments of a layer make it mix examples, or share noise."""
    axes = [getattr(layer, name, ()) for name in ("axis", "axes")]
    if isinstance(layer, keras.layers.MultiHeadAttention):
        axes.append(layer.get_config()["attention_axes"] or ())
    shared = getattr(layer, "noise_shape", None)
    # From the end, only the last axis is never that of the examples.
    return any(
        isinstance(axis, int) and (axis == 0 or axis < -1)
        for axis in keras.tree.flatten(axes)
    ) or bool(shared and shared[0])


# Layers with other people's code, with state or losses, that mask, or mix.
_DEPENDENT = (
    keras.layers.CutMix,
    keras.layers.Lambda,
    keras.layers.Masking,
    keras.layers.MelSpectrogram,  # from the loudest of the batch down
    keras.layers.MixUp,
    keras.layers.ActivityRegularization,
    keras.layers.SpectralNormalization,
    keras.layers.TFSMLayer,
    keras.layers.TorchModuleWrapper,
    keras.layers.JaxLayer,
)


# What `keras.ops` and the operators on its tensors are called in a functional
# model. Keras has no public names for them; with others they would count as
# dependent, which costs time only.
_ELEMENTWISE = {
    *("Absolute", "Add", "Divide", "Maximum", "Minimum", "Multiply"),
    *("Negative", "Power", "Square", "Subtract", "TrueDivide"),
    *("Elu", "Exp", "Gelu", "LeakyRelu", "Relu", "Relu6", "Selu", "Sigmoid"),
    *("Silu", "Softplus", "Softsign", "Tanh"),
}


def _is_elementwise(operation) -> bool:
    """Whether an operation of a functional model is, with no broadcast batch.

    An operand of lower rank would be aligned by its last axes, and a constant
    may have an axis for the examples of one batch.
    """
    name = type(operation).__name__
    if not keras_layers.is_keras_own(operation) or name not in _ELEMENTWISE:
        return False
    inputs = keras.tree.flatten(operation.input)
    rank = len(operation.output.shape)
    return operation.output.shape[0] is None and all(
        x.shape[0] is None and len(x.shape) == rank for x in inputs
    )
