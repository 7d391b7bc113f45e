"""What a penalty is: of which labels and variables, how much, and when.

It decides on which labels, which variables, which subset of the batch
and at which steps a squared gradient norm is added to the loss:

    L'(θ) = L(θ) + α ‖ĝ‖²,    ĝ = (1/B) Σ_i ∇_θ -log p_θ(ŷ_i | x_i).

All of them go by the unbiased estimate T of a trace from a subset of b' ≤ B
examples in micro-batches of b_m examples,

    T = (1/b') Σ_m b_m² ‖ĝ_m‖²,    α T / B  is the penalty,

which is α ‖ĝ‖² for one micro-batch of the whole batch. With labels sampled
from the model E[T] = Tr(F), so the expected penalty α Tr(F) / B does not
depend on the subset or on how it is split.

Used by `FisherModel` and `FisherRegularization`, and in a loop of your own:

    penalty = keras_fisher.FisherPenalty(alpha=0.1)
    likelihood = keras_fisher.likelihoods.Categorical(from_logits=True)
    seed = keras.random.SeedGenerator(0)
    with tf.GradientTape() as tape:
        forward = penalty.forward(model, x, seed=seed)
        loss = loss_fn(y, forward.outputs)
        term = penalty(forward, likelihood, y, seed=seed)
        total = loss + term.value
    gradients = tape.gradient(total, model.trainable_variables)
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import structures
from keras_fisher._common.read_once import ReadOnce
from keras_fisher._derivatives import forward as forward_lib
from keras_fisher._derivatives import gradient_norms
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale as loss_scale_lib
from keras_fisher._derivatives.forward import Forward
from keras_fisher._derivatives.gradient_norms import Norm
from keras_fisher._derivatives.gradient_norms import ParameterNorm
from keras_fisher._derivatives.gradient_norms import SquaredNorms
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.penalties.alpha import Alpha

_METHODS = ("exact", "finite_difference")
# What a step is traced with.
_READ_ONCE = (
    "fraction",
    "every",
    "reuse",
    "start",
    "stop",
    "micro_batch_size",
    "method",
    "exclude",
    "bound",
    "warmup_steps",
)


@dataclasses.dataclass(frozen=True)
class Term:
    """What a penalty adds to the loss of one step.

    Attributes:
        value: The penalty, a scalar. Its gradient is the penalty's.
        traces: Unbiased estimate of Tr(F) for each trainable variable of the
            layer, in their order, without a gradient. None if the penalty
            says nothing of Tr(F).
        squared_norm: ‖ĝ‖², the value over α, without a gradient. None if ĝ is
            not with respect to parameters, and so measures no step in them.
        loss_scale: Factor on `value` with which its gradient in 16 bits does
            not vanish, to be taken out of the gradient; 1.0 in others.

    Example:
    ```python
    penalty = keras_fisher.FisherPenalty(alpha=0.1, bound=None)
    likelihood = keras_fisher.likelihoods.Categorical(from_logits=True)
    term = penalty(penalty.forward(network, x), likelihood)
    print(float(term.value), term.traces)
    ```
    """

    value: tf.Tensor
    traces: tf.Tensor | None
    squared_norm: tf.Tensor | None = None
    loss_scale: float | tf.Tensor = 1.0


class Penalty(ReadOnce):
    """Base class: a squared norm of the gradient, scaled by α.

    Example:
    ```python
    class FirstClassPenalty(keras_fisher.penalties.Penalty):
        name = "first_class"

        def labels(self, likelihood, outputs, y, seed):
            return tf.zeros(tf.shape(outputs)[:1], tf.int64)


    model = keras_fisher.FisherModel(network, FirstClassPenalty(alpha=0.1))
    ```

    Args:
        alpha: α, a finite number of at least 0. Another number may be assigned
            to it at any time, which takes effect at the next step. Or a
            `keras.optimizers.schedules.LearningRateSchedule` of the optimizer
            step, or a scalar `keras.Variable`. A gradient that is used again
            keeps the α that it was computed with.
        fraction: Share of the batch that the penalty is computed on, in
            (0, 1]: neighbours in the batch from a random place on, one
            example at least. The expected penalty does not depend on it, the
            cost nearly does.
        every: Recompute the penalty every so many optimizer steps.
        reuse: Whether the steps in between add the last computed gradient
            again, as the paper does with `every=10`, or nothing.
        start: First optimizer step with the penalty.
        stop: First optimizer step without it again; None for never.
        micro_batch_size: Examples per micro-batch, whose squared norms are
            averaged and scaled by b/B; None for one of the whole subset. The
            expected penalty does not depend on it, its variance does. Where
            examples do not see each other and no numbers are drawn (dropout),
            each runs through the model by itself, which takes one more forward
            pass in all; elsewhere each takes a backward pass over the whole
            batch.
        method: `"exact"` differentiates the gradient norm. With
            `"finite_difference"` the derivative of the norm is
            2 (∇L(θ + εĝ) - ∇L(θ)) / ε, from first derivatives alone: it works
            with any layer. The lowest precision on the way from variables to
            outputs decides how right that is: to seven digits in `float64`,
            three in `float32` (also where TensorFlow resizes images in it,
            within a network of `float64`), 3 to 8 % in `float16` and 4 to
            23 % in `bfloat16`, whatever the last layer computes in. That is
            of smooth networks: with kinks, as of ReLU and max pooling, it is
            right in `float64` alone, which a warning says.
        exclude: Regular expressions. Variables whose path one of them is
            found in (`re.search`) are left out of the norm.
        bound: c, a number above 0. The penalty moves the parameters by
            min(1, c w min(‖∇L‖, m) / ‖∇P‖) ∇P, whose length is at most c times
            that of the gradient of the loss, and of the mean m of that length
            over the last hundred steps or so. So a large α does no harm. None
            for ∇P itself, the paper's penalty. `FisherRegularization` takes
            ‖ĝ‖ for both lengths; in a loop of your own it has no effect.
        warmup_steps: Optimizer steps, from `start` on, over which w grows to
            1 in equal parts, so that a network with random weights, whose
            Tr(F) may be in millions, begins to learn; 0 for w = 1, as in
            trainings of few steps.

    Raises:
        ValueError: If an argument is not as described.
    """

    name: str  # how `get` finds the class

    def __init__(
        self,
        alpha: float | LearningRateSchedule | keras.Variable = 1.0,
        *,
        fraction: float = 1.0,
        every: int = 1,
        reuse: bool = True,
        start: int = 0,
        stop: int | None = None,
        micro_batch_size: int | None = None,
        method: str = "exact",
        exclude: str | Sequence[str] = (),
        bound: float | None = 1.0,
        warmup_steps: int = 500,
    ):
        checks.choice("method", method, _METHODS)
        self._alpha = Alpha.of_config(alpha)
        self.fraction: float = checks.number(
            "fraction", fraction, lambda f: 0 < f <= 1, "a number in (0, 1]"
        )
        self.every: int = checks.integer("every", every, 1)
        self.reuse: bool = bool(reuse)
        self.start: int = checks.integer("start", start, 0)
        if stop is not None:
            stop = checks.integer(
                "stop", stop, self.start + 1, "larger than `start`"
            )
        self.stop = stop
        if micro_batch_size is not None:
            micro_batch_size = checks.integer(
                "micro_batch_size", micro_batch_size, 1
            )
        self.micro_batch_size = micro_batch_size
        self.method = method
        self._excluded = _compiled(exclude)
        self.exclude = tuple(p.pattern for p in self._excluded)
        if bound is not None:
            bound = checks.number(
                "bound", bound, lambda c: c > 0, "above 0, or None"
            )
        self.bound = bound
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0)

    _instead = (
        "Only `alpha` may be assigned. Give the model another penalty: "
        "`model.penalty = FisherPenalty(...)`."
    )

    def _is_read_once(self, name: str) -> bool:
        return name in _READ_ONCE

    @property
    def alpha(self) -> float | LearningRateSchedule | keras.Variable:
        """α: a number, or the schedule or variable that was given."""
        return self._alpha.value

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha.assign(value)

    @property
    def alpha_moves(self) -> bool:
        """Whether α is, or has been, anything but one number."""
        return self._alpha.moves

    @property
    def alpha_variable(self) -> keras.Variable | None:
        """Where α is, to be saved with a model; None if it is scheduled."""
        return self._alpha.variable()

    def alpha_at(self, step: int | tf.Tensor | None) -> float | tf.Tensor:
        """α at an optimizer step, which only a schedule has to know."""
        return self._alpha.at(step)

    # Which labels, and what the norm is taken of.

    def labels(
        self,
        likelihood: Likelihood,
        outputs: tf.Tensor,
        y: tf.Tensor | None,
        seed: int | keras.random.SeedGenerator,
    ) -> tf.Tensor:
        """The labels that the gradient is taken with."""
        raise NotImplementedError

    measures_trace = False  # whether T estimates Tr(F)
    needs_labels = False  # whether `labels` reads y

    @property
    def norm(self) -> Norm:
        """What the squared norm is taken of: parameters, unless excluded."""
        return ParameterNorm(self.selects)

    @property
    def is_of_parameters(self) -> bool:
        """Whether ĝ is a gradient with respect to parameters."""
        return not self.norm.watches_inputs

    def selects(self, variable: keras.Variable) -> bool:
        """Whether the norm takes in the gradient of `variable`."""
        return not any(p.search(variable.path) for p in self._excluded)

    # Which steps. These take integers or integer tensors.

    def is_active(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        """Whether `start <= step < stop`."""
        after_start = step >= self.start
        return (
            after_start
            if self.stop is None
            else (after_start & (step < self.stop))
        )

    def is_fresh(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        """Whether the penalty is computed anew at `step`."""
        return self.is_active(step) & ((step - self.start) % self.every == 0)

    def bound_at(self, step: int | tf.Tensor) -> tf.Tensor:
        """The bound at an optimizer step, a scalar in `float64`."""
        begun = tf.cast(step, tf.float64) - self.start + 1
        share = begun / max(self.warmup_steps, 1)
        return self.bound * tf.clip_by_value(share, 0, 1)

    @property
    def stores_gradient(self) -> bool:
        """Whether steps in between add a gradient computed before."""
        return self.reuse and self.every > 1

    @property
    def is_apart(self) -> bool:
        """Whether its gradient is computed apart from that of the loss."""
        return self.stores_gradient or self.bound is not None

    # The computation.

    def forward(
        self,
        layer: keras.layers.Layer,
        x: Any,
        *,
        seed: int | keras.random.SeedGenerator = 0,
        watch_inputs: bool = False,
    ) -> Forward:
        """Runs `layer` on `x` in training mode, recorded for the penalty.

        Args:
            layer: A built layer or model.
            x: Its inputs, with the batch as the first axis.
            seed: Where the draw of a `fraction` comes from.
            watch_inputs: Whether the penalty is to have a gradient with
                respect to `x` in all circumstances: set it if `x` is computed
                from variables.

        Returns:
            A `Forward`, whose `outputs` are for the loss. Its examples, B of
            them, are the rows of the outputs.
        """
        return forward_lib.run(
            layer,
            x,
            fraction=self.fraction,
            seed=seed,
            watch_inputs=watch_inputs or self.norm.watches_inputs,
            part_size=self.micro_batch_size,
            replayable=self.method == "finite_difference",
        )

    def __call__(
        self,
        forward: Forward,
        likelihood: Likelihood,
        y: tf.Tensor | None = None,
        *,
        seed: int | keras.random.SeedGenerator = 0,
        loss_scale: float | tf.Tensor | None = None,
        batches: int | tf.Tensor = 1,
        step: int | tf.Tensor | None = None,
    ) -> Term:
        """Computes the penalty. To be called where `forward` was recorded.

        Args:
            forward: What `self.forward` returned.
            likelihood: p(y|x), given the outputs.
            y: Labels of the data set, for the penalties that use them and
                likelihoods that leave out positions without a label; of
                several outputs, a list or dict.
            seed: Where the draw of labels comes from.
            loss_scale: Factor on the loss in the backward pass, taken out
                again before the square; None for one that fits, which is 1
                but in half precision.
            batches: Number of batches like this one that make up one
                optimizer step (replicas, accumulated gradients).
            step: The optimizer step, if α follows a schedule.

        Returns:
            A `Term`.

        Raises:
            ValueError: If no selected variable has a gradient, if the
                likelihood is not for as many outputs, or if α follows a
                schedule and there is no step.
        """
        outputs = forward.subset_outputs
        likelihood.check_structure(outputs)
        y = structures.taken_out(y, likelihood.takes_several_outputs)
        y = (
            forward.subset.of(structures.apply(tf.convert_to_tensor, y))
            if self.needs_labels or likelihood.reads_labels
            else None
        )
        precise = structures.apply(dtypes.precise, outputs)
        labels = self.labels(likelihood, precise, y, seed)
        mask = likelihood.visible(y, outputs, forward.mask)

        def score(outputs, weights, rows=lambda each: each):
            return likelihood.score(rows(labels), outputs, rows(mask), weights)

        if loss_scale is None:
            loss_scale = gradient_norms.fitting_scale(
                forward, score, self.micro_batch_size
            )
        norms = SquaredNorms(
            forward,
            self.norm,
            score,
            loss_scale,
            dtypes.at_least_single(forward.dtype),
        )
        return self._term(norms, batches, step)

    def _term(self, norms: SquaredNorms, batches, step) -> Term:
        """α T / B and what comes with it, from the squared norms."""
        forward = norms.forward
        squares, derivatives = norms.compute(self.method, self.micro_batch_size)
        # Of no example, the trace and the penalty are zero.
        size = tf.cast(tf.maximum(forward.subset.size, 1), squares.dtype)
        traces = squares / size
        examples = tf.cast(forward.batch_size, squares.dtype) * tf.cast(
            batches, squares.dtype
        )
        per_trace = self.norm.scale(tf.maximum(examples, 1))
        trace = gradient_norms.total(self.norm, forward, traces)
        alpha, squared_norm = self.alpha_at(step), per_trace * trace
        scale = dtypes.times(per_trace, alpha)
        value = scale * trace
        if derivatives is None:
            loss_scale = loss_scale_lib.of_square(
                norms.loss_scale, alpha, squared_norm, examples
            )
        else:
            loss_scale = 1.0
            scale /= size
            value = gradients_lib.with_gradient(
                value,
                forward.targets,
                [dtypes.times(d, scale) for d in derivatives],
            )
        return Term(
            value,
            tf.stop_gradient(traces) if self.measures_trace else None,
            tf.stop_gradient(squared_norm) if self.is_of_parameters else None,
            loss_scale,
        )

    # Configuration.

    def get_config(self) -> dict[str, Any]:
        return {
            "alpha": self._alpha.config(),
            "fraction": self.fraction,
            "every": self.every,
            "reuse": self.reuse,
            "start": self.start,
            "stop": self.stop,
            "micro_batch_size": self.micro_batch_size,
            "method": self.method,
            "exclude": list(self.exclude),
            "bound": self.bound,
            "warmup_steps": self.warmup_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Penalty:
        # Files of versions that knew neither go on as they were begun.
        return cls(**{"bound": None, "warmup_steps": 0, **config})

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


def _compiled(exclude: str | Sequence[str]) -> list[re.Pattern]:
    try:
        found = [exclude] if isinstance(exclude, str) else [*exclude]
        if not all(isinstance(pattern, str) for pattern in found):
            raise TypeError("not a string, nor a sequence of strings")
        return [re.compile(pattern) for pattern in found]
    except (re.error, TypeError) as error:
        raise ValueError(
            "`exclude` takes regular expressions that are searched for in "
            f"variable paths. Received: exclude={exclude!r} ({error})"
        ) from None
