"""What every predictive distribution p(y|x) does, and how to write one."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import keras_layers
from keras_fisher._common.read_once import ReadOnce

# What `Likelihood.parts` calls labels: outputs without one may have none.
LABELS = "labels"

# Gives factor k, an `int32` scalar, for all examples.
Factor = Callable[[tf.Tensor], tf.Tensor]


class Likelihood(ReadOnce):
    """Base class of predictive distributions: what outputs say of labels.

    The first axis of the outputs runs over examples. An example may have
    labels at many *positions* (the tokens of a text, the pixels of an image,
    the entries of a vector): they are independent given the outputs, so that
    their log-likelihoods add up.

    A subclass implements

    * `sample` and `log_probability`, which all estimators and penalties need;
    * `uniform`, for `UniformLabelPenalty`;
    * `factors`, for `fisher_trace(..., estimator="exact")`;
    * `log_repetition` and `sample_again`, if labels can come twice, for the
      standard error of one draw where the model is sure of them;
    * `constrains_outputs` and `check`, if some outputs have no meaning;
      `constrains_operations` and `check_operation`, if it is known what
      computes others;
    * `check_labels` and `is_correct`, if labels are not classes by index;
    * `has_label`, with `reads_labels = True`, if some positions of the data
      have no label;
    * `get_config`, if it has arguments,

    and is registered with `keras.saving.register_keras_serializable`, to be
    saved with a model. `keras_fisher.likelihoods.draws` has random numbers
    for `sample` and `uniform`.

    Example:
    ```python
    from keras_fisher.likelihoods import draws

    @keras.saving.register_keras_serializable("mine")
    class Exponential(keras_fisher.likelihoods.Likelihood):
        \"\"\"Waiting times, whose mean is the exponential of the output.\"\"\"

        def sample(self, outputs, seed):
            u = draws.uniform(tf.shape(outputs), seed, outputs.dtype)
            return -tf.exp(tf.stop_gradient(outputs)) * tf.math.log1p(-u)

        def log_probability(self, y, outputs):
            return -outputs - tf.cast(y, outputs.dtype) * tf.exp(-outputs)
    ```
    """

    _instead = "Give the model another one: `model.likelihood = ...`."

    def _is_read_once(self, name: str) -> bool:
        return not name.startswith("_")

    # What a subclass implements.

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws ŷ ~ p(y|x).

        Args:
            outputs: Model outputs, of shape `(batch, ...)`, in 32 bits or more.
            seed: What the functions of `likelihoods.draws` take.

        Returns:
            Labels that `negative_log_likelihood` takes. No gradient flows
            through them. The same seed gives the same labels eagerly, in a
            graph and under XLA.
        """
        raise NotImplementedError(self._misses("sample", "Everything"))

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws labels with equal probability, whatever the outputs say.

        Args:
            outputs: Model outputs, of shape `(batch, ...)`.
            seed: As for `sample`.

        Returns:
            Labels that `negative_log_likelihood` takes.
        """
        raise NotImplementedError(
            self._misses("uniform", "`UniformLabelPenalty`")
        )

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """Log p(y|x) at each position.

        Args:
            y: Labels.
            outputs: Model outputs, of shape `(batch, ...)`.

        Returns:
            Tensor of shape `(batch, positions...)`, in 32 bits or more.
        """
        raise NotImplementedError(self._misses("log_probability", "Everything"))

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        """The Fisher information at the outputs: see `fisher_factors`.

        Args:
            outputs: Model outputs, of known shape `(batch, ...)`, in 32 bits
                or more.

        Returns:
            The number of factors and a function that gives each of them, of
            the shape and dtype of `outputs`.
        """
        raise NotImplementedError(
            self._misses("factors", '`estimator="exact"`')
            + ' Use `estimator="monte_carlo"`.'
        )

    def log_repetition(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """Log of the probability that another ŷ is y, at each position.

        Args:
            y: Labels drawn by `sample`.
            outputs: Model outputs, of shape `(batch, ...)`.

        Returns:
            Tensor of the shape that `log_probability` has, as precise near 0
            as elsewhere. By default labels never come twice, as those of a
            continuous distribution.
        """
        shape = tf.shape(self.log_probability(y, outputs))
        # As good as -inf, which `tf.debugging.enable_check_numerics` refuses.
        return tf.fill(shape, tf.float32.min)

    def sample_again(
        self,
        y: tf.Tensor,
        outputs: tf.Tensor,
        seed: tf.Tensor,
        repeats: tf.Tensor,
        differs: tf.Tensor,
    ) -> tf.Tensor:
        """Draws ŷ ~ p(y|x) given what it has in common with y.

        Args:
            y: Labels drawn by `sample`.
            outputs: Model outputs, of shape `(batch, ...)`.
            seed: As for `sample`.
            repeats: Whether ŷ is y: boolean, at each position.
            differs: Whether it is not. Where both are false it is anything,
                as it is everywhere by default.

        Returns:
            Labels of the shape and dtype of y.
        """
        return self.sample(outputs, seed)

    def has_label(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor | None:
        """Which positions have a label, by what stands there in the data.

        The others, as padding, are no part of their example: they are left
        out like those that a Keras mask hides.

        Args:
            y: Labels of the data set.
            outputs: Model outputs, of shape `(batch, ...)`.

        Returns:
            Boolean, of the shape of the positions; None if all have one.
        """
        return None

    reads_labels = False  # whether `has_label` may be false
    constrains_outputs = False  # whether `check` may refuse outputs
    constrains_operations = False  # whether `check_operation` may
    takes_several_outputs = False  # as a list or dict
    names: list[str] | None = None  # of several outputs

    def check(self, outputs: Any) -> None:
        """Raises a `ValueError` where outputs cannot be what is claimed.

        Args:
            outputs: Concrete (not symbolic) model outputs.
        """

    def check_operation(self, operation: Any, outputs: Any = None) -> None:
        """Raises a `ValueError` where outputs are computed as others are.

        Args:
            operation: Type of the TensorFlow operation that computes the
                outputs, such as `"Softmax"`; `""` if none is known.
            outputs: Concrete model outputs, or None.
        """

    def check_labels(self, y: Any, classes: int) -> None:
        """Raises a `ValueError` where labels are none of the classes.

        Args:
            y: NumPy array of labels; what is none is not looked at.
            classes: Size of the last axis of the outputs.
        """

    def is_correct(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """Whether y is the most probable label, by what Keras assumes.

        Of a single output that is the probability of a yes, of several the
        largest one.

        Args:
            y: Labels.
            outputs: Model outputs, of shape `(batch, ..., classes)`.

        Returns:
            1 where it is and 0 elsewhere, `float32` of the shape of the
            positions.
        """
        if outputs.shape[-1] == 1:
            return is_side_of(0.5, y, outputs)
        if y.shape.rank == outputs.shape.rank and y.shape[-1] != 1:
            y = tf.argmax(y, axis=-1)
        elif y.shape.rank == outputs.shape.rank:
            y = tf.squeeze(y, axis=-1)
        predicted = tf.argmax(outputs, axis=-1, output_type=tf.int64)
        return tf.cast(predicted == tf.cast(y, tf.int64), tf.float32)

    def get_config(self) -> dict[str, Any]:
        return {}

    # What follows from it.

    def negative_log_likelihood(
        self,
        y: tf.Tensor,
        outputs: tf.Tensor,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """-log p(y|x), summed over the positions of each example.

        Args:
            y: Labels: drawn by `sample` or `uniform`, or of the data set.
            outputs: Model outputs, of shape `(batch, ...)`.
            mask: Keras mask: boolean, of the shape of the positions. Those
                that it hides are no part of the example: they add zero.

        Returns:
            Tensor of shape `(batch,)`, `float32` or the wider dtype of
            `outputs`.
        """
        each = -self.log_probability(_without_nan(y, mask), outputs)
        if mask is not None:
            mask = tf.cast(keras_layers.aligned_mask(mask, each), each.dtype)
            # Whatever is at hidden positions, NaN included.
            each = tf.math.multiply_no_nan(each, mask)
        return tf.reduce_sum(each, axis=list(range(1, each.shape.rank)))

    def score(
        self,
        y: tf.Tensor,
        outputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        weights: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The gradient of Σ_i w_i (-log p(y_i|x_i)) at the outputs.

        Args:
            y: Labels.
            outputs: Model outputs, of shape `(batch, ...)`.
            mask: As for `negative_log_likelihood`.
            weights: w, of shape `(batch,)`; ones if None.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(outputs)
            loss = self.negative_log_likelihood(y, outputs, mask)
        if weights is not None:
            weights = tf.cast(weights, loss.dtype)
        return tape.gradient(loss, outputs, output_gradients=weights)

    def visible(self, y: Any, outputs: Any, mask: Any = None) -> Any:
        """The mask of the positions that count.

        Args:
            y: Labels of the data set; None if they are not known.
            outputs: Model outputs, of shape `(batch, ...)`.
            mask: Keras mask of the outputs, or None.

        Returns:
            Boolean mask of those that neither that hides nor `has_label`, as
            `negative_log_likelihood` takes it; None if there is nothing to
            hide.
        """
        labelled = None
        if self.reads_labels and y is not None:
            labelled = self.has_label(y, outputs)
        if labelled is None or mask is None:
            return mask if labelled is None else labelled
        mask = keras_layers.aligned_mask(tf.cast(mask, tf.bool), labelled)
        return labelled & mask

    def parts(
        self, outputs: Any, *others: tuple[str, Any]
    ) -> list[tuple[Any, ...]]:
        """What is drawn with a seed of its own, here all of it.

        Args:
            outputs: Model outputs.
            *others: Pairs of a word for what else there is of each output,
                for messages, and that.

        Returns:
            For each output that has labels its number, its likelihood, the
            output, and the others.
        """
        return [(0, self, outputs, *(values for _, values in others))]

    def fisher_factors(
        self, outputs: tf.Tensor, mask: tf.Tensor | None = None
    ) -> tuple[int, Factor]:
        """The Fisher information at the outputs, in closed form.

        For each example, with ∇ the derivative by its outputs f,

            E_{ŷ~p(y|x)} [∇(-log p(ŷ|x)) ∇(-log p(ŷ|x))ᵀ] = Σ_k s_k s_kᵀ,

        so that E ‖∇_θ -log p(ŷ|x)‖² = Σ_k ‖(∂f/∂θ)ᵀ s_k‖² needs one backward
        pass for each k.

        Args:
            outputs: Model outputs, of known shape `(batch, ...)`.
            mask: As for `negative_log_likelihood`.

        Returns:
            The number of factors, and a function of k, an `int32` scalar,
            that returns s_k for all examples, of the shape of `outputs`, in
            32 bits or more.
        """
        count, factor = self.factors(dtypes.precise(outputs))
        if mask is None:
            return count, factor
        mask = keras_layers.aligned_mask(mask, outputs)
        return count, lambda k: tf.math.multiply_no_nan(
            factor(k), tf.cast(mask, dtypes.at_least_single(outputs.dtype))
        )

    def check_structure(self, outputs: Any) -> None:
        """Raises a `ValueError` if there are several outputs, or only one.

        Args:
            outputs: Something for one output, or a list or dict for several.
        """
        are_several = isinstance(outputs, (list, tuple, dict))
        if are_several == self.takes_several_outputs:
            return
        found = "one output"
        if are_several:
            is_dict = isinstance(outputs, dict)
            names = list(outputs) if is_dict else len(outputs)
            found = f"several outputs ({names})"
        raise ValueError(
            f"The model has {found}, and the likelihood is {self}. Several "
            "outputs take a list of losses or likelihoods, or a dict by name; "
            "one output takes one."
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Likelihood:
        return cls(**config)

    def _misses(self, method: str, needed_by: str) -> str:
        return (
            f"{type(self).__name__} implements no `{method}`. {needed_by} "
            "needs it."
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def _without_nan(y: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Labels, with zeros at hidden positions, where NaN would have spread.

    A derivative there is 0, which times NaN is NaN.
    """
    if mask is None:
        return y
    y = tf.convert_to_tensor(y)
    if not y.dtype.is_floating or y.shape.rank < mask.shape.rank:
        return y
    mask = keras_layers.aligned_mask(tf.cast(mask, tf.bool), y)
    return tf.where(mask, y, tf.zeros_like(y))


