"""Squared norms of gradients of each example, from a variable's uses.

Where a variable W meets the examples in a product (dense layers, attention,
convolutions by patches), the gradient of example i is

    g_i = Σ_t a_it d_itᵀ = A_iᵀ D_i,

with A_i the inputs of the product, one row for each position t, and D_i the
derivatives of the example's loss at its outputs. Its squared norm is taken
in the cheaper of two forms,

    ‖A_iᵀ D_i‖²  (explicit),    ⟨A_i A_iᵀ, D_i D_iᵀ⟩  (Gram),

for A_i of shape (T, K) and D_i of shape (T, N) at a cost of TKN or T²(K + N).
The cheaper form is also the smaller: it takes less memory than A_i and D_i
themselves, so that nothing of the size of the batch times the parameters ever
exists. Biases and scales are vectors no larger than the activations they act
on, and are summed as they are; rows of an embedding are summed by token.

Source of the Gram form: Goodfellow, *Efficient per-example gradient
computations*, 2015; Rochette et al., *Efficient per-example gradient
computations in convolutional neural networks*, 2019.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import math
from typing import Protocol

import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._measuring import variable_uses
from keras_fisher._measuring.variable_uses import Axis
from keras_fisher._measuring.variable_uses import Layout
from keras_fisher._measuring.variable_uses import Use


@dataclasses.dataclass(frozen=True)
class _Factors:
    """g = Σ_t aᵀ d at one use: A in blocks of columns, and D.

    Attributes:
        rows: T, positions for each example.
        columns: K of one block.
        blocks: Number of blocks that the columns of A come in.
        groups: Independent products side by side.
        width: N, columns of D.
        left: Function of the derivative at the output; returns a function
            of the number of a block that returns it, of shape
            `(B, T, groups, K)`.
        right: Function of the derivative; returns D, of shape
            `(B, T, groups, N)`.
        left_is_fixed: Whether A does not depend on the derivative.
    """

    rows: int
    columns: int
    blocks: int
    groups: int
    width: int
    left: Callable[[tf.Tensor], Callable[[int], tf.Tensor]]
    right: Callable[[tf.Tensor], tf.Tensor]
    left_is_fixed: bool

    @property
    def signature(self) -> tuple:
        """What has to agree for the gradients of two uses to be added."""
        return self.columns, self.blocks, self.groups, self.width


class Norms(Protocol):
    """The squared norms of one variable's gradients."""

    def squared_norms(self, upstream: list[list]) -> tf.Tensor:
        """‖g_i‖² of each example, for several passes at once.

        Args:
            upstream: For each pass, the derivative at each use's output.

        Returns:
            Tensor of shape `(batch, passes)`.
        """


class _Products:
    """Uses of a variable in products."""

    def __init__(self, uses: list[_Factors], batch: int, passes: int):
        self._uses, self._batch = uses, batch
        first = uses[0]
        rows = sum(use.rows for use in uses)
        columns = first.columns * first.blocks
        self._is_shared = all(use.left_is_fixed for use in uses)
        explicit = rows * columns * first.width
        if first.blocks > 1:
            # Each block of columns is a copy, made once for all passes.
            explicit *= 1 + 1 / passes
        gram_left = rows**2 * columns / (passes if self._is_shared else 1)
        self._by_gram = gram_left + rows**2 * first.width < explicit
        self._kept = None
        if self._is_shared and passes > 1:
            nothing = [None] * len(uses)
            if self._by_gram:
                self._kept = self._left_gram(nothing)
            elif first.blocks == 1:
                self._kept = self._left(nothing)(0)

    def squared_norms(self, upstream: list[list]) -> tf.Tensor:
        if not self._is_shared and len(upstream) > 1:
            each = [self.squared_norms([one]) for one in upstream]
            return tf.concat(each, axis=1)
        # What differs from pass to pass stands side by side.
        right = tf.concat(
            [
                tf.concat([u.right(d) for u, d in zip(self._uses, one)], axis=1)
                for one in upstream
            ],
            axis=-1,
        )
        form = self._gram if self._by_gram else self._explicit
        return form(upstream[0], right, len(upstream))

    def _left(self, upstream: list) -> Callable[[int], tf.Tensor]:
        if self._kept is not None:
            return lambda block: self._kept
        lefts = [use.left(d) for use, d in zip(self._uses, upstream)]
        return lambda block: tf.concat([left(block) for left in lefts], axis=1)

    def _left_gram(self, upstream: list) -> tf.Tensor:
        """A Aᵀ, of shape `(B · groups, T, T)`."""
        blocks = self._left(upstream)

        def of_block(block):
            left = _by_group(blocks(block))
            return tf.matmul(left, left, transpose_b=True)

        return _sum_in_turn(of_block, self._uses[0].blocks)

    def _gram(self, upstream: list, right: tf.Tensor, passes: int):
        left = self._kept
        if left is None:
            left = self._left_gram(upstream)
        right = _by_group(right)
        products = tf.matmul(left, right) * right
        return _sum_by_pass(products, self._batch, passes)

    def _explicit(self, upstream: list, right: tf.Tensor, passes: int):
        """‖Aᵀ D‖², one block of columns after the other."""
        blocks = self._left(upstream)

        def of_block(block):
            product = _product(blocks(block), right)
            return _sum_by_pass(tf.square(product), self._batch, passes)

        return _sum_in_turn(of_block, self._uses[0].blocks)


