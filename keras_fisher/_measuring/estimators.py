"""The estimators of Tr(F): what each takes the gradients of an example with.

An estimator is a row of `ESTIMATORS`. All of them need the squared norms of
backward passes through one recorded forward pass; which passes these are, its
function `norms` says.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any
from typing import Protocol

import keras
import tensorflow as tf

from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher.likelihoods import pairs
from keras_fisher.likelihoods.base import Likelihood

# Backward passes that share a forward pass and stand in memory together.
MOST_TOGETHER = 9


class Recording(Protocol):
    """A forward pass, ready for backward passes.

    Attributes:
        structure: The outputs, a tensor or several.
        outputs: The same in one tensor.
        mask: Keras masks of the outputs, or None, in their structure.
        dtype: Of the squared norms.
        shape: Of those of one pass, `(rows, variables)`.
    """

    structure: Any
    outputs: tf.Tensor
    mask: Any
    dtype: tf.DType
    shape: tuple[int, int]

    def squared_norms(self, *cotangents: tf.Tensor) -> tf.Tensor:
        """Squared norms, of shape `(cotangents, rows, variables)`.

        With a row for each example, or one for all of them.
        """


@dataclasses.dataclass(frozen=True)
class Batch:
    """What an estimator knows of a recorded batch.

    Attributes:
        recording: The forward pass.
        outputs: Its outputs, in 32 bits or more as scores are wanted.
        likelihood: Of the outputs.
        y: Labels of the data set, or None; of examples that are there twice
            as well.
        size: Number of examples, a tensor if it is not known. There may be
            some behind them, which are to be drawn labels for once more.
        rows: Positions of the examples that are behind them once more, or
            None.
        seed: What draws start from: `int64` of shape `(2,)`.
        position: Number of examples in the batches before.
        draws: Draws of labels for each example.
    """

    recording: Recording
    outputs: Any
    likelihood: Likelihood
    y: Any
    size: int | tf.Tensor
    rows: tf.Tensor | None
    seed: tf.Tensor
    position: tf.Tensor
    draws: int

    @property
    def mask(self) -> Any:
        """Masks of the positions that count, or None."""
        return self.likelihood.visible(
            self.y, self.outputs, self.recording.mask
        )

    def score(self, labels: Any) -> tf.Tensor:
        """The cotangent of -log p of labels, of the shape of all outputs."""
        return structures.join(
            self.likelihood.score(labels, self.outputs, self.mask)
        )

    def drawn(self, k: tf.Tensor) -> Any:
        """Labels ŷ of draw k, and other ones for the examples drawn twice."""
        labels = self._first(k)
        if self.rows is None:
            return labels
        others, _ = self._second(labels)
        return keras.tree.map_structure(
            lambda a, b: None if a is None else tf.concat([a, b], axis=0),
            labels,
            others,
        )

    def pair_weights(self) -> tf.Tensor:
        """What pairs of labels count for, of shape `(rows,)`."""
        return self._second(self._first(0))[1]

    def _seed(self, k: tf.Tensor) -> tf.Tensor:
        shift = tf.stack([tf.constant(0, tf.int64), tf.cast(k, tf.int64)])
        return random_draws.from_example(self.seed + shift, self.position)

    def _first(self, k: tf.Tensor) -> Any:
        outputs = self.outputs
        if self.rows is not None:
            outputs = structures.apply(lambda t: t[: self.size], outputs)
        return self.likelihood.sample(outputs, self._seed(k))

    def _second(self, labels: Any) -> tuple[Any, tf.Tensor]:
        """Other labels for some rows, and weights, where there is one draw."""

        def behind(t):
            return t[self.size :]

        return pairs.sample_other(
            self.likelihood,
            structures.apply(lambda t: tf.gather(t, self.rows), labels),
            structures.apply(behind, self.outputs),
            self._seed(1),
            structures.apply(behind, self.mask),
        )


def _of_drawn_labels(batch: Batch) -> tf.Tensor:
    return _stack_over(
        lambda k: batch.score(batch.drawn(k)), batch.draws, batch.recording
    )


def _of_given_labels(batch: Batch) -> tf.Tensor:
    return batch.recording.squared_norms(batch.score(batch.y))


def _of_all_labels(batch: Batch) -> tf.Tensor:
    count, factor = batch.likelihood.fisher_factors(batch.outputs, batch.mask)
    return _sum_over(
        lambda k: structures.join(factor(k)), count, batch.recording
    )


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What tells one estimator from the others.

    Attributes:
        norms: Function of a `Batch` that returns squared norms, of shape
            `(draws, rows, variables)`.
        draws_labels: Whether labels are drawn, so that it has an error.
        reads_labels: Whether the labels of the data set are.
        sums_over_labels: Whether the expectation is taken in closed form, by
            the factors of the likelihood.
        by_example: Whether there is a row for each example, not one for all.
    """

    norms: Callable[[Batch], tf.Tensor]
    draws_labels: bool = False
    reads_labels: bool = False
    sums_over_labels: bool = False
    by_example: bool = True

    def draws_pairs(self, draws: int) -> bool:
        """Whether some examples are drawn twice, to know the error."""
        return self.draws_labels and self.by_example and draws == 1


ESTIMATORS = {
    "monte_carlo": Estimator(_of_drawn_labels, draws_labels=True),
    "exact": Estimator(_of_all_labels, sums_over_labels=True),
    "empirical": Estimator(_of_given_labels, reads_labels=True),
    "batch": Estimator(_of_drawn_labels, draws_labels=True, by_example=False),
}


# Many passes through one recording.


def _in_groups(cotangent: Callable, count: int, recording: Recording):
    """Cuts passes into groups of one size, the last one running over.

    Returns:
        The number of groups, their size, and a function of the number of a
        group that returns the squared norms of its passes.
    """
    groups = math.ceil(count / MOST_TOGETHER)
    together = math.ceil(count / groups)

    def norms(group):
        return recording.squared_norms(
            *[cotangent(group * together + j) for j in range(together)]
        )

    return groups, together, norms


def _sum_over(
    cotangent: Callable, count: int, recording: Recording
) -> tf.Tensor:
    """Σ_k of the squared norms for cotangent(k), with a first axis of 1."""
    groups, together, norms = _in_groups(cotangent, count, recording)

    def of_group(group):
        found = norms(group)
        exists = group * together + tf.range(together) < count
        return tf.tensordot(tf.cast(exists, found.dtype), found, 1)[None]

    if groups == 1:
        return of_group(0)
    return tf.while_loop(
        lambda group, _: group < groups,
        lambda group, total: (group + 1, total + of_group(group)),
        [tf.constant(0), tf.zeros([1, *recording.shape], recording.dtype)],
        parallel_iterations=1,
    )[1]


def _stack_over(
    cotangent: Callable, count: int, recording: Recording
) -> tf.Tensor:
    """The squared norms for cotangent(0), ..., cotangent(count - 1)."""
    groups, _, norms = _in_groups(cotangent, count, recording)
    if groups == 1:
        return norms(0)
    found = tf.map_fn(
        norms,
        tf.range(groups),
        fn_output_signature=recording.dtype,
        parallel_iterations=1,
    )
    return tf.reshape(found, [-1, *found.shape[2:]])[:count]
