"""Whether the outputs of a model are what a likelihood expects.

Values alone do not tell probabilities from logits, so it is the operation that
computes them that is looked at: in the graph of a step, or, where there is
none, in one that is traced for that only.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._common import structures
from keras_fisher.likelihoods.base import Likelihood

# Operations that pass on what they get, of another dtype or shape.
_PASSING = frozenset(
    {"Cast", "CheckNumerics", "ExpandDims", "Identity", "IdentityN"}
    | {"PreventGradient", "Reshape", "Squeeze", "StopGradient"}
)


def check(
    likelihood: Likelihood,
    layer: keras.layers.Layer,
    x: Any,
    outputs: Any = None,
) -> None:
    """Raises a `ValueError` where outputs cannot be what a likelihood expects.

    Args:
        likelihood: Of the outputs.
        layer: A built layer or model.
        x: Inputs, of which only shapes and dtypes are looked at.
        outputs: Concrete outputs for an example, or None.
    """
    if outputs is not None:
        likelihood.check(outputs)
    if not likelihood.constrains_operations:
        return
    operations = _last_operations(layer, x)
    if operations is not None:
        likelihood.check_structure(operations)
        likelihood.check_operation(operations, outputs)


def check_traced(likelihood: Likelihood, outputs: Any) -> None:
    """The same of outputs in a graph, by the operations that are there.

    Args:
        likelihood: Of the outputs.
        outputs: As the layer has returned them.
    """
    if not likelihood.constrains_operations:
        return
    operations = structures.apply(_operation_behind, outputs)
    likelihood.check_structure(operations)
    likelihood.check_operation(operations, None)


def _last_operations(layer: keras.layers.Layer, x: Any) -> Any:
    """The TensorFlow operations behind the outputs, in their structure."""
    found = None

    def trace(x):
        nonlocal found
        outputs = keras_layers.outputs_of(layer, x)
        found = structures.apply(_operation_behind, outputs)

    specs = keras.tree.map_structure(
        lambda t: None if t is None else tf.type_spec_from_value(t), x
    )
    with tf.init_scope():
        try:
            tf.function(trace, autograph=False).get_concrete_function(specs)
        except Exception:  # Models that only run eagerly raise what they like.
            return None
    return found


def _operation_behind(tensor: tf.Tensor) -> str:
    """The type of the operation that computes the values of a tensor."""
    if not isinstance(tensor, tf.Tensor):
        return ""
    classes = tensor.shape[-1] if tensor.shape.rank else None
    while tensor.op.type in _PASSING:
        is_many = tensor.op.type == "IdentityN"
        tensor = tensor.op.inputs[tensor.value_index if is_many else 0]
    # A softmax over other classes is none over these.
    is_over_same = tensor.shape.rank and tensor.shape[-1] == classes
    return tensor.op.type if is_over_same else ""
