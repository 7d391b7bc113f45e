"""What lies on the way from some tensors to others.

A difference of two passes carries their rounding errors, which are those of
the coarsest operation on the way: a bilinear resizing, that TensorFlow
computes in single precision whatever it gets, within a network of double
precision; any layer of `mixed_bfloat16` in front of a `float32` head. So the
graph of a pass is read, with the functions that it calls and the bodies of its
loops. What does not depend on where the way starts (constants, dropout masks)
or does not reach its end (losses, metrics) is not on it.

Derivatives also jump where a function has a kink. A step that is large enough
for single precision takes thousands of units of a network over theirs, and
what these add to the difference is divided by the step.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple
import warnings

import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import structures

# Reductions are not among them: a logarithm of sums of exponentials takes a
# maximum as well, which has no part in its derivative.
_KINKS = {
    "Abs",
    "ClipByValue",
    "LeakyRelu",
    "MaxPool",
    "MaxPool3D",
    "MaxPoolV2",
    "MaxPoolWithArgmax",
    "Maximum",
    "Minimum",
    "Relu",
    "Relu6",
    "Selu",
}


class Way(NamedTuple):
    """What was found.

    Attributes:
        precision: The coarsest dtype, real and of floating point.
        kinks: Sorted names of the operations whose derivative jumps.
    """

    precision: tf.DType
    kinks: tuple[str, ...] = ()


def of_graph(sources: list, outputs: Any) -> Way:
    """What is on it in the graph that `outputs` are tensors of.

    Args:
        sources: Variables, or tensors of that graph.
        outputs: A tensor, or a list or dict of tensors.

    Returns:
        A `Way`.
    """
    starts = [_start(source) for source in sources]
    ends = structures.leaves(outputs)
    graph = ends[0].graph
    found = [*_on_way(graph, {id(t) for t in starts}, ends, graph)]
    kinks = {t.op.type for t in found if _has_kink(t.op)}
    return Way(_lowest(t.dtype for t in [*found, *ends]), (*sorted(kinks),))


def of_function(
    function: Callable[[list], Any], arguments: list, otherwise: list
) -> Way:
    """What is on it in a function, which is traced and not run.

    Args:
        function: Of a list of tensors; changes nothing.
        arguments: Variables or tensors to trace it for.
        otherwise: The dtypes to go by if it cannot be traced; kinks are not
            known then.

    Returns:
        A `Way`.
    """
    found = []

    def trace(*tensors):
        outputs = function([*tensors])
        found.append(of_graph([*tensors], outputs))

    specs = [tf.TensorSpec(a.shape, a.dtype) for a in arguments]
    try:
        tf.function(trace, autograph=False).get_concrete_function(*specs)
    except Exception:  # Of code that only runs eagerly, whichever it is.
        return Way(_lowest(otherwise))
    return found[0]


def warn_of_kinks(found: Way, what: str, remedy: str) -> None:
    """Warns of a difference of two passes that jumps of a derivative spoil.

    Args:
        found: What is on the way of a pass.
        what: That is computed by the difference, at the start of a sentence.
        remedy: What to do about it, in sentences.
    """
    if found.kinks and found.precision != tf.float64:
        warnings.warn(
            f"{what} is likely to be mostly noise: the model computes in "
            f"{found.precision.name}, and its derivative jumps in kinks, those "
            f"of {', '.join(found.kinks)}. {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _has_kink(operation: tf.Operation) -> bool:
    if operation.type not in ("Maximum", "Minimum"):
        return operation.type in _KINKS
    # Casts that saturate have bounds that are never met, and so has what keeps
    # a norm from being zero.
    bounds = map(tf.get_static_value, operation.inputs)
    return not any(
        bound is not None
        and np.all((bound != 0) & ((abs(bound) < 1e-6) | (abs(bound) > 6e4)))
        for bound in bounds
    )


def _lowest(found: Iterable[tf.DType]) -> tf.DType:
    real = [tf.as_dtype(dtype).real_dtype for dtype in found]
    return max(real, key=dtypes.rounding_unit)


def _start(source) -> tf.Tensor:
    """Where the values of a variable come into the graph, or a tensor."""
    tensor = tf.convert_to_tensor(source)
    while tensor is not source and tensor.op.inputs:
        tensor = tensor.op.inputs[0]
    return tensor


def _on_way(
    graph: tf.Graph, starts: set[int], ends: list, library: tf.Graph
) -> Iterator[tf.Tensor]:
    """The numbers from some tensors to others in one graph."""
    needed = _ancestors(ends)
    reached = _reached(graph, starts, needed, library)
    for operation in needed:
        for output in operation.outputs:
            if id(output) in reached and _is_number(output.dtype):
                yield output
        for body in _bodies(operation, library):
            inside = _entered(operation, body, reached)
            is_loop = operation.type.endswith("While")
            yield from _on_way(
                body,
                {id(t) for t in _closed(body, inside, is_loop, library)},
                body.outputs,
                library,
            )


def _ancestors(ends: list) -> list[tf.Operation]:
    """All operations that tensors are computed by, themselves included."""
    found, left = {}, [tensor.op for tensor in ends]
    while left:
        operation = left.pop()
        if operation not in found:
            found[operation] = None
            left += [tensor.op for tensor in operation.inputs]
    return [*found]


def _reached(graph, starts: set[int], needed: list, library) -> set[int]:
    """Which tensors depend on others, by their `id`; these as well."""
    reached, needed = {*starts}, {*needed}
    # Inputs stand before what is computed from them.
    for operation in graph.get_operations():
        if operation not in needed:
            continue
        if not any(id(t) in reached for t in operation.inputs):
            continue
        bodies = _bodies(operation, library)
        for position, output in enumerate(operation.outputs):
            if not _carries(output.dtype):
                continue
            if not bodies or any(
                position in _left(operation, body, reached, library)
                for body in bodies
            ):
                reached.add(id(output))
    return reached


def _bodies(operation: tf.Operation, library: tf.Graph) -> list:
    """The graphs of the functions that an operation calls."""
    names = []
    for value in operation.node_def.attr.values():
        names += [value.func.name, *(f.name for f in value.list.func)]
    # TensorFlow has no public way from a name to its function.
    functions = [library._get_function(name) for name in names if name]
    graphs = [function.graph for function in functions if function]
    return [
        graph
        for graph in graphs
        if len(graph.outputs) == len(operation.outputs)
        and len(graph.inputs) <= len(operation.inputs)
    ]


def _entered(operation, body, reached: set[int]) -> list:
    """Inputs of a function that a call gives what is reached."""
    # Conditions have another one in front.
    given = operation.inputs[len(operation.inputs) - len(body.inputs) :]
    return [b for a, b in zip(given, body.inputs) if id(a) in reached]


def _left(operation, body, reached, library) -> list[int]:
    """Positions of the outputs of a call that are reached through it."""
    is_loop = operation.type.endswith("While")
    inside = _entered(operation, body, reached)
    inside = _closed(body, inside, is_loop, library)
    ids = {id(t) for t in inside}
    if is_loop:
        return [i for i, t in enumerate(body.inputs) if id(t) in ids]
    found = _reached(body, ids, _ancestors(body.outputs), library)
    return [i for i, t in enumerate(body.outputs) if id(t) in found]


def _closed(body, inside: list, is_loop: bool, library) -> list:
    """Inputs of a function, with those that are reached in a next turn."""
    while is_loop:
        ids = {id(t) for t in inside}
        found = _reached(body, ids, _ancestors(body.outputs), library)
        after = [
            into
            for into, out in zip(body.inputs, body.outputs)
            if id(into) in ids or id(out) in found
        ]
        if len(after) == len(inside):
            break
        inside = after
    return inside


def _is_number(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_complex


def _carries(dtype: tf.DType) -> bool:
    """Whether what is of this dtype may hold numbers with derivatives."""
    return _is_number(dtype) or dtype in (tf.resource, tf.variant)
