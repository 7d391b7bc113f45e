"""The squared norm of the mean gradient of a batch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale
from keras_fisher._derivatives.forward import number_of_examples
from keras_fisher._measuring.recorded_call import recorded_call


class Recording:
    """A forward pass, ready for the squared norm of the mean gradient.

    As `per_example.Recording`, with one row for all examples: B ‖ĝ‖².

    Attributes:
        size: B, the number of rows of the outputs: a graph network has more of
            them in its inputs.
        dtype, shape: Of the squared norms of one pass.
    """

    def __init__(self, model, x: Any, training: bool):
        call = recorded_call(model, x, training, has_row_for_each=False)
        self._weights, self._tape = call.weights, call.tape
        self.structure, self.outputs = call.structure, call.outputs
        self.mask = call.mask
        self._compute_dtype = keras_layers.compute_dtype(model)
        self.size = number_of_examples(call.structure)
        self.dtype = gradients_lib.common_dtype(self._weights)
        self.shape = 1, len(self._weights)

    def squared_norms(self, *cotangents: tf.Tensor) -> tf.Tensor:
        return tf.stack([self._squared_norms(c) for c in cotangents])

    def _squared_norms(self, cotangent: tf.Tensor) -> tf.Tensor:
        size = tf.cast(self.size, cotangent.dtype)
        cotangent /= tf.maximum(size, 1)
        scale = loss_scale.fitting([cotangent], self._compute_dtype)
        gradients = self._tape.gradient(
            self.outputs,
            self._weights,
            output_gradients=tf.cast(cotangent * scale, self.outputs.dtype),
        )
        gradients = gradients_lib.dense(gradients)
        norms = gradients_lib.squared_norms(gradients, scale)
        return tf.cast(size, self.dtype) * tf.cast(norms[None], self.dtype)
