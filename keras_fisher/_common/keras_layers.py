"""What is read off Keras layers and their outputs."""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import inspect
from typing import Any

import keras
import tensorflow as tf


def values_of(variables) -> list:
    """The TensorFlow variables behind Keras variables."""
    return [variable.value for variable in variables]


def have_values(variables) -> bool:
    """Whether there are any yet: Keras traces a first call without them."""
    return all(variable._value is not None for variable in variables)


def snapshot(layer: keras.layers.Layer) -> list[tuple]:
    """The values now of all that a call may change.

    Statistics, seeds, and what stateful recurrent layers remember, which Keras
    does not count among their variables.

    Returns:
        Pairs of variables and tensors, as `keras.StatelessScope` takes them.
    """
    states = [
        state
        for each in operations_in(layer)
        for state in keras.tree.flatten(getattr(each, "states", None))
        if isinstance(state, keras.Variable)
    ]
    return [
        (variable, tf.identity(variable.value))
        for variable in (*layer.non_trainable_variables, *states)
    ]


class FixedScope(keras.StatelessScope):
    """Scope of a call from given values, which layers do not overwrite.

    Spectral normalization, for one, assigns its kernel when it is called, and
    the gradient that Keras trains with is that at the kernel it has written.
    To ask for the gradient elsewhere is to put another kernel in that place.

    Args:
        fixed: Pairs of variables and the values they have and keep.
        state: Pairs of variables and the values they start with.
    """

    def __init__(self, fixed: Iterable[tuple], state: Iterable[tuple] = ()):
        fixed = list(fixed)
        super().__init__(state_mapping=[*state, *fixed])
        self._fixed = {id(variable) for variable, _ in fixed}

    def add_update(self, update: tuple) -> None:
        variable, _ = update
        if id(variable) not in self._fixed:
            super().add_update(update)


def build_by_call(layer: keras.layers.Layer, *args, **kwargs) -> None:
    """Builds a layer by a call, if it is not built.

    That builds subclassed layers as well, which `build` does not. The call
    leaves no other trace: recurrent layers draw dropout masks even where they
    use none.
    """
    if layer.built:
        return
    before = snapshot(layer)
    layer(*args, **kwargs)
    for variable, value in before:
        variable.assign(value)


def call_symbolically(layer: keras.layers.Layer) -> None:
    """Calls a built layer on the shapes it was built with, not on values.

    One that comes from a file has shapes, but counts as never called, and is
    then not exported. Shapes that it is not called on leave it as it is.
    """
    shapes = (layer.get_build_config() or {}).get("input_shape")
    if not layer.built or shapes is None:
        return
    with contextlib.suppress(Exception):  # Of whatever its call is made of.
        layer(
            keras.tree.map_shape_structure(
                lambda shape: keras.KerasTensor(shape, layer.input_dtype),
                shapes,
            )
        )


def outputs_of(layer: keras.layers.Layer, x: Any) -> Any:
    """The outputs of a built layer in inference; changes nothing in it."""
    with keras.StatelessScope():
        return layer(x, training=False)


def has_fixed_batch(layer: keras.layers.Layer) -> bool:
    """Whether a functional model was made for one number of examples."""
    inputs = keras.tree.flatten(getattr(layer, "inputs", None))
    return any(t is not None and t.shape[0] is not None for t in inputs)


def check_trainable(
    layer: keras.layers.Layer,
    consequence: str,
    advice: str = "Unfreeze a layer.",
) -> None:
    """Raises a `ValueError` if there is nothing to differentiate by.

    Or where Keras returns other things than gradients.

    Args:
        layer: A built layer or model.
        consequence: What is wrong then.
        advice: What to do.
    """
    if not layer.trainable_variables:
        raise ValueError(
            f"No variable of the model is trainable, so {consequence}. "
            f"Received: {layer.name} with trainable={layer.trainable}. {advice}"
        )
    scales = [
        variable.path
        for variable in layer.trainable_variables
        if getattr(variable, "overwrite_with_gradient", False)
    ]
    if scales:
        raise ValueError(
            "Layers in float8 give new scales where gradients are expected, so "
            f"that no gradient norm is one. Received: {layer.name} with "
            f'{scales[0]}, ... Use it before `quantize("float8")`.'
        )