# What several of the distributions share.


def in_single_precision(outputs: Any) -> np.ndarray:
    """Concrete outputs as an array, also while a graph is traced."""
    return keras.ops.convert_to_numpy(outputs).astype("float32")


def log_of(probabilities: tf.Tensor) -> tf.Tensor:
    """The logarithm, finite at zero."""
    # Only an exact zero is moved: a larger floor would stop the gradient of
    # improbable labels, which `UniformLabelPenalty` draws all the time.
    tiny = np.finfo(probabilities.dtype.as_numpy_dtype).tiny
    return tf.math.log(tf.maximum(probabilities, tiny))


def no_uniform_labels(likelihood: str, labels: str) -> ValueError:
    """What to raise where labels are none of finitely many."""
    return ValueError(
        f"{likelihood} likelihood has no uniform labels: {labels} cannot be "
        "drawn from uniformly. Use `FisherPenalty` or `GradientPenalty` with "
        "a regression loss."
    )


def not_logits(outputs: str, likelihood: str) -> ValueError:
    """What to raise where probabilities are claimed to be logits.

    Args:
        outputs: What they are.
        likelihood: The name of the likelihood.
    """
    return ValueError(
        "The likelihood expects logits (from_logits=True), but the outputs of "
        f"the model are probabilities: {outputs}. Pass "
        f"`likelihood=keras_fisher.likelihoods.{likelihood}"
        "(from_logits=False)`, or the loss with `from_logits=False`; or leave "
        "out the last activation of the model."
    )


