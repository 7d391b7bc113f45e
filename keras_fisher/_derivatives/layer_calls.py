"""Which layers of a model are called, with what, and what of it moves."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import json
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._derivatives import catalogue


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer, with the arguments that it got.

    Attributes:
        operation: The layer or operation.
        arguments: Its arguments, by position and by name.
        moving: Which of the tensors in them depend on a variable.
    """

    operation: keras.Operation
    arguments: tuple[tuple, dict]
    moving: list[bool]

    @property
    def variables(self) -> list[keras.Variable]:
        return getattr(self.operation, "trainable_variables", [])

    def sources(self) -> list[tf.Tensor]:
        """What to differentiate by: inputs, then trainable variables."""
        leaves = keras.tree.flatten(self.arguments)
        return [
            *(
                # One that is given twice would be one to tapes.
                tf.identity(leaf)
                for leaf, moves in zip(leaves, self.moving)
                if moves
            ),
            *(tf.convert_to_tensor(v.value) for v in self.variables),
        ]

    def kind(self) -> Any:
        """What is the same for calls that do the same."""
        try:
            config = keras.saving.serialize_keras_object(self.operation)
            what = json.dumps(_without_names(config))
        except Exception:  # Layers of other people's, which need have none.
            what = id(self.operation)
        own = vars(self.operation).get("call")  # that a user has set
        functions = own, *catalogue.functions_in(self.operation)
        leaves = keras.tree.flatten(self.arguments)
        return (
            what,
            tuple(map(id, functions)),
            tuple(
                (leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else repr(leaf)
                for leaf in leaves
            ),
            tuple(self.moving),
        )

    def __call__(self, values: Sequence[tf.Tensor]) -> Any:
        given = iter(values)
        leaves = [
            next(given) if moves else leaf
            for leaf, moves in zip(
                keras.tree.flatten(self.arguments), self.moving
            )
        ]
        args, kwargs = keras.tree.pack_sequence_as(self.arguments, leaves)
        return self.operation(*args, **kwargs)


def _without_names(config: Any) -> Any:
    """What `get_config` says, but for what layers are called."""
    if isinstance(config, dict):
        return {
            key: _without_names(value)
            for key, value in config.items()
            if key != "name"
        }
    if isinstance(config, list | tuple):
        return [*map(_without_names, config)]
    return config


def record(
    layer: keras.layers.Layer,
    x: Any,
    chosen: Sequence[keras.Operation],
    training: bool,
) -> list[LayerCall]:
    """Calls a model on `x`; the calls of the `chosen` layers, in their order.

    Nothing that the model assigns stays.
    """
    variables = [v.value for v in layer.trainable_variables]
    calls: list[tuple] = []
    with (
        tf.GradientTape(persistent=True) as tape,
        keras.StatelessScope(),
        contextlib.ExitStack() as stack,
    ):
        for operation in chosen:
            stack.enter_context(_spied_on(operation, calls))
        layer(x, training=training)

    # What moves with a variable, so far: no tape is gone back twice.
    known = [*variables]

    def depends(leaf) -> bool:
        if isinstance(leaf, keras.Variable):
            return any(leaf is v for v in layer.trainable_variables)
        if not is_floating(leaf):
            return False
        found = tape.gradient(leaf, known)
        moves = any(gradient is not None for gradient in found)
        if moves:
            known.append(leaf)
        return moves

    return [
        LayerCall(
            operation,
            arguments,
            [depends(leaf) for leaf in keras.tree.flatten(arguments)],
        )
        for operation, arguments in calls
    ]


@contextlib.contextmanager
def _spied_on(operation: keras.Operation, calls: list):
    """Notes the calls of a layer; in between, it has a `call` of its own."""
    own = vars(operation).get("call")
    call = operation.call

    def noting(*args, **kwargs):
        calls.append((operation, (args, kwargs)))
        return call(*args, **kwargs)

    operation.call = noting
    try:
        yield
    finally:
        del operation.call
        if own is not None:
            operation.call = own


def is_floating(leaf: Any) -> bool:
    """Whether it is a tensor of numbers that have derivatives."""
    return tf.is_tensor(leaf) and leaf.dtype.is_floating