def check_calls_are_traced_anew(layer: keras.layers.Layer) -> None:
    """Raises a `ValueError` if a `call` is a `tf.function`.

    Keras traces it as it builds the model, with values in place of variables,
    by which there is no derivative; a later call takes the same trace.

    Args:
        layer: A built layer or model.
    """
    traced = [
        each.name
        for each in operations_in(layer)
        if hasattr(each.call, "python_function")
    ]
    if traced:
        raise ValueError(
            "The `call` of a layer is a `tf.function`, which keeps the values "
            "of the variables that Keras has traced it with, so that its "
            "derivatives would be missed. Remove `@tf.function`: Keras and "
            f"this library compile the whole model. Received: {traced}."
        )


def unwrapped(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer, or that in a wrapper of this package that only runs it."""
    while getattr(layer, "is_transparent", False):
        layer = layer.layer
    return layer


def compute_dtype(layer: keras.layers.Layer) -> str:
    """The coarsest dtype that a layer, or one in it, computes in."""
    found = [
        each.compute_dtype
        for each in operations_in(unwrapped(layer))
        if isinstance(each, keras.layers.Layer)
        and keras.backend.is_float_dtype(each.compute_dtype)
    ]
    # Where they are equally wide, the one of less range.
    return min(
        found or [unwrapped(layer).compute_dtype],
        key=lambda name: (tf.as_dtype(name).size, tf.as_dtype(name).max),
    )


def takes_mask(layer: keras.layers.Layer) -> bool:
    """Whether a mask can be given to a call of it."""
    return "mask" in inspect.signature(layer.call).parameters


# Keras has no public name for the mask that its layers leave on outputs.


def mask_of(outputs: tf.Tensor) -> tf.Tensor | None:
    """The mask that Keras layers have left on their outputs."""
    return getattr(outputs, "_keras_mask", None)


def with_mask(tensor: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """`tensor`, with a mask that Keras layers will find on it."""
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def aligned_mask(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A mask of the first axes of `x`, with as many axes as `x`."""
    missing = x.shape.rank - mask.shape.rank
    return tf.reshape(mask, tf.concat([tf.shape(mask), [1] * missing], 0))


def own_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics that are attributes of a model, without those of `compile`.

    A `call` updates them; those of the layers in it are not among them.
    """
    return list(model._metrics)


def is_keras_own(thing: Any) -> bool:
    """Whether a layer or an operation comes from Keras itself."""
    return type(thing).__module__.split(".")[0] == "keras"


def is_keras_function(function: Any) -> bool:
    """Whether a function comes from Keras itself."""
    return (getattr(function, "__module__", None) or "").split(".")[0] == (
        "keras"
    )


def seeds_in(layer: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """The generators that a layer, and those in it, have as attributes."""
    return [
        value
        for each in operations_in(layer)
        for value in vars(each).values()
        if isinstance(value, keras.random.SeedGenerator)
    ]


def loss_weights(model: Any, unknown: Any = None) -> Any:
    """The weights of several losses, as `compile` was given them.

    Args:
        model: Any model.
        unknown: What is returned where arguments of `compile` that cannot be
            serialized hide them.
    """
    if not getattr(model, "compiled", False):
        return None
    try:
        return (model.get_compile_config() or {}).get("loss_weights")
    except (TypeError, ValueError):
        return unknown


def draws_nothing(graph: tf.Graph) -> bool:
    """Whether no operation of a graph makes random numbers.

    Those of the functions that it calls count as well.
    """
    whole = graph.as_graph_def()
    bodies = [f.node_def for f in whole.library.function]
    return not any(
        word in node.op
        for nodes in (whole.node, *bodies)
        for node in nodes
        for word in ("Random", "TruncatedNormal", "Multinomial")
    )


def operations_in(layer: keras.layers.Layer) -> list[keras.Operation]:
    """A layer and all layers and operations in it, each once.

    Operations that are not layers are found in functional models alone.
    """
    # Keras has no public way to the layers in a layer.
    layers = list(layer._flatten_layers(include_self=True, recursive=True))
    found = {id(each): each for each in layers}
    for each in layers:
        for operation in getattr(each, "operations", ()):
            found.setdefault(id(operation), operation)
    return list(found.values())