def _sum_by_pass(x: tf.Tensor, batch: int, passes: int) -> tf.Tensor:
    """From `(B · groups, ..., passes · N)` to `(B, passes)`."""
    sums = tf.reduce_sum(tf.reshape(x, [batch, -1, x.shape[-1]]), axis=1)
    return tf.reduce_sum(tf.reshape(sums, [batch, passes, -1]), axis=2)


def _by_group(x: tf.Tensor) -> tf.Tensor:
    """From `(B, T, groups, K)` to `(B · groups, T, K)`."""
    if x.shape[2] > 1:
        x = tf.transpose(x, [0, 2, 1, 3])
        return tf.reshape(x, [-1, *x.shape[2:]])
    return tf.squeeze(x, axis=2)


def _product(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Aᵀ D for each example and group."""
    if left.shape[-1] == 1:
        # No kernel for products of matrices is made for a single column.
        return tf.reduce_sum(left * right, axis=1)
    return tf.matmul(_by_group(left), _by_group(right), transpose_a=True)


def _sum_in_turn(function: Callable[[int], tf.Tensor], count: int):
    """Σ function(k), with the memory of a few terms."""
    totals = [function(0)]
    for k in range(1, count):
        # Two at a time keep the processors busy.
        with tf.control_dependencies(totals[-2:-1]):
            totals.append(totals[-1] + function(k))
    return totals[-1]


class _Vectors:
    """Uses of a variable entry by entry: biases, scales, added embeddings."""

    def __init__(self, uses: list[Callable], scales: list):
        self._uses = uses
        self._scales = scales

    def squared_norms(self, upstream: list[list]) -> tf.Tensor:
        return tf.stack([self._of_pass(one) for one in upstream], axis=1)

    def _of_pass(self, upstream: list) -> tf.Tensor:
        gradient = 0.0
        for use, scale, d in zip(self._uses, self._scales, upstream):
            vector = use(d)
            if scale is not None:
                vector *= tf.reshape(tf.cast(scale, vector.dtype), [1, -1])
            gradient += vector
        return tf.reduce_sum(tf.square(gradient), axis=1)


class _Rows:
    """Uses of a variable row by row, as an embedding."""

    def __init__(self, uses: list[tuple]):
        self._uses = [use for _, use in uses]
        indices = tf.concat([indices for indices, _ in uses], axis=1)
        batch, rows = indices.shape
        # A token that comes again adds to the same row of the gradient.
        self._order = tf.argsort(indices, axis=1)
        indices = tf.gather(indices, self._order, batch_dims=1)
        is_new = tf.cast(indices[:, 1:] != indices[:, :-1], tf.int32)
        segments = tf.pad(tf.cumsum(is_new, axis=1), [[0, 0], [1, 0]])
        segments += rows * tf.range(batch)[:, None]
        self._segments = tf.reshape(segments, [-1])

    def squared_norms(self, upstream: list[list]) -> tf.Tensor:
        return tf.stack([self._of_pass(one) for one in upstream], axis=1)

    def _of_pass(self, upstream: list) -> tf.Tensor:
        d = tf.concat([use(d) for use, d in zip(self._uses, upstream)], axis=1)
        batch, rows, width = d.shape
        sums = tf.math.unsorted_segment_sum(
            tf.reshape(tf.gather(d, self._order, batch_dims=1), [-1, width]),
            self._segments,
            batch * rows,
        )
        return tf.reduce_sum(tf.square(tf.reshape(sums, [batch, -1])), axis=1)


# How each kind of operation uses a variable. All of these return None where
# the use is of a kind that they do not know.


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


def _contraction(use: Use, layout: Layout, passes: int) -> _Factors | None:
    """A product of matrices, in any of its notations."""
    labels = _labels(use)
    axis = layout.axis(use.output)
    if labels is None or axis is None:
        return None
    of_parameter, of_input, of_output = labels
    other = use.inputs[1 - use.operand]
    batch_label = of_output[axis.position]
    if batch_label in of_parameter or batch_label not in of_input:
        return None
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

    return _Factors(
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
    if use.inputs[1 - use.operand].shape.rank != rank:
        return None
    labels = []
    for axes, flip in zip(("ij", "jk"), flips):
        labels.append(axes[::-1] if flip else axes)
    labels[1 - use.operand] = parts + labels[1 - use.operand]
    return labels[use.operand], labels[1 - use.operand], parts + "ik"


def _convolution(use: Use, layout: Layout, passes: int) -> _Factors | None:
    """A convolution, transposed, grouped or depthwise or not."""
    transposed = use.kind.startswith(("Conv2DBackprop", "Conv3DBackprop"))
    other = use.inputs[2] if transposed else use.inputs[0]
    kernel = use.parameter.shape.as_list()
    spatial = len(kernel) - 2
    axis, batch = layout.axis(use.output), layout.batch_size
    if axis is None or axis.position != 0 or layout.axis(other) != axis:
        return None
    channels_first = use.attribute("data_format").startswith(b"NC")
    begin = 2 if channels_first else 1
    strides = use.attribute("strides")[begin : begin + spatial]
    dilations = use.attribute("dilations")[begin : begin + spatial]
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

    # The large side is slid over, the small side has one entry a position.
    def shape_of(x):
        shape = x.shape.as_list()
        return [*shape[2:], shape[1]] if channels_first else shape[1:]

    large, small = shape_of(other), shape_of(use.output)
    if transposed:
        large, small = small, large
    paddings = _paddings(
        use, begin, large, small, kernel[:spatial], strides, dilations
    )
    depthwise = use.kind.startswith("Depthwise")
    groups = large[-1] if depthwise else large[-1] // kernel[spatial]
    columns, width = large[-1] // groups, small[-1] // groups
    offsets = [*itertools.product(*map(range, kernel[:spatial]))]
    rows = axis.repeats * math.prod(small[:-1])
    # Patches no larger than the other factor are kept, for all passes.
    joined = not depthwise and groups == 1 and len(offsets) * columns <= width

    def window(x, offset):
        begins = [o * d for o, d in zip(offset, dilations)]
        slices = [
            slice(b, b + (n - 1) * s + 1, s)
            for b, n, s in zip(begins, small, strides)
        ]
        return x[(slice(None), *slices)]

    def left(d):
        x = arranged(d if transposed else other)
        if any(p != (0, 0) for p in paddings):
            x = tf.pad(x, [(0, 0), *paddings, (0, 0)])

        def of_block(block):
            chosen = offsets if joined else [offsets[block]]
            windows = tf.concat([window(x, o) for o in chosen], axis=-1)
            return tf.reshape(windows, [batch, rows, groups, -1])

        return of_block

    def right(d):
        x = arranged(other if transposed else d)
        return tf.reshape(x, [batch, rows, groups, width])

    return _Factors(
        rows=rows,
        columns=columns * (len(offsets) if joined else 1),
        blocks=1 if joined else len(offsets),
        groups=groups,
        width=width,
        left=left,
        right=right,
        left_is_fixed=not transposed,
    )


def _paddings(use, begin, large, small, kernel, strides, dilations) -> list:
    padding = use.attribute("padding")
    if padding == b"EXPLICIT":
        explicit = use.attribute("explicit_paddings")
        return [
            (explicit[2 * i], explicit[2 * i + 1])
            for i in range(begin, begin + len(kernel))
        ]
    if padding == b"VALID":
        return [(0, 0)] * len(kernel)
    paddings = []
    for n, m, k, s, d in zip(large, small, kernel, strides, dilations):
        total = max((m - 1) * s + (k - 1) * d + 1 - n, 0)
        paddings.append((total // 2, total - total // 2))
    return paddings


def _elementwise(use: Use, layout: Layout, passes: int) -> Callable | None:
    """An operation that broadcasts the parameter over examples."""
    other = use.inputs[1 - use.operand]
    shape = variable_uses.static_shape(use.parameter)
    axis, rank = layout.axis(use.output), use.output.shape.rank
    if axis is None or shape is None or layout.axis(other) != axis:
        return None
    if other.shape.rank != rank:
        return None
    if use.kind == "BiasAdd":
        operation = tf.raw_ops.AddV2
        if use.attribute("data_format") == b"NCHW":
            shape = [*shape, *[1] * (rank - 2)]
    else:
        operation = getattr(tf.raw_ops, use.kind)
    shape = [1] * (rank - len(shape)) + shape
    if shape[axis.position] != 1:
        return None
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


def _broadcast(use: Use, layout: Layout, passes: int) -> Callable | None:
    """A parameter that is repeated for each example, as a class token."""
    axis, shape = layout.axis(use.output), use.parameter.shape.as_list()
    if axis is None or use.operand != 0:
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


def _lookup(use: Use, layout: Layout, passes: int) -> tuple | None:
    """Rows picked by indices."""
    indices = use.inputs[1]
    axis = layout.axis(indices)
    if (
        use.operand != 0
        or axis is None
        or tf.get_static_value(use.inputs[2]) != 0
        or use.attribute("batch_dims") != 0
    ):
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
        _RULES[use.kind](use, layout, passes) if use.kind in _RULES else None
        for use in uses
    ]
    if any(f is None for f in found) or len({use.path for use in uses}) > 1:
        return None
    rules = {_RULES[use.kind] for use in uses}
    if rules <= {_elementwise, _broadcast}:
        scales = [scale_of(u.parameter) if u.scaled else None for u in uses]
        return _Vectors(found, scales)
    if any(use.scaled for use in uses) or len(rules) > 1:
        return None
    if rules == {_lookup}:
        return _Rows(found)
    if len({factors.signature for factors in found}) > 1:
        return None
    return _Products(found, layout.batch_size, passes)
