"""Whether layers let the examples of a batch see each other."""

from __future__ import annotations

import keras

from keras_fisher._common import keras_layers


def examples_are_independent(layer: keras.layers.Layer) -> bool:
    """Whether a layer is known to treat each example on its own.

    True only for Keras's own layers and for Sequential and functional models
    made of them and of elementwise operations such as `x + y`, none of which
    mixes the batch, keeps state from call to call (but for seeds), adds a loss
    or makes a mask. Code that cannot be looked into counts as dependent.
    """
    if not keras_layers.is_keras_own(keras_layers.unwrapped(layer)):
        return False
    if isinstance(layer, keras.Model):
        return all(
            examples_are_independent(operation)
            if isinstance(operation, keras.layers.Layer)
            else _is_elementwise(operation)
            for operation in getattr(layer, "operations", layer.layers)
        )
    if isinstance(layer, keras.layers.BatchNormalization):
        return not layer.trainable
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        return False
    if isinstance(layer, keras.layers.RNN):
        return keras_layers.is_keras_own(layer.cell)
    if isinstance(layer, _DEPENDENT) or layer.activity_regularizer:
        return False
    if isinstance(layer, keras.layers.Bidirectional):
        return all(
            map(
                examples_are_independent,
                (layer.forward_layer, layer.backward_layer),
            )
        )
    if isinstance(layer, keras.layers.Wrapper):
        return examples_are_independent(layer.layer)
    return not getattr(layer, "mask_zero", False)


# Layers with other people's code, with state or losses, or that mask.
_DEPENDENT = (
    keras.layers.Lambda,
    keras.layers.Masking,
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
