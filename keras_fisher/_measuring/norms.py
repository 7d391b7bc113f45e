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
from typing import Protocol

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Factors:
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


class Products:
    """Uses of a variable in products."""

    def __init__(self, uses: list[Factors], batch: int, passes: int):
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


class Vectors:
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


class Rows:
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
