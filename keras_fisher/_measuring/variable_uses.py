"""Where the variables of a model meet its examples, read from the graph.

Whatever layers a model is made of, TensorFlow sees operations. A variable may
pass through operations that no example takes part in (a cast, a reshape, a
scale by constants); the first operation that also depends on the examples is
a *use* of it. The gradient of an example's loss with respect to the variable
is a sum over its uses, each given by the operation's inputs and by the
derivative at its output.

Which axis of a tensor runs over examples is found by tracing the model twice,
with B and B + 1 examples: it is the axis whose size has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# On the way of a variable: the entries and their order stay.
_SAME = frozenset(
    ["Cast", "ExpandDims", "Identity", "ReadVariableOp", "Reshape", "Squeeze"]
)
# Entry by entry, if nothing is broadcast.
_ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "AddV2",
        "Div",
        "Exp",
        "Log",
        "Maximum",
        "Minimum",
        "Mul",
        "Neg",
        "Pow",
        "RealDiv",
        "Reciprocal",
        "Relu",
        "Rsqrt",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Square",
        "SquaredDifference",
        "Sub",
        "Tanh",
    ]
)
_CONVOLUTIONS = ("Conv2D", "Conv3D")


class Axis(NamedTuple):
    """The axis of a tensor that runs over examples.

    Attributes:
        position: Its number.
        repeats: How many entries of it belong to one example.
    """

    position: int
    repeats: int


class Layout:
    """Tells the axis of examples from a second trace of the same model.

    Args:
        batch_size: B, the number of examples in the graph at hand.
        shapes: The static output shapes of each operation, by its name, in
            a trace with B + 1 examples.
    """

    def __init__(self, batch_size: int, shapes: dict[str, list]):
        self.batch_size = batch_size
        self._shapes = shapes

    def axis(self, tensor: tf.Tensor) -> Axis | None:
        """The axis of examples; None if there is none, or more than one."""
        axes = self._changed(tensor)
        if axes is None or len(axes) != 1:
            return None
        position, growth = axes[0]
        if tensor.shape[position] != growth * self.batch_size:
            return None
        return Axis(position, growth)

    def may_vary(self, tensor: tf.Tensor) -> bool:
        """Whether the size of a tensor depends on the number of examples."""
        axes = self._changed(tensor)
        return axes is None or bool(axes)

    def _changed(self, tensor: tf.Tensor) -> list[tuple[int, int]] | None:
        shapes = self._shapes.get(tensor.op.name)
        if shapes is None or len(shapes) != len(tensor.op.outputs):
            return None
        here, there = static_shape(tensor), shapes[tensor.value_index]
        if here is None or there is None or len(here) != len(there):
            return None
        return [
            (i, b - a) for i, (a, b) in enumerate(zip(here, there)) if a != b
        ]


def static_shape(tensor: tf.Tensor) -> list[int] | None:
    """The shape of a tensor if all of it is known, else None."""
    if not tensor.shape.is_fully_defined():
        return None
    return tensor.shape.as_list()


def shapes_by_operation(graph: tf.Graph) -> dict[str, list]:
    """The static output shapes of each operation of a graph, by its name."""
    return {
        operation.name: [static_shape(output) for output in operation.outputs]
        for operation in graph.get_operations()
    }


@dataclasses.dataclass(frozen=True)
class Use:
    """A variable's meeting with the examples.

    Attributes:
        kind: Type of the operation.
        inputs: Its inputs.
        output: Its output.
        attribute: Function that gives an attribute by name.
        operand: Which of the inputs comes from the variable.
        scaled: Whether the entries of the variable were changed on their way
            to this input, each by itself. Otherwise they are the same.
        path: The permutations of axes on that way.
    """

    kind: str
    inputs: tuple
    output: tf.Tensor
    attribute: Callable[[str], Any]
    operand: int
    scaled: bool
    path: tuple

    @property
    def parameter(self) -> tf.Tensor:
        """The input that comes from the variable."""
        return self.inputs[self.operand]


@dataclasses.dataclass
class _Way:
    """How a tensor that no example takes part in comes from a variable."""

    known: bool = True
    scaled: bool = False
    path: tuple = ()


def ancestors(outputs: tf.Tensor) -> list[tf.Operation]:
    """All operations that lead to the outputs, in the order of the graph."""
    names, waiting = {outputs.op.name}, [outputs.op]
    while waiting:
        for tensor in waiting.pop().inputs:
            if tensor.op.name not in names:
                names.add(tensor.op.name)
                waiting.append(tensor.op)
    return [o for o in outputs.graph.get_operations() if o.name in names]


def dependent_on(
    sources: Sequence[tf.Tensor], operations: Sequence[tf.Operation]
) -> set[str]:
    """Names of the operations that depend on any of the sources."""
    names = {source.op.name for source in sources}
    for operation in operations:
        if any(tensor.op.name in names for tensor in operation.inputs):
            names.add(operation.name)
    return names


def find(
    variable: tf.Tensor,
    operations: Sequence[tf.Operation],
    varying: set[str],
    layout: Layout,
) -> list[Use] | None:
    """Finds the uses of a variable in the graph of a forward pass.

    Args:
        variable: The value of the variable in that graph.
        operations: Those that lead to the outputs, from `ancestors`.
        varying: Names of the operations that depend on the examples.
        layout: Of the graph.

    Returns:
        The uses, or None if the way to one of them is not understood.
    """
    ways = {_key(variable): _Way()}
    uses = []
    for operation in operations:
        hits = [k for k, t in enumerate(operation.inputs) if _key(t) in ways]
        if not hits:
            continue
        if operation.name in varying or any(
            layout.may_vary(output) for output in operation.outputs
        ):
            for k in hits:
                use = _use(operation, k, ways[_key(operation.inputs[k])])
                if use is None:
                    return None
                uses.append(use)
        else:
            way = _next(
                operation, [ways[_key(operation.inputs[k])] for k in hits]
            )
            for output in operation.outputs:
                ways[_key(output)] = way
    return uses


def _key(tensor: tf.Tensor) -> tuple[str, int]:
    return tensor.op.name, tensor.value_index


def _next(operation: tf.Operation, ways: list[_Way]) -> _Way:
    """The way to the outputs of an operation without examples."""
    scaled, path = any(way.scaled for way in ways), ways[0].path
    if not all(way.known and way.path == path for way in ways):
        return _Way(known=False)
    if operation.type in _SAME and len(ways) == 1:
        return _Way(scaled=scaled, path=path)
    if operation.type == "Transpose" and not scaled:
        order = tf.get_static_value(operation.inputs[1])
        if order is not None:
            shape = static_shape(operation.inputs[0])
            return _Way(path=(*path, (tuple(shape), tuple(order))))
    sizes = {tensor.shape.num_elements() for tensor in operation.inputs}
    if (
        operation.type in _ELEMENTWISE
        and not path
        and sizes <= {1, operation.outputs[0].shape.num_elements()}
    ):
        return _Way(scaled=True)
    return _Way(known=False)


def _use(operation: tf.Operation, operand: int, way: _Way) -> Use | None:
    kind, inputs, attribute = (
        operation.type,
        tuple(operation.inputs),
        operation.get_attr,
    )
    if kind in ("PartitionedCall", "StatefulPartitionedCall"):
        # Further outputs of a call are there for its derivative.
        attributes = _convolution_called(operation)
        if attributes is None:
            return None
        kind, attribute = "Convolution", attributes.__getitem__
        inputs, operand = (inputs[1 - operand], inputs[operand]), 1
    elif len(operation.outputs) != 1:
        return None
    if not way.known:
        return None
    return Use(
        kind=kind,
        inputs=inputs,
        output=operation.outputs[0],
        attribute=attribute,
        operand=operand,
        scaled=way.scaled,
        path=way.path,
    )


# Besides one convolution, what a function may hold that Keras has compiled.
_AROUND_CONVOLUTION = _SAME | {
    "BatchToSpaceND",
    "Const",
    "NoOp",
    "SpaceToBatchND",
}


def _convolution_called(operation: tf.Operation) -> dict | None:
    """The attributes of the convolution that a call is, if it is just one.

    Keras compiles grouped convolutions into functions of their own on CPUs.
    """
    name = operation.get_attr("f").name
    library = operation.graph.as_graph_def().library.function
    nodes = next(f for f in library if f.signature.name == name).node_def
    found = [node for node in nodes if node.op in _CONVOLUTIONS]
    others = {node.op for node in nodes} - set(_CONVOLUTIONS)
    if len(found) != 1 or not others <= _AROUND_CONVOLUTION:
        return None
    if len(operation.inputs) != 2:
        return None
    attributes = _attributes(found[0])
    ranks = [len(tensor.shape) for tensor in operation.inputs]
    if ranks[0] != ranks[1]:
        return None
    if "SpaceToBatchND" in others:
        block = _block_shape(nodes)
        if block is None:
            return None
        attributes["dilations"] = [1, *block, 1]
        # Padded by hand, where the sizes have stayed the same.
        same = (
            operation.inputs[0].shape[1:-1]
            == (operation.outputs[0].shape[1:-1])
        )
        attributes["padding"] = b"SAME" if same else b"VALID"
    spatial = ranks[0] - 2
    # A 1-D convolution is a 2-D one with a first axis of size 1.
    for key in ("strides", "dilations"):
        attributes[key] = [1, *attributes[key][-1 - spatial : -1], 1]
    return attributes


def _attributes(node) -> dict:
    return {
        "strides": list(node.attr["strides"].list.i),
        "dilations": list(node.attr["dilations"].list.i),
        "padding": node.attr["padding"].s,
        "explicit_paddings": list(node.attr["explicit_paddings"].list.i),
        "data_format": node.attr["data_format"].s,
    }


def _block_shape(nodes) -> list[int] | None:
    by_name = {node.name: node for node in nodes}
    space_to_batch = next(n for n in nodes if n.op == "SpaceToBatchND")
    block = by_name.get(space_to_batch.input[1].split(":")[0])
    if block is None or block.op != "Const":
        return None
    return np.atleast_1d(tf.make_ndarray(block.attr["value"].tensor)).tolist()
