"""Squared norms of gradients, and their derivatives.

Of a recorded forward pass on b' examples in micro-batches of b_m examples,
with ĝ_m the gradient of a micro-batch's mean negative log-likelihood:

    Σ_m b_m² ‖ĝ_m‖²

for each target that a norm is taken of. What that is, one of two objects
says: `ParameterNorm` or `InputNorm`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import Protocol

import keras
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._common import structures
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale as loss_scale_lib
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives import way
from keras_fisher._derivatives.forward import Forward
from keras_fisher._derivatives.gradients import Gradients


class Norm(Protocol):
    """What a penalty takes the squared norm of.

    Attributes:
        watches_inputs: Whether inputs have to be among the targets.
    """

    watches_inputs: bool

    def measured(self, forward: Forward) -> range:
        """Positions of the targets whose squared gradients are computed."""

    def selected(self, forward: Forward) -> list[bool]:
        """Which of those measured the penalized norm is the sum over."""

    def scale(self, examples: tf.Tensor) -> tf.Tensor:
        """The factor from the estimate T of a trace to the penalty over α."""

    def check(self, forward: Forward, gradients: Gradients) -> None:
        """Raises a `ValueError` if those measured are too few for a norm."""


class ParameterNorm:
    """‖∇_θ L‖² over trainable variables: FP, GP and GP_r.

    Each variable is measured, those left out of the penalized norm as well. A
    gradient that is a mean over B examples shrinks with B, hence α / B on T.

    Args:
        selects: Which variables the norm is over.
    """

    watches_inputs = False

    def __init__(self, selects: Callable[[keras.Variable], bool]):
        self._selects = selects

    def measured(self, forward):
        return range(forward.num_variables)

    def selected(self, forward):
        return [*map(self._selects, forward.layer.trainable_variables)]

    def scale(self, examples):
        return 1.0 / examples

    def check(self, forward, gradients):
        # That of some is zero where the outputs do not depend on them, and
        # Keras warns of these.
        penalized = [
            (variable.path, gradient)
            for variable, gradient, is_selected in zip(
                forward.layer.trainable_variables,
                gradients,
                self.selected(forward),
            )
            if is_selected
        ]
        if penalized and all(gradient is None for _, gradient in penalized):
            raise ValueError(
                "The outputs depend on none of the variables that are "
                "penalized, or not differentiably, so that they have no "
                f"gradient. Received: {[path for path, _ in penalized]}. Have "
                "`call` compute its outputs from them by operations with a "
                "gradient, or penalize others: `exclude=`."
            )


class InputNorm:
    """Σ_i ‖∇_{x_i} L‖² over the inputs: GP_x.

    A gradient at one input does not shrink with the batch: α itself on T.
    """

    watches_inputs = True

    def measured(self, forward):
        return range(forward.num_variables, len(forward.targets))

    def selected(self, forward):
        return [True for _ in self.measured(forward)]

    def scale(self, examples):
        return tf.ones_like(examples)

    def check(self, forward, gradients):
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "The outputs do not depend on some of the inputs, or not "
                "differentiably. Leave these inputs out of the model, or use "
                "another penalty."
            )


def total(norm: Norm, forward: Forward, squares: tf.Tensor) -> tf.Tensor:
    """The penalized norm, given the squares of what is measured."""
    selected = [i for i, is_in in enumerate(norm.selected(forward)) if is_in]
    # Not by factors of zero: what is left out may be infinite.
    return tf.reduce_sum(tf.gather(squares, tf.constant(selected, tf.int32)))


def fitting_scale(
    forward: Forward, score: Callable, micro_batch_size: int | None
) -> float | tf.Tensor:
    """The loss scale that fits the derivative of the loss at the outputs.

    Args:
        forward: As `SquaredNorms` takes it.
        score: As `SquaredNorms` takes it.
        micro_batch_size: Examples in a micro-batch; None for all.
    """
    dtype = keras_layers.compute_dtype(forward.layer)
    if not loss_scale_lib.is_used(dtype):
        return 1.0
    size = forward.subset.size
    weight = tf.cast(micro_batch_size or tf.maximum(size, 1), tf.float32)
    outputs = structures.apply(dtypes.precise, forward.subset_outputs)
    cotangents = score(outputs, tf.fill([size], 1.0 / weight))
    return loss_scale_lib.fitting(structures.leaves(cotangents), dtype)


@dataclasses.dataclass(frozen=True)
class SquaredNorms:
    """Computes squared norms for one forward pass.

    Attributes:
        forward: The pass. To be used where it was recorded.
        norm: What the norm is taken of.
        score: Function of the outputs, in 32 bits or more, and the weights of
            the examples. Returns the derivative of the weighted sum of
            negative log-likelihoods at the outputs. If these are of some
            examples, a third argument picks them from what is of all.
        loss_scale: Factor on it in the backward pass, taken out again before
            the square.
        dtype: Of the weights.
    """

    forward: Forward
    norm: Norm
    score: Callable[..., Any]
    loss_scale: float | tf.Tensor
    dtype: tf.DType

    def compute(
        self, method: str, micro_batch_size: int | None
    ) -> tuple[tf.Tensor, Gradients | None]:
        """Σ_m b_m² ‖ĝ_m‖² of each target that is measured.

        Args:
            method: `"exact"` or `"finite_difference"`.
            micro_batch_size: Examples in a micro-batch; None for all.

        Returns:
            The squares, and the derivatives of the penalized norm by all
            targets. These are None where the tape around gives them.

        Raises:
            ValueError: If what is penalized has no gradient.
        """
        if method == "finite_difference":
            function = SquaredNorms._finite_difference
        elif micro_batch_size is None:
            function = SquaredNorms._differentiated_around
        else:
            # A loop, whose gradient would keep all micro-batches in memory.
            function = SquaredNorms._differentiated_here
        # `TraceMeasurement` has none, whatever the penalty whose pass it takes.
        if self.forward.is_divisible and micro_batch_size is not None:
            found = self._sum_over_parts(function, micro_batch_size)
        else:
            found = gradients_lib.sum_over_micro_batches(
                functools.partial(function, self),
                self.forward.subset.size,
                micro_batch_size,
                self.dtype,
            )
        squares, *derivatives = found
        return squares, derivatives or None

    def _sum_over_parts(self, function: Callable, micro_batch_size: int):
        """The sums where each micro-batch may run through the model alone.

        So they take the memory of one, and the time of one pass over all.
        """
        size = self.forward.subset.size
        minimum = tf.minimum if tf.is_tensor(size) else min
        part_size = minimum(size, micro_batch_size)

        def of_part(first, weights, count):
            def score(outputs, weights):
                return self.score(
                    outputs,
                    weights,
                    lambda of_all: examples_lib.neighbours(
                        of_all, first, part_size
                    ),
                )

            forward = self.forward.part(first, part_size)
            part = dataclasses.replace(self, forward=forward, score=score)
            return function(part, weights, count)

        targets = [tf.convert_to_tensor(t) for t in self.forward.targets]
        positions = self.norm.measured(self.forward)
        return gradients_lib.sum_over_parts(
            of_part,
            size,
            part_size,
            self.dtype,
            [
                tf.zeros([len(positions)], gradients_lib.common_dtype(targets)),
                *(tf.zeros_like(dtypes.precise(t)) for t in targets),
            ],
        )

    # Of one micro-batch, for sum_over_micro_batches.

    def _differentiated_around(self, weights, count) -> list[tf.Tensor]:
        return [self._squares(weights, count)]

    def _differentiated_here(self, weights, count) -> list[tf.Tensor]:
        forward = self.forward
        with forward.second_tape:
            squares = self._squares(weights, count)
            penalized = total(self.norm, forward, squares)
            factor = tf.square(count)
            scale = loss_scale_lib.of_square(
                self.loss_scale,
                factor,
                penalized / tf.cast(factor, penalized.dtype),
                count,
            )
            scaled = dtypes.times(penalized, scale)
        with second_derivatives.explained():
            derivatives = forward.second_tape.gradient(
                scaled,
                forward.targets,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        return [squares] + [
            loss_scale_lib.unscaled(dtypes.precise(derivative), scale)
            for derivative in map(tf.convert_to_tensor, derivatives)
        ]

    def _finite_difference(self, weights, count) -> list[tf.Tensor]:
        forward = self.forward
        way.warn_of_kinks(
            forward.way,
            'With `method="finite_difference"` the gradient of the penalty',
            'Use `method="exact"`, the dtype policy "float64", or smooth '
            "activations and average pooling.",
        )
        here, scale = self._gradients(
            forward.tape, forward.subset_outputs, forward.targets, weights
        )
        squares = gradients_lib.squared_norms(self._measured(here), scale)
        direction: Gradients = [None] * len(here)
        for i, is_selected in zip(
            self.norm.measured(forward), self.norm.selected(forward)
        ):
            direction[i] = here[i] if is_selected else None
        step = gradients_lib.difference_step(
            direction, forward.targets, forward.way.precision
        )
        moved = [
            tf.identity(t)
            if d is None
            # Gradients do not always know their shapes.
            else tf.ensure_shape(
                t + tf.cast(step, t.dtype) * tf.cast(d, t.dtype), t.shape
            )
            for t, d in zip(forward.targets, direction)
        ]
        there, _ = self._gradients(
            *forward.replay(moved), moved, weights, scale
        )
        _check_moved(here, there)
        count = tf.cast(count, squares.dtype)
        # One loss scale is in the direction, and one in each gradient.
        scale = tf.cast(scale, squares.dtype)
        factor = 2.0 * tf.square(count / scale) / tf.cast(step, scale.dtype)
        return [tf.square(count) * squares] + [
            tf.zeros_like(dtypes.precise(t))
            if a is None or b is None
            else dtypes.times(dtypes.precise(b) - dtypes.precise(a), factor)
            for t, a, b in zip(forward.targets, here, there)
        ]

    def _squares(self, weights, count) -> tf.Tensor:
        forward = self.forward
        gradients, scale = self._gradients(
            forward.tape, forward.subset_outputs, forward.targets, weights
        )
        squares = gradients_lib.squared_norms_alone(
            self._measured(gradients), self.norm.selected(forward), scale
        )
        return tf.cast(tf.square(count), squares.dtype) * squares

    def _measured(self, gradients: Gradients) -> Gradients:
        """Of the gradients for all targets, those to be squared."""
        found = [gradients[i] for i in self.norm.measured(self.forward)]
        self.norm.check(self.forward, found)
        return found

    def _gradients(self, tape, outputs, targets, weights, scale=None):
        """The gradients for all targets, and their loss scale."""
        precise = structures.apply(dtypes.precise, outputs)
        cotangents = structures.leaves(self.score(precise, weights))
        outputs = structures.leaves(outputs)
        scale = self.loss_scale if scale is None else scale
        gradients = gradients_lib.vector_jacobian(
            tape,
            outputs,
            targets,
            [
                tf.cast(dtypes.times(c, scale), output.dtype)
                for c, output in zip(cotangents, outputs)
            ],
        )
        return gradients, scale


def _check_moved(here: Gradients, there: Gradients) -> None:
    """Raises a `ValueError` if a pass on moved values has not used them."""
    if any(b is None for a, b in zip(here, there) if a is not None):
        raise ValueError(
            "The model does not run with other values of its variables "
            'than their own, which `method="finite_difference"` needs. '
            "`tf.recompute_grad` does that; use "
            "`keras_fisher.layers.Rematerialization` instead."
        )
