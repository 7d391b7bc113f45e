"""How each kind of operation uses a variable, for `norms`.

A rule takes a use and the layout of its graph. It returns None where the use is
of a kind that it does not know; the variable is then differentiated example by
example. `_RULES` says which operations it is for.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import math

import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._measuring.norms import Factors
from keras_fisher._measuring.norms import Norms
from keras_fisher._measuring.norms import Products
from keras_fisher._measuring.norms import Rows
from keras_fisher._measuring.norms import Vectors
from keras_fisher._measuring.variable_uses import Axis
from keras_fisher._measuring.variable_uses import Layout
from keras_fisher._measuring.variable_uses import Use


def _examples_first(x: tf.Tensor, axis: Axis, batch: int, block_major: bool):
    """Moves the axis of examples to the front, and their repeats behind it.

    Returns:
        Tensor of shape `(B, repeats, ...)`.
    """
    if axis.position:
        rest = [i for i in range(x.shape.rank) if i != axis.position]
        x = tf.transpose(x, [axis.position, *rest])
    rest = x.shape[1:]
    if not block_major:
        return tf.reshape(x, [batch, axis.repeats, *rest])
    x = tf.reshape(x, [axis.repeats, batch, *rest])
    return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])


def _is_block_major(x: tf.Tensor) -> bool:
    # Dilated convolutions cut each example up, and put the first pieces of
    # all examples before the second ones.
    while x.op.type in ("ExpandDims", "Identity", "Squeeze"):
        x = x.op.inputs[0]
    return x.op.type == "SpaceToBatchND"


def _contraction(use: Use, layout: Layout) -> Factors | None:
    """A product of matrices, in any of its notations."""
    axis = layout.axis(use.output)
    labels = None if axis is None else _labels(use)
    if labels is None:
        return None
    of_parameter, of_input, of_output = labels
    other = use.inputs[1 - use.operand]
    # A weight is of the same size however many examples there are.
    batch_label = of_output[axis.position]
    if layout.axis(other) != Axis(of_input.index(batch_label), axis.repeats):
        return None
    kinds = {
        "columns": [x for x in of_input if x not in of_output],
        "width": [x for x in of_output if x not in of_input],
        "rows": [
            x for x in of_output if x in of_input and x not in of_parameter
        ],
        "groups": [x for x in of_output if x in of_input and x in of_parameter],
    }
    named = {*kinds["columns"], *kinds["width"], *kinds["groups"]}
    if set(of_parameter) != named:
        return None
    sizes = dict(zip(of_output, use.output.shape))
    sizes |= dict(zip(of_input, other.shape))
    kinds["rows"].remove(batch_label)
    size = {
        kind: math.prod(sizes[label] for label in kinds[kind]) for kind in kinds
    }
    size["rows"] *= axis.repeats
    batch = layout.batch_size

    def arranged(x, labels, last):
        order = [batch_label, *kinds["rows"], *kinds["groups"], *kinds[last]]
        x = dtypes.precise(x)
        permutation = [labels.index(label) for label in order]
        if permutation != [*range(len(order))]:
            x = tf.transpose(x, permutation)
        return tf.reshape(x, [batch, size["rows"], size["groups"], size[last]])

    return Factors(
        rows=size["rows"],
        columns=size["columns"],
        blocks=1,
        groups=size["groups"],
        width=size["width"],
        left=lambda d: lambda block: arranged(other, of_input, "columns"),
        right=lambda d: arranged(d, of_output, "width"),
        left_is_fixed=True,
    )


def _labels(use: Use) -> tuple[str, str, str] | None:
    """Names of the axes of the parameter, the other input and the output."""
    if use.kind == "Einsum":
        equation = use.attribute("equation").decode()
        inputs, output = equation.split("->")
        labels = inputs.split(",")
        if "." in equation or len(labels) != 2:
            return None
        if any(len(set(x)) < len(x) for x in (*labels, output)):
            return None
        return labels[use.operand], labels[1 - use.operand], output
    if use.kind == "MatMul":
        flips = use.attribute("transpose_a"), use.attribute("transpose_b")
    else:
        flips = use.attribute("adj_x"), use.attribute("adj_y")
    if use.parameter.shape.rank > 2:
        return None
    rank = use.output.shape.rank
    parts = "abcdefg"[: rank - 2]
    labels = []
    for axes, flip in zip(("ij", "jk"), flips):
        labels.append(axes[::-1] if flip else axes)
    labels[1 - use.operand] = parts + labels[1 - use.operand]
    return labels[use.operand], labels[1 - use.operand], parts + "ik"


@dataclasses.dataclass(frozen=True)
class _Window:
    """The window that a convolution slides over one of its sides.

    The large side is slid over, the small side has an entry for each place.

    Attributes:
        large: Shape of the large side, without examples; channels last.
        small: Shape of the small side.
        kernel: Sizes of the window.
        strides: Of its places.
        dilations: Of what it sees.
        paddings: Zeros before and after, along each axis.
    """

    large: list[int]
    small: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    paddings: list[tuple[int, int]]

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """The places within it."""
        return [*itertools.product(*map(range, self.kernel))]

    def padded(self, x: tf.Tensor) -> tf.Tensor:
        """The large side with its zeros."""
        if all(padding == (0, 0) for padding in self.paddings):
            return x
        return tf.pad(x, [(0, 0), *self.paddings, (0, 0)])

    def at(self, offset: tuple[int, ...], x: tf.Tensor) -> tf.Tensor:
        """What is seen at an offset, for each place of the window."""
        begins = [o * d for o, d in zip(offset, self.dilations)]
        slices = [
            slice(b, b + (n - 1) * s + 1, s)
            for b, n, s in zip(begins, self.small, self.strides)
        ]
        return x[(slice(None), *slices)]


def _convolution(use: Use, layout: Layout) -> Factors | None:
    """A convolution, transposed, grouped or depthwise or not."""
    transposed = use.kind.startswith(("Conv2DBackprop", "Conv3DBackprop"))
    other = use.inputs[2] if transposed else use.inputs[0]
    kernel = use.parameter.shape.as_list()
    spatial = len(kernel) - 2
    axis, batch = layout.axis(use.output), layout.batch_size
    if axis is None or axis.position != 0 or layout.axis(other) != axis:
        return None
    channels_first = use.attribute("data_format").startswith(b"NC")
    block_major = _is_block_major(other)

    def arranged(x):
        """To `(B·repeats, ..., channels)`, with repeats behind examples."""
        x = dtypes.precise(x)
        if channels_first:
            x = tf.transpose(x, [0, *range(2, spatial + 2), 1])
        if block_major:
            x = _examples_first(x, axis, batch, block_major)
            x = tf.reshape(x, [-1, *x.shape[2:]])
        return x

    window = _window(use, other, transposed, channels_first)
    depthwise = use.kind.startswith("Depthwise")
    channels, features = window.large[-1], window.small[-1]
    groups = channels if depthwise else channels // kernel[spatial]
    columns, width = channels // groups, features // groups
    rows = axis.repeats * math.prod(window.small[:-1])
    offsets = window.offsets
    # Patches no larger than the other factor are kept, for all passes.
    joined = not depthwise and groups == 1 and len(offsets) * columns <= width

    def left(d):
        x = window.padded(arranged(d if transposed else other))

        def of_block(block):
            chosen = offsets if joined else [offsets[block]]
            seen = tf.concat([window.at(o, x) for o in chosen], axis=-1)
            return tf.reshape(seen, [batch, rows, groups, -1])

        return of_block

    def right(d):
        x = arranged(other if transposed else d)
        return tf.reshape(x, [batch, rows, groups, width])

    return Factors(
        rows=rows,
        columns=columns * (len(offsets) if joined else 1),
        blocks=1 if joined else len(offsets),
        groups=groups,
        width=width,
        left=left,
        right=right,
        left_is_fixed=not transposed,
    )


def _window(
    use: Use, other: tf.Tensor, transposed: bool, channels_first: bool
) -> _Window:
    """The window of a use in a convolution."""

    def shape_of(x):
        shape = x.shape.as_list()
        return [*shape[2:], shape[1]] if channels_first else shape[1:]

    kernel = use.parameter.shape.as_list()[:-2]
    begin = 2 if channels_first else 1
    end = begin + len(kernel)
    strides = use.attribute("strides")[begin:end]
    dilations = use.attribute("dilations")[begin:end]
    large, small = shape_of(other), shape_of(use.output)
    if transposed:
        large, small = small, large
    padding = use.attribute("padding")
    if padding == b"EXPLICIT":
        explicit = use.attribute("explicit_paddings")
        paddings = [
            (explicit[2 * i], explicit[2 * i + 1]) for i in range(begin, end)
        ]
    elif padding == b"VALID":
        paddings = [(0, 0)] * len(kernel)
    else:
        paddings = []
        for n, m, k, s, d in zip(large, small, kernel, strides, dilations):
            total = max((m - 1) * s + (k - 1) * d + 1 - n, 0)
            paddings.append((total // 2, total - total // 2))
    return _Window(large, small, kernel, strides, dilations, paddings)


def _elementwise(use: Use, layout: Layout) -> Callable | None:
    """An operation that broadcasts the parameter over examples."""
    other = use.inputs[1 - use.operand]
    shape = use.parameter.shape.as_list()
    axis, rank = layout.axis(use.output), use.output.shape.rank
    if axis is None or layout.axis(other) != axis:
        return None
    if use.kind == "BiasAdd":
        operation = tf.raw_ops.AddV2
        if use.attribute("data_format") == b"NCHW":
            shape = [*shape, *[1] * (rank - 2)]
    else:
        operation = getattr(tf.raw_ops, use.kind)
    shape = [1] * (rank - len(shape)) + shape
    batch = layout.batch_size
    repeated = list(shape)
    repeated[axis.position] = batch * axis.repeats
    block_major = _is_block_major(other)

    def gradients(d):
        # The derivative by a copy of the parameter for each example, which
        # TensorFlow sums over all other axes by itself.
        parameter = tf.broadcast_to(
            dtypes.precise(tf.reshape(use.parameter, shape)), repeated
        )
        operands = [dtypes.precise(other)] * 2
        operands[use.operand] = parameter
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameter)
            output = operation(x=operands[0], y=operands[1])
        gradient = tape.gradient(
            output, parameter, output_gradients=dtypes.precise(d)
        )
        gradient = _examples_first(gradient, axis, batch, block_major)
        return tf.reshape(tf.reduce_sum(gradient, axis=1), [batch, -1])

    return gradients


def _broadcast(use: Use, layout: Layout) -> Callable | None:
    """A parameter that is repeated for each example, as a class token."""
    axis, shape = layout.axis(use.output), use.parameter.shape.as_list()
    if axis is None:
        return None
    rank = use.output.shape.rank
    shape = [1] * (rank - len(shape)) + shape
    new = [i for i, (a, b) in enumerate(zip(shape, use.output.shape)) if a != b]
    if axis.position not in new or any(shape[i] != 1 for i in new):
        return None
    batch = layout.batch_size
    others = [i + 1 + (i < axis.position) for i in new if i != axis.position]

    def gradients(d):
        d = dtypes.precise(d)
        d = _examples_first(d, axis, batch, block_major=False)
        return tf.reshape(tf.reduce_sum(d, axis=[1, *others]), [batch, -1])

    return gradients


def _lookup(use: Use, layout: Layout) -> tuple | None:
    """Rows picked by indices."""
    indices = use.inputs[1]
    axis = layout.axis(indices)
    if axis is None or tf.get_static_value(use.inputs[2]) != 0:
        return None
    batch = layout.batch_size
    width = math.prod(use.parameter.shape[1:])

    def by_example(x, last):
        x = _examples_first(x, axis, batch, block_major=False)
        return tf.reshape(x, [batch, -1, *last])

    return by_example(indices, []), lambda d: by_example(
        dtypes.precise(d), [width]
    )


_RULES = {
    **dict.fromkeys(("MatMul", "BatchMatMulV2", "Einsum"), _contraction),
    **dict.fromkeys(
        (
            "Convolution",
            "Conv2D",
            "Conv3D",
            "DepthwiseConv2dNative",
            "Conv2DBackpropInput",
            "Conv3DBackpropInputV2",
        ),
        _convolution,
    ),
    **dict.fromkeys(
        (
            "Add",
            "AddV2",
            "BiasAdd",
            "Maximum",
            "Minimum",
            "Mul",
            "Pow",
            "RealDiv",
            "SquaredDifference",
            "Sub",
        ),
        _elementwise,
    ),
    "BroadcastTo": _broadcast,
    "Tile": _broadcast,
    "GatherV2": _lookup,
}


def norms_of(
    uses: list[Use] | None,
    layout: Layout,
    scale_of: Callable[[tf.Tensor], tf.Tensor],
    passes: int,
) -> Norms | None:
    """Puts the uses of one variable together.

    Args:
        uses: From `variable_uses.find`.
        layout: Of their graph.
        scale_of: Gives the derivative of a use's parameter by the variable,
            entry by entry, where it is scaled.
        passes: How often norms will be asked for, about.

    Returns:
        None if there is no use, or one of a kind that is not known here.
    """
    if not uses:
        return None
    found = [
        _RULES[use.kind](use, layout) if use.kind in _RULES else None
        for use in uses
    ]
    if any(f is None for f in found) or len({use.path for use in uses}) > 1:
        return None
    rules = {_RULES[use.kind] for use in uses}
    if rules <= {_elementwise, _broadcast}:
        scales = [scale_of(u.parameter) if u.scaled else None for u in uses]
        return Vectors(found, scales)
    if any(use.scaled for use in uses) or len(rules) > 1:
        return None
    if rules == {_lookup}:
        return Rows(found)
    if len({factors.signature for factors in found}) > 1:
        return None
    return Products(found, layout.batch_size, passes)