def diagonal(roots: tf.Tensor) -> tuple[int, Factor]:
    """`Likelihood.factors` where outputs are independent of each other.

    Args:
        roots: The square root of the Fisher information at each output.
    """
    shape = roots.shape
    size = math.prod(shape[1:])

    def factor(k):
        chosen = tf.one_hot(k, size, dtype=roots.dtype)
        return roots * tf.reshape(chosen, [1, *shape[1:]])

    return size, factor


def is_side_of(threshold: float, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """1 where a yes-or-no label is on the side of the output, else 0."""
    predicted = tf.cast(outputs > threshold, tf.float32)
    y = tf.reshape(tf.cast(y, tf.float32), tf.shape(outputs))
    return tf.cast(predicted == y, tf.float32)


def not_probabilities(
    outputs: np.ndarray, more: str, last_layer: str
) -> ValueError:
    """What to raise where outputs are claimed to be probabilities.

    Args:
        outputs: What they are.
        more: What else is wrong with them.
        last_layer: What makes probabilities of logits.
    """
    return ValueError(
        "The likelihood expects probabilities (from_logits=False), but the "
        f"outputs of the model are not: they range from {outputs.min():.3g} to "
        f"{outputs.max():.3g}{more}. Pass `from_logits=True` to the loss or "
        f"likelihood, or end the model with a {last_layer}."
    )
