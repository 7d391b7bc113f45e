"""What operations of TensorFlow do to the owners of entries.

An owner is the number, from 1 on, of the example that an entry comes from, or
0 for what all examples share. Arrays of owners have the shape of the tensor; in
place of that of a shared tensor stands None.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import functools

import numpy as np
import tensorflow as tf

Owners = np.ndarray | None
_LARGEST_SIZE = 64  # entries of a tensor that says how large another one is


class NotClaimedError(Exception):
    """An entry has two owners, or nobody knows whose it is."""


def apply(operation: tf.Operation, owners: list[Owners]) -> list[np.ndarray]:
    """The owners of the outputs of an operation.

    Args:
        operation: With inputs and outputs of known shapes.
        owners: Of its inputs; not all None.

    Raises:
        NotClaimedError: If an entry has two, or there is no rule.
    """
    rule = _RULES.get(operation.type)
    if rule is None:
        raise NotClaimedError(f"There is no rule for {operation.type}.")
    return rule(operation, owners)


def may_have_state(kind: str) -> bool:
    """Whether a stateful type of operation changes nothing that matters."""
    return kind in DRAWS or kind in ("ReadVariableOp", "Placeholder")


def are_sizes(operation: tf.Operation, positions: Sequence[int]) -> bool:
    """Whether these inputs say nothing but how large the outputs are."""
    return set(positions) <= _SIZES.get(operation.type, set())


def makes_alike(
    operation: tf.Operation, positions: Sequence[int], axis: int
) -> bool:
    """Whether an operation without examples makes the same for each of them.

    Equal numbers, or random ones of the same distribution.

    Args:
        operation: The operation.
        positions: The inputs that tell how many examples there are.
        axis: The axis of its output that runs over them.
    """
    if not are_sizes(operation, positions):
        return False
    if operation.type in ("BroadcastTo", "Tile"):
        shape = operation.inputs[0].shape
        missing = operation.outputs[0].shape.rank - shape.rank
        return axis < missing or shape[axis - missing] == 1
    return operation.type == "Fill" or operation.type in DRAWS


def run(operation: tf.Operation, values: Sequence) -> list[np.ndarray]:
    """Runs an operation on other values of its inputs, now."""
    arguments, left = {}, iter(values)
    inferred = set()
    for argument in operation.op_def.input_arg:
        inferred |= {argument.type_attr, argument.number_attr}
        name = _RENAMED.get(argument.name, argument.name)
        if argument.number_attr:
            count = operation.get_attr(argument.number_attr)
            arguments[name] = [next(left) for _ in range(count)]
        else:
            arguments[name] = next(left)
    for attribute in operation.op_def.attr:
        if attribute.name not in inferred:
            name = _RENAMED.get(attribute.name, attribute.name)
            arguments[name] = operation.get_attr(attribute.name)
    found = getattr(tf.raw_ops, operation.type)(**arguments)
    several = isinstance(found, (list, tuple))
    return [tensor.numpy() for tensor in (found if several else [found])]


def value_of(tensor: tf.Tensor, depth: int = 8) -> np.ndarray | None:
    """The value of a tensor that is computed from constants, and small."""
    value, operation = tf.get_static_value(tensor), tensor.op
    if value is not None or not (
        tensor.dtype.is_integer or tensor.dtype.is_bool
    ):
        return value
    small = tensor.shape.num_elements() <= _LARGEST_SIZE
    if not small or depth == 0 or operation.op_def.is_stateful:
        return None
    inputs = [value_of(t, depth - 1) for t in operation.inputs]
    if not inputs or any(value is None for value in inputs):
        return None
    values = [tf.constant(v, t.dtype) for v, t in zip(inputs, operation.inputs)]
    return run(operation, values)[tensor.value_index]


# The rules.


def _combined(owners: Sequence[np.ndarray]) -> np.ndarray:
    """Entry by entry, after broadcasting."""

    def both(a, b):
        if ((a != b) & (a != 0) & (b != 0)).any():
            raise NotClaimedError("An entry comes from two examples.")
        return np.maximum(a, b)

    return functools.reduce(both, owners)


def _reduced(owners: np.ndarray, axes, keepdims: bool = False) -> np.ndarray:
    """The one owner of all entries along some axes."""
    largest = owners.max(axis=axes, keepdims=True, initial=0)
    if ((owners != largest) & (owners != 0)).any():
        raise NotClaimedError("Entries of several examples are reduced to one.")
    return largest if keepdims else largest.squeeze(axes)


def _spread(owners: np.ndarray, operation) -> list[np.ndarray]:
    """Owners that are broadcast to the outputs of an operation."""
    return [
        np.broadcast_to(owners, output.shape.as_list())
        for output in operation.outputs
    ]


def _static(tensor: tf.Tensor) -> np.ndarray:
    value = value_of(tensor)
    if value is None:
        raise NotClaimedError(f"{tensor.op.type} is not known beforehand.")
    return value


def _axes(tensor: tf.Tensor, rank: int) -> tuple[int, ...]:
    return tuple(int(axis) % rank for axis in np.ravel(_static(tensor)))


def _elementwise(operation, owners):
    there = [owner for owner in owners if owner is not None]
    return _spread(_combined(there), operation)


def _move(operation, owners):
    """Runs the operation on the owners; what is shared has owner 0."""
    values = [
        _owners_or_values(operation, i, owner) for i, owner in enumerate(owners)
    ]
    return run(operation, values)


def _owners_or_values(operation, position: int, owner: Owners):
    if owner is not None:
        return tf.constant(owner, tf.int32)
    tensor = operation.inputs[position]
    controls = _CONTROLS[operation.type]
    if operation.type in ("BroadcastTo", "Reshape"):
        return tf.constant(operation.outputs[0].shape.as_list())
    if position in controls or position - len(operation.inputs) in controls:
        return tf.constant(_static(tensor), tensor.dtype)
    return tf.zeros(tensor.shape, tf.int32)


def _reduction(operation, owners):
    own, axes = owners[0], _axes(operation.inputs[1], owners[0].ndim)
    keepdims = "keep_dims" in operation.node_def.attr and operation.get_attr(
        "keep_dims"
    )
    return [_reduced(own, axes, keepdims)]


def _last_axis(operation, owners):
    """What mixes the entries of the last axis, as a softmax does."""
    if any(owner is not None for owner in owners[1:]):
        raise NotClaimedError(f"{operation.type} is steered by an example.")
    return _spread(_reduced(owners[0], (-1,), keepdims=True), operation)


def _given_axis(operation, owners):
    """What mixes the entries along an axis, as a cumulative sum does."""
    axes = _axes(operation.inputs[1], owners[0].ndim)
    return _spread(_reduced(owners[0], axes, keepdims=True), operation)


def _one_a_row(owners: np.ndarray) -> np.ndarray:
    """The one owner of each row, along the first axis."""
    return _reduced(owners, tuple(range(1, owners.ndim)), keepdims=True)


def _of_rows(position: int, operation, owners):
    """What treats each row by itself, as convolutions do with images."""
    if any(o is not None for i, o in enumerate(owners) if i != position):
        raise NotClaimedError(f"{operation.type} has a kernel of an example.")
    return _spread(_one_a_row(owners[position]), operation)


def _normalization(operation, owners):
    if operation.get_attr("is_training"):
        raise NotClaimedError("Batch normalization goes over the batch.")
    if any(owner is not None for owner in owners[1:]):
        raise NotClaimedError("The statistics are of an example.")
    # The other outputs are the statistics that went in.
    shape = operation.outputs[0].shape.as_list()
    return [np.broadcast_to(_one_a_row(owners[0]), shape)]


def _gather(operation, owners):
    values, indices, axis = owners
    if axis is not None or (values is not None and indices is not None):
        raise NotClaimedError("Entries are picked from several examples.")
    if values is not None:
        return _move(operation, owners)
    if operation.get_attr("batch_dims"):
        raise NotClaimedError("Entries are picked example by example.")
    (at,) = _axes(operation.inputs[2], operation.inputs[0].shape.rank)
    after = operation.inputs[0].shape.rank - at - 1
    return _spread(indices.reshape([*indices.shape, *[1] * after]), operation)


def _contraction(equation: str, operation, owners):
    """Owners through an Einstein sum, each axis by its label."""
    terms, result = equation.split("->")
    labels = [*map(_labels, terms.split(","), operation.inputs)]
    wanted = _labels(result, operation.outputs[0])
    found = []
    for own, names in zip(owners, labels):
        if own is None:
            continue
        if len({*names}) < len(names):
            raise NotClaimedError("A diagonal is taken.")
        summed = tuple(i for i, n in enumerate(names) if n not in wanted)
        own = _reduced(own, summed)
        names = [name for name in names if name in wanted]
        order = sorted(range(len(names)), key=lambda i: wanted.index(names[i]))
        own = own.transpose(order)
        index = [slice(None) if n in names else None for n in wanted]
        found.append(own[tuple(index)])
    return _spread(_combined(found), operation)


def _labels(term: str, tensor: tf.Tensor) -> list[str]:
    """A label for each axis; those of an ellipsis are counted from its end."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    more = tensor.shape.rank - len(before) - len(after)
    dots = [f".{more - i}" for i in range(more)]
    return [*before, *dots, *after]


