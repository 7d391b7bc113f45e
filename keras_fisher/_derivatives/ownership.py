"""Whose each entry of a tensor is: which example of the batch it comes from.

Whatever a model is made of, TensorFlow sees operations. For each of them a
rule says whose the entries of its outputs are, given whose those of its inputs
are, in arrays of owners: 1, 2, ... for the examples, 0 for what they share.
Operations that only move entries are run on the owners themselves. Where an
entry would have two owners, or an operation has no rule, nothing is claimed.

A model may also look at how many examples there are. So it is traced with two
numbers of them, and a tensor in which the two graphs differ, though it is of
no example, may say nothing but how large another one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._derivatives import ownership_rules
from keras_fisher._derivatives.ownership_rules import NotClaimedError

# Enough to tell a shift from a mirror image.
_EXAMPLES = 3


def examples_own_rows(
    layer: keras.layers.Layer, x: Any, *, may_draw: bool = True
) -> bool:
    """Whether each row of a model's outputs comes from its example alone.

    Traces the model in training mode, and runs nothing of it.

    Args:
        layer: A built layer or model.
        x: Its inputs, or tensors like them: dense, with the batch as first
            axis of each, the other axes of known sizes.
        may_draw: Whether it may draw random numbers for each example.

    Returns:
        True if that is certain, and the call besides keeps no state (but that
        of random numbers), adds no loss and leaves no mask on its outputs.
    """
    leaves = keras.tree.flatten(x)
    if not leaves or not all(map(_has_rows, leaves)):
        return False
    try:
        with tf.init_scope():
            graph, larger = (
                _traced(layer, x, number)
                for number in (_EXAMPLES, _EXAMPLES + 1)
            )
            if not (may_draw or keras_layers.draws_nothing(graph)):
                return False
            owners = _owners(graph, larger)
            return all(_is_in_order(owners, t) for t in graph.outputs)
    except Exception:  # Of whatever the model is made of.
        return False


def _has_rows(leaf: Any) -> bool:
    if isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
        return False
    shape = getattr(leaf, "shape", None)
    return bool(shape) and None not in tuple(shape)[1:]


def _traced(layer, x: Any, examples: int) -> tf.Graph:
    """The graph of a call on so many examples."""

    def call(x):
        # A layer alone may have a name that is none for a scope, as `_Block`.
        scope = keras.StatelessScope(collect_losses=True)
        with tf.name_scope("layer"), scope:
            outputs = keras.tree.flatten(layer(x, training=True))
        if scope.losses:
            raise NotClaimedError("A loss is added.")
        if any(keras_layers.mask_of(output) is not None for output in outputs):
            raise NotClaimedError("The outputs have a mask.")
        seeds = {id(seed.state) for seed in keras_layers.seeds_in(layer)}
        for variable in layer.variables:
            if id(variable) not in seeds and (
                scope.get_current_value(variable) is not None
            ):
                raise NotClaimedError(f"{variable.path} is changed.")
        return outputs

    specs = keras.tree.map_structure(
        lambda leaf: tf.TensorSpec([examples, *leaf.shape[1:]], leaf.dtype), x
    )
    function = tf.function(call, autograph=False)
    return function.get_concrete_function(specs).graph


def _is_in_order(owners: dict, output: tf.Tensor) -> bool:
    """Whether row i of an output is of example i, and there is a row each."""
    if not output.shape.rank or output.shape[0] != _EXAMPLES:
        return False
    if output.ref() not in owners:
        return False  # It has as many rows by chance.
    rows = owners[output.ref()].reshape(_EXAMPLES, -1)
    own = np.arange(1, _EXAMPLES + 1)[:, None]
    return bool(((rows == 0) | (rows == own)).all())


def _owners(graph: tf.Graph, larger: tf.Graph) -> dict:
    """Goes through a graph, in its order, by the rules.

    Args:
        graph: Of a call on `_EXAMPLES` examples.
        larger: Of the same call on one more.

    Returns:
        Arrays of owners, by the references of tensors; without those that all
        examples share.
    """
    owners, sizes = {}, set()
    given = {tensor.ref() for tensor in graph.inputs}
    ours, theirs = graph.get_operations(), larger.get_operations()
    if [o.type for o in ours] != [o.type for o in theirs]:
        raise NotClaimedError("What is computed depends on how many there are.")
    for operation, twin in zip(ours, theirs):
        if operation.type == "Placeholder":
            for tensor in operation.outputs:
                if tensor.ref() in given and tensor.dtype != tf.resource:
                    owners[tensor.ref()] = _along(tensor.shape.as_list(), 0)
            continue
        _follow(operation, twin, owners, sizes)
    return owners


def _along(shape: Sequence[int], axis: int) -> np.ndarray:
    """Owners of a tensor whose axis runs over examples, and maybe more."""
    owner = 1 + np.arange(shape[axis]) * _EXAMPLES // shape[axis]
    return np.broadcast_to(
        owner.reshape([-1] + [1] * (len(shape) - axis - 1)), shape
    )


def _follow(operation, twin, owners: dict, sizes: set) -> None:
    """Adds the outputs of an operation to `owners`, or to `sizes`."""
    inputs = [owners.get(t.ref()) for t in operation.inputs]
    if operation.op_def.is_stateful and not ownership_rules.may_have_state(
        operation.type
    ):
        raise NotClaimedError(f"{operation.type} may change something.")
    telling = [i for i, t in enumerate(operation.inputs) if t.ref() in sizes]
    if any(owner is not None for owner in inputs):
        if not ownership_rules.are_sizes(operation, telling):
            raise NotClaimedError("A number of examples is computed with.")
        for output, own in zip(
            operation.outputs, ownership_rules.apply(operation, inputs)
        ):
            owners[output.ref()] = own
        return
    for output, other in zip(operation.outputs, twin.outputs):
        axes = _grown(output, other)
        if operation.type in ownership_rules.DRAWS and not axes:
            raise NotClaimedError("Random numbers are shared.")
        if axes and _is_alike(operation, telling, output, axes):
            # What is made for each of them belongs to them.
            owners[output.ref()] = _along(output.shape.as_list(), axes[0])
        else:
            differ = _differ(output, other)
            if axes or telling if differ is None else differ:
                sizes.add(output.ref())


def _grown(output: tf.Tensor, other: tf.Tensor) -> list[int]:
    """The axes that are larger where there is one more example."""
    if output.shape.rank is None or output.shape.rank != other.shape.rank:
        raise NotClaimedError(f"{output.op.type} has no known shape.")
    here, there = output.shape.as_list(), other.shape.as_list()
    if None in here or None in there:
        raise NotClaimedError(f"{output.op.type} has no known shape.")
    return [i for i, (a, b) in enumerate(zip(here, there)) if a != b]


def _is_alike(operation, telling, output: tf.Tensor, axes: list[int]) -> bool:
    """Whether a tensor without examples has the same for each of them."""
    if len(axes) != 1 or output.shape[axes[0]] % _EXAMPLES:
        return False
    if operation.type == "Const":
        values = tf.get_static_value(output)
        return bool((values == values.flat[0]).all())
    return ownership_rules.makes_alike(operation, telling, axes[0])


def _differ(output: tf.Tensor, other: tf.Tensor) -> bool | None:
    """Whether the two graphs have different values of a tensor, if known."""
    here, there = (
        ownership_rules.value_of(tensor) for tensor in (output, other)
    )
    if here is None or there is None:
        return None
    return not np.array_equal(here, there)
