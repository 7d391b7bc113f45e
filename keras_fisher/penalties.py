"""The Fisher Penalty and the penalties that the paper compares it with.

A penalty decides on which labels, which variables, which subset of the batch
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
import inspect
import math
import numbers
import re
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher._derivatives import forward as forward_lib
from keras_fisher._derivatives import gradient_norms
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives.forward import Forward
from keras_fisher._derivatives.gradient_norms import InputNorm
from keras_fisher._derivatives.gradient_norms import Norm
from keras_fisher._derivatives.gradient_norms import ParameterNorm
from keras_fisher._derivatives.gradient_norms import SquaredNorms
from keras_fisher.likelihoods.base import Likelihood

_METHODS = ("exact", "finite_difference")


@dataclasses.dataclass(frozen=True)
class Term:
    """What a penalty adds to the loss of one step.

    Attributes:
        value: The penalty, a scalar. Its gradient is the penalty's.
        traces: Unbiased estimate of Tr(F) for each trainable variable of the
            layer, in their order, without a gradient. None if the penalty
            says nothing of Tr(F).
    """

    value: tf.Tensor
    traces: tf.Tensor | None


class Penalty:
    """Base class: a squared norm of the gradient, scaled by α.

    Args:
        alpha: α, a finite number of at least 0.
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
            expected penalty does not depend on it, its variance and its cost
            do: there is one backward pass for each micro-batch.
        method: `"exact"` differentiates the gradient norm. With
            `"finite_difference"` the derivative of the norm is
            2 (∇L(θ + εĝ) - ∇L(θ)) / ε, from first derivatives alone: it works
            with any layer. The lowest precision on the way from variables to
            outputs decides how right that is: to seven digits in `float64`,
            three in `float32` (also where TensorFlow resizes images in it,
            within a network of `float64`), 3 to 8 % in `float16` and 4 to
            23 % in `bfloat16`, whatever the last layer computes in.
        exclude: Regular expressions. Variables whose path one of them is
            found in (`re.search`) are left out of the norm.
    """

    name: str  # how `get` finds the class

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        fraction: float = 1.0,
        every: int = 1,
        reuse: bool = True,
        start: int = 0,
        stop: int | None = None,
        micro_batch_size: int | None = None,
        method: str = "exact",
        exclude: str | Sequence[str] = (),
    ):
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        checks.number(
            "alpha",
            alpha,
            lambda a: 0 <= a < math.inf,
            "a finite number of at least 0",
        )
        checks.number(
            "fraction", fraction, lambda f: 0 < f <= 1, "a number in (0, 1]"
        )
        checks.integer("every", every, 1)
        checks.integer("start", start, 0)
        if stop is not None:
            checks.integer("stop", stop, start + 1, "larger than `start`")
        if micro_batch_size is not None:
            checks.integer("micro_batch_size", micro_batch_size, 1)
        checks.choice("method", method, _METHODS)
        self.alpha = float(alpha)
        self.fraction = float(fraction)
        self.every = int(every)
        self.reuse = bool(reuse)
        self.start = int(start)
        self.stop = None if stop is None else int(stop)
        self.micro_batch_size = micro_batch_size
        self.method = method
        self.exclude = exclude
        self._excluded = [_compiled(pattern) for pattern in exclude]

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

    def selects(self, variable: keras.Variable) -> bool:
        """Whether the norm takes in the gradient of `variable`."""
        return not any(p.search(variable.path) for p in self._excluded)

    # Which steps. These take integers or integer tensors.

    def is_active(self, step):
        """Whether `start <= step < stop`."""
        after_start = step >= self.start
        return (
            after_start
            if self.stop is None
            else (after_start & (step < self.stop))
        )

    def is_fresh(self, step):
        """Whether the penalty is computed anew at `step`."""
        return self.is_active(step) & ((step - self.start) % self.every == 0)

    @property
    def stores_gradient(self) -> bool:
        """Whether steps in between add a gradient computed before."""
        return self.reuse and self.every > 1

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
            twice=self.method == "exact" and self.micro_batch_size is not None,
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
    ) -> Term:
        """Computes the penalty. To be called where `forward` was recorded.

        Args:
            forward: What `self.forward` returned.
            likelihood: p(y|x), given the outputs.
            y: Labels of the data set, for the penalties that use them; of
                several outputs, a list or dict.
            seed: Where the draw of labels comes from.
            loss_scale: Factor on the loss in the backward pass, taken out
                again before the square; None for one that fits, which is 1
                but in half precision.
            batches: Number of batches like this one that make up one
                optimizer step (replicas, accumulated gradients).

        Returns:
            A `Term`.

        Raises:
            ValueError: If a selected variable has no gradient, or if the
                likelihood is not for as many outputs.
        """
        likelihood.check_structure(forward.subset_outputs)
        labels = self.labels(
            likelihood,
            forward.subset_outputs,
            forward.subset.of(structures.apply(tf.convert_to_tensor, y)),
            seed,
        )

        def score(outputs, weights):
            return likelihood.score(labels, outputs, forward.mask, weights)

        norms = SquaredNorms(
            forward,
            self.norm,
            score,
            loss_scale,
            dtypes.at_least_single(forward.dtype),
        )
        squares, derivatives = norms.compute(self.method, self.micro_batch_size)
        # Of no example, the trace and the penalty are zero.
        size = tf.cast(tf.maximum(forward.subset.size, 1), squares.dtype)
        traces = squares / size
        examples = tf.cast(forward.batch_size, squares.dtype) * tf.cast(
            batches, squares.dtype
        )
        scale = self.alpha * self.norm.scale(tf.maximum(examples, 1))
        value = scale * gradient_norms.total(self.norm, forward, traces)
        if derivatives is not None:
            scale /= size
            value = gradients_lib.with_gradient(
                value,
                forward.targets,
                [tf.cast(scale, d.dtype) * d for d in derivatives],
            )
        traces = tf.stop_gradient(traces) if self.measures_trace else None
        return Term(value, traces)

    # Configuration.

    def get_config(self) -> dict:
        return {
            "alpha": self.alpha,
            "fraction": self.fraction,
            "every": self.every,
            "reuse": self.reuse,
            "start": self.start,
            "stop": self.stop,
            "micro_batch_size": self.micro_batch_size,
            "method": self.method,
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_config(cls, config: dict) -> Penalty:
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherPenalty(Penalty):
    """The Fisher Penalty: α ‖(1/B) Σ_i ∇_θ -log p_θ(ŷ_i|x_i)‖², ŷ_i ~ p_θ.

    In expectation α Tr(F) / B: it keeps the trace of the Fisher Information
    Matrix small. Source: Jastrzebski et al., *Catastrophic Fisher Explosion*,
    ICML 2021, section 4.

    """

    name = "fisher"
    measures_trace = True

    def labels(self, likelihood, outputs, y, seed):
        return likelihood.sample(outputs, random_draws.draw(seed))


class TraceMeasurement(FisherPenalty):
    """Measures Tr(F) as the Fisher Penalty does, and penalizes nothing.

    Its forward pass is the same to the last bit as without it.
    """

    def __init__(self):
        super().__init__(alpha=0.0)

    def forward(self, layer, x, *, seed=0, watch_inputs=False):
        return forward_lib.run(layer, x, differentiable=False)


@keras.saving.register_keras_serializable(package="keras_fisher")
class GradientPenalty(Penalty):
    """GP: the squared norm of the gradient with the data set's labels.

    Source: Jastrzebski et al., ICML 2021, section 4.

    """

    name = "gradient"
    needs_labels = True

    def labels(self, likelihood, outputs, y, seed):
        return _labels_given(self, y)


@keras.saving.register_keras_serializable(package="keras_fisher")
class UniformLabelPenalty(Penalty):
    """GP_r: as the Fisher Penalty, with labels drawn uniformly.

    Source: Jastrzebski et al., ICML 2021, section 4.

    """

    name = "uniform_label"

    def labels(self, likelihood, outputs, y, seed):
        return likelihood.uniform(outputs, random_draws.draw(seed))


@keras.saving.register_keras_serializable(package="keras_fisher")
class InputGradientPenalty(Penalty):
    """GP_x: α (1/B) Σ_i ‖∇_{x_i} Σ_j -log p_θ(y_j|x_j)‖².

    The squared norm of the gradient with respect to the input, the mean over
    examples (only y_i depends on x_i, but for batch normalization), with the
    data set's labels. Source: Jastrzebski et al., ICML 2021, section 4; Drucker
    & LeCun, *Improving generalization performance using double
    backpropagation*, 1992.

    `exclude` has no effect, since the norm is not over variables.

    """

    name = "input_gradient"
    needs_labels = True

    def labels(self, likelihood, outputs, y, seed):
        return _labels_given(self, y)

    @property
    def norm(self):
        return InputNorm()

    def forward(self, layer, x, *, seed=0, watch_inputs=False):
        found = [leaf.dtype for leaf in keras.tree.flatten(x)]
        if not any(dtype.is_floating for dtype in found):
            raise ValueError(
                "`InputGradientPenalty` differentiates the inputs, which "
                "have to be of floating point. Received inputs of "
                f"{[dtype.name for dtype in found]}. Use `FisherPenalty`, "
                "or put the penalty behind the embedding with "
                "`FisherRegularization`."
            )
        return super().forward(layer, x, seed=seed, watch_inputs=watch_inputs)


_BY_NAME = {
    cls.name: cls
    for cls in (
        FisherPenalty,
        GradientPenalty,
        UniformLabelPenalty,
        InputGradientPenalty,
    )
}

# One text for the arguments that all of them share, cleaned of its
# indentation, which Python 3.13 takes away by itself.
_ARGUMENTS = "".join(
    inspect.cleandoc(Penalty.__doc__ or "").partition("Args:")[1:]
)
for _penalty in _BY_NAME.values():
    _own = inspect.cleandoc(_penalty.__doc__ or "")
    _penalty.__doc__ = f"{_own}\n\n{_ARGUMENTS}"


def get(identifier: Any) -> Penalty | None:
    """Finds the penalty that a number, a name or a config stands for.

    Args:
        identifier: None; α of a `FisherPenalty`; `"fisher"`, `"gradient"`,
            `"uniform_label"` or `"input_gradient"`; a `Penalty` instance,
            class or serialized config.

    Returns:
        A `Penalty`, or None for None.

    Raises:
        ValueError: If nothing above fits.
    """
    if identifier is None or isinstance(identifier, Penalty):
        return identifier
    if isinstance(identifier, numbers.Real) and not isinstance(
        identifier, bool
    ):
        return FisherPenalty(identifier)
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, type) and issubclass(identifier, Penalty):
        return identifier()
    raise ValueError(
        "A penalty is None, a number (the alpha of `FisherPenalty`), one of "
        f"the names {sorted(_BY_NAME)}, or a `keras_fisher` penalty. "
        f"Received: {identifier!r}"
    )


def _labels_given(penalty: Penalty, y: tf.Tensor | None) -> tf.Tensor:
    if y is None:
        raise ValueError(
            f"`{type(penalty).__name__}` takes the gradient with the labels "
            "of the data set, but no `y` was given. Pass `y`, or use "
            "`FisherPenalty`, which draws its labels from the model."
        )
    return y


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            "`exclude` takes regular expressions that are searched for in "
            f"variable paths. Received: {pattern!r} ({error})"
        ) from None