def _einsum(operation, owners):
    equation = operation.get_attr("equation").decode()
    return _contraction(equation, operation, owners)


def _matrix_product(operation, owners):
    names = [a.name for a in operation.op_def.attr]
    a, b = (
        ("transpose_a", "transpose_b")
        if "transpose_a" in names
        else ("adj_x", "adj_y")
    )
    left = "kn" if operation.get_attr(a) else "nk"
    right = "mk" if operation.get_attr(b) else "km"
    return _contraction(f"...{left},...{right}->...nm", operation, owners)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DRAWS = _words(
    "RandomStandardNormal RandomUniform RandomUniformInt "
    "StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform "
    "StatelessRandomUniformFullInt StatelessRandomUniformFullIntV2 "
    "StatelessRandomUniformInt StatelessRandomUniformIntV2 "
    "StatelessRandomUniformV2 StatelessTruncatedNormal "
    "StatelessTruncatedNormalV2 TruncatedNormal"
)
_ELEMENTWISE = _words(
    "Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh BiasAdd Cast "
    "Ceil CheckNumerics ClipByValue Cos Cosh Div DivNoNan Elu Equal Erf Erfc "
    "Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual Identity IsFinite "
    "IsInf IsNan LeakyRelu Less LessEqual Log Log1p LogicalAnd LogicalNot "
    "LogicalOr Maximum Minimum Mod Mul MulNoNan Neg NotEqual OnesLike Pow "
    "PreventGradient RealDiv Reciprocal Relu Relu6 Rint Round Rsqrt SelectV2 "
    "Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square "
    "SquaredDifference StopGradient Sub Tan Tanh TruncateDiv Xdivy Xlogy "
    "ZerosLike"
)
# What `tf.raw_ops` calls otherwise than operations themselves do.
_RENAMED = dict.fromkeys(
    ("dim", "reduction_indices", "split_dim", "squeeze_dims"), "axis"
)
# Which of the inputs of operations that move entries say where to.
_CONTROLS = {
    "BatchToSpaceND": {1, 2},
    "BroadcastTo": {1},
    "ConcatV2": {-1},
    "DepthToSpace": (),
    "ExpandDims": {1},
    "GatherV2": {1, 2},
    "MirrorPad": {1},
    "Pack": (),
    "Pad": {1},
    "PadV2": {1},
    "Reshape": {1},
    "ReverseV2": {1},
    "Roll": {1, 2},
    "Slice": {1, 2},
    "SpaceToBatchND": {1, 2},
    "SpaceToDepth": (),
    "Split": {0},
    "SplitV": {1, 2},
    "Squeeze": (),
    "StridedSlice": {1, 2, 3},
    "Tile": {1},
    "Transpose": {1},
    "Unpack": (),
}
# Which inputs may tell how many examples there are, and do no more than that.
_SIZES = {
    "BroadcastTo": {1},
    "Conv2DBackpropInput": {0},
    "Conv3DBackpropInputV2": {0},
    "Fill": {0},
    "Reshape": {1},
    "Slice": {1, 2},
    "StridedSlice": {1, 2, 3},
    "Tile": {1},
    **{kind: {0} for kind in DRAWS},
}
_RULES: dict[str, Callable] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_CONTROLS, _move),
    "GatherV2": _gather,
    **dict.fromkeys(
        _words("All Any ArgMax ArgMin EuclideanNorm Max Mean Min Prod Sum"),
        _reduction,
    ),
    **dict.fromkeys(_words("LogSoftmax Softmax TopKV2"), _last_axis),
    **dict.fromkeys(_words("Cumprod Cumsum"), _given_axis),
    **dict.fromkeys(
        _words(
            "AvgPool AvgPool3D Conv2D Conv3D DepthwiseConv2dNative "
            "ExtractImagePatches LRN MaxPool MaxPool3D ResizeArea "
            "ResizeBicubic ResizeBilinear ResizeNearestNeighbor"
        ),
        functools.partial(_of_rows, 0),
    ),
    **dict.fromkeys(
        _words("Conv2DBackpropInput Conv3DBackpropInputV2"),
        functools.partial(_of_rows, 2),
    ),
    "Einsum": _einsum,
    "FusedBatchNormV3": _normalization,
    "MatMul": _matrix_product,
    "BatchMatMulV2": _matrix_product,
}
