"""Gradient checkpointing that penalties can differentiate twice."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._derivatives import checkpoint


@keras.saving.register_keras_serializable(package="keras_fisher")
class Rematerialization(keras.layers.Wrapper):
    """Keeps no activations of the layer that it wraps: gradient checkpointing.

    Outputs, variables, gradients and gradients of gradients are those of the
    layer. What it computes on its way is not kept for the backward passes but
    computed again, with the same random numbers: less memory for more time.
    Wrap blocks of several layers. What a block starts from is kept, and one
    block at a time is recomputed.

    It works where `tf.recompute_grad` and `keras.RematScope` do not: within
    the penalties, which differentiate twice.

    Statistics and random states are updated once, as by the layer itself.

    Source: Chen, Xu, Zhang, Guestrin, *Training deep nets with sublinear
    memory cost*, 2016.

    Args:
        layer: A layer or model, of Keras variables alone. Random numbers have
            to come from `keras.random.SeedGenerator`s of its own, as in
            Keras's layers: `tf.random` draws others when it is called again.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Call arguments:
        inputs, *args, **kwargs: What `layer` takes. Keras wants all or none of
            the keyword arguments to be tensors: with `use_causal_mask=True`,
            the tensors have to go by position.
        training: What `layer` takes as `training`.

    Raises:
        ValueError: In a call, if the layer changes variables that are
            trainable (`SpectralNormalization` does) or not its own.

    Example:
    ```python
    block = keras.Sequential([
        keras.layers.Conv2D(64, 3, padding="same"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
    ])
    inputs = keras.Input((32, 32, 3))
    outputs = keras_fisher.layers.Rematerialization(block)(inputs)
    ```
    """

    is_transparent = True  # for `keras_layers.unwrapped`

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any):
        # Wrapped layers cast for themselves; variables are read uncast here.
        kwargs.setdefault("dtype", layer.variable_dtype)
        super().__init__(layer, autocast=False, **kwargs)

    def build(self, input_shape=None):
        parameters = inspect.signature(self.layer.call).parameters.values()
        required = [
            p
            for p in parameters
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        # A layer of several arguments is built when these are known.
        if len(required) <= 1:
            keras_layers.build_by_call(
                self.layer,
                keras.tree.map_shape_structure(keras.KerasTensor, input_shape),
            )

    def compute_output_spec(self, *args, **kwargs):
        return self.layer(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs, previous_mask):
        if self.layer.supports_masking:
            return self.layer.compute_mask(inputs, previous_mask)
        return None

    def call(self, inputs, *args, training=None, **kwargs):
        layer = self.layer
        arguments = ((inputs, *args), kwargs)
        symbolic = keras.tree.map_structure(_symbolic, arguments)
        keras_layers.build_by_call(layer, *symbolic[0], **symbolic[1])
        variables = layer.trainable_variables
        state = keras_layers.snapshot(layer)
        leaves = keras.tree.flatten(arguments)
        values = [tf.convert_to_tensor(v.value) for v in variables]

        def function(tensors):
            tensors = iter(tensors)
            mapping = [*zip(variables, tensors), *state]
            args, kwargs = keras.tree.pack_sequence_as(
                arguments, _replaced(leaves, tensors)
            )
            scope = keras.StatelessScope(mapping, collect_losses=True)
            before = dict(scope.state_mapping)
            with scope:
                outputs = layer(*args, training=training, **kwargs)
            changes = {
                key: value
                for key, value in scope.state_mapping.items()
                if value is not before.get(key)
            }
            floating = _floating(keras.tree.flatten(outputs))
            return [*floating, *scope.losses], (outputs, changes)

        tensors, (outputs, changes) = checkpoint.checkpoint(
            function, [*values, *_floating(leaves)]
        )
        tensors = iter(tensors)
        outputs = keras.tree.pack_sequence_as(
            outputs, _replaced(keras.tree.flatten(outputs), tensors)
        )
        for loss in tensors:
            self.add_loss(loss)
        for variable, _ in state:
            if id(variable) in changes:
                variable.assign(changes.pop(id(variable)))
        if changes:
            raise ValueError(
                f"The layer {layer.name!r} in a `Rematerialization` changes "
                "variables in its call that are trainable or not its own, so "
                "that it would compute something else when it is called "
                "again. Leave it outside. If it draws random numbers, give it "
                "a `keras.random.SeedGenerator` as an attribute to draw from."
            )
        return outputs


def _is_floating(x) -> bool:
    return isinstance(x, tf.Tensor) and x.dtype.is_floating


def _floating(leaves) -> list:
    return [x for x in leaves if _is_floating(x)]


def _replaced(leaves, tensors) -> list:
    """The leaves, those of floating point from the iterator `tensors`."""
    return [
        keras_layers.with_mask(next(tensors), keras_layers.mask_of(x))
        if _is_floating(x)
        else x
        for x in leaves
    ]


def _symbolic(x):
    if not tf.is_tensor(x):
        return x
    return keras.KerasTensor(x.shape, dtype=x.dtype.name)
