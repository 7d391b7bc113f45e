"""One of several classes."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import Factor
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.base import in_single_precision
from keras_fisher.likelihoods.base import log_of
from keras_fisher.likelihoods.base import not_logits
from keras_fisher.likelihoods.base import not_probabilities


@keras.saving.register_keras_serializable(package="keras_fisher")
class Categorical(Likelihood):
    """One of C classes, the softmax of the last axis.

    -log p(y|x) = -log softmax(f(x))_y of logits, -log f(x)_y of probabilities.
    Labels are class indices of shape `outputs.shape[:-1]` (or with a last
    axis of 1), or one-hot or soft labels of the shape of the outputs.

    Args:
        from_logits: Whether outputs are logits rather than probabilities.
        ignore_class: Class index that stands, in the data, where there is no
            label (padding): such positions do not count. The model may draw
            it elsewhere, if it is one of its classes.

    Raises:
        ValueError: If `ignore_class` is not an integer or None.

    Example:
    >>> likelihood = keras_fisher.likelihoods.Categorical(from_logits=True)
    >>> y, outputs = tf.constant([2]), tf.zeros((1, 4))
    >>> round(float(likelihood.log_probability(y, outputs)[0]), 4)
    -1.3863
    """

    def __init__(
        self, from_logits: bool = True, ignore_class: int | None = None
    ):
        if ignore_class is not None:
            checks.integer("ignore_class", ignore_class, -math.inf, "or None")
            ignore_class = int(ignore_class)
        self.from_logits = bool(from_logits)
        self.ignore_class = ignore_class

    def _log_probabilities(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        return (
            tf.nn.log_softmax(outputs) if self.from_logits else log_of(outputs)
        )

    def _logits(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        return outputs if self.from_logits else log_of(outputs)

    def _noisy_logits(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The largest is that of ŷ ~ p(y|x), among any of the classes."""
        # Gumbel-max: `tf.random.stateless_categorical` has no XLA kernel.
        logits = self._logits(outputs)
        noise = random_draws.gumbel(tf.shape(logits), seed, logits.dtype)
        return tf.stop_gradient(logits) + noise

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.argmax(self._noisy_logits(outputs, seed), axis=-1)

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        classes = outputs.shape[-1]
        labels = random_draws.integers(tf.shape(outputs)[:-1], classes, seed)
        return tf.cast(labels, tf.int64)

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        log_probabilities = self._log_probabilities(outputs)
        if not _is_dense(y, outputs):
            y = _for_each_position(y, outputs)
            # One-hot rather than gather: its gradient needs no scatter.
            y = tf.one_hot(
                tf.cast(y, tf.int64),
                outputs.shape[-1],
                dtype=log_probabilities.dtype,
            )
        y = tf.cast(y, log_probabilities.dtype)
        # A class with probability 0 counts only if it is the label.
        return tf.reduce_sum(
            tf.math.multiply_no_nan(log_probabilities, y), axis=-1
        )

    def log_repetition(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        logits, is_y = self._logits(outputs), _is_class(y, outputs)
        own = tf.reduce_sum(tf.where(is_y, logits, 0), axis=-1)
        # Not 1 - p, nor a logarithm of p, which a sure p rounds to 0.
        others = tf.reduce_logsumexp(_without(is_y, logits), axis=-1)
        return -tf.nn.softplus(others - own)

    def sample_again(self, y, outputs, seed, repeats, differs):
        noisy = self._noisy_logits(outputs, seed)
        excluded = _is_class(y, outputs) & differs[..., None]
        labels = tf.argmax(_without(excluded, noisy), axis=-1)
        return tf.where(repeats, y, labels)

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        """C - 1 factors for each position.

        Of diag(p) - p pᵀ, the information at the logits, the Cholesky factor
        is known: with q_j = Σ_{i>j} p_i, column j is
        √(p_j q_j / q_{j-1}) (e_j - Σ_{i>j} (p_i / q_j) e_i), the information
        in whether the class is j, given that none before j is. At
        probabilities, that is divided by p.

        Source: Tanabe & Sagae, *An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the
        multinomial distribution*, JRSS B, 1992.
        """
        shape = outputs.shape
        positions, classes = math.prod(shape[1:-1]), shape[-1]
        p = tf.nn.softmax(outputs) if self.from_logits else outputs
        p = tf.reshape(p, [-1, positions, classes])
        after = tf.cumsum(p, axis=-1, exclusive=True, reverse=True)
        size = tf.sqrt(p * tf.math.divide_no_nan(after, after + p))
        factors = max(1, classes - 1)  # one, of zeros, for a single class

        def factor(k):
            j = k % factors
            is_class = tf.one_hot(j, classes, dtype=p.dtype)
            # Of the classes after j.
            share = tf.math.divide_no_nan(
                p, tf.reduce_sum(after * is_class, -1, keepdims=True)
            ) * tf.cast(tf.range(classes) > j, p.dtype)
            column = is_class - share
            column *= tf.reduce_sum(size * is_class, -1, keepdims=True)
            if not self.from_logits:
                column = tf.math.divide_no_nan(column, p)
            is_position = tf.one_hot(k // factors, positions, dtype=p.dtype)
            return tf.reshape(column * is_position[None, :, None], shape)

        return positions * factors, factor

    @property
    def reads_labels(self) -> bool:
        return self.ignore_class is not None

    def has_label(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor | None:
        if _is_dense(y, outputs):
            return None
        y = tf.reshape(tf.cast(y, tf.int64), tf.shape(outputs)[:-1])
        return y != self.ignore_class

    def check_labels(self, y: Any, classes: int) -> None:
        if not isinstance(y, np.ndarray) or not np.issubdtype(
            y.dtype, np.integer
        ):
            return
        if self.ignore_class is not None:
            y = y[y != self.ignore_class]
        if y.size == 0:
            return
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(
                f"The model has {classes} classes, so labels have to be from "
                f"0 to {classes - 1}. Received labels from {y.min()} to "
                f"{y.max()}. Number the classes from 0, or give the model "
                "more outputs."
            )

    @property
    def constrains_operations(self) -> bool:
        return self.from_logits

    def check_operation(self, operation: Any, outputs: Any = None) -> None:
        if operation == "Softmax":
            raise not_logits("they come out of a softmax", "Categorical")
        if operation in _UNCLEAR and outputs is not None:
            outputs = in_single_precision(outputs)
            errors = abs(outputs.sum(axis=-1) - 1)
            # A table of logits may be one-hot, but no softmax has a zero.
            if outputs.shape[-1] > 1 and (
                (outputs > 0).all() and (errors <= 1e-3).all()
            ):
                raise not_logits(
                    "they are positive and sum to 1 over the last axis",
                    "Categorical",
                )

    @property
    def constrains_outputs(self) -> bool:
        return not self.from_logits

    def check(self, outputs: Any) -> None:
        if self.from_logits:
            return
        outputs = in_single_precision(outputs)
        sums = outputs.sum(axis=-1)
        errors = abs(sums - 1)
        if not ((outputs >= 0).all() and (errors <= 1e-2).all()):
            found = sums.flat[errors.argmax()]
            raise not_probabilities(
                outputs,
                f" and sum to {found:.3g} over the last axis",
                "softmax",
            )

    def get_config(self) -> dict:
        return {
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
        }


# What may compute probabilities without a softmax, and little else: only then
# values tell. The last layer of logits is a matrix product or a sum.
_UNCLEAR = {"DivNoNan", "Exp", "PartitionedCall", "RealDiv"}
_UNCLEAR |= {"StatefulPartitionedCall"}


def _is_class(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Whether a class is y: boolean, of the shape of the outputs."""
    return tf.one_hot(y, outputs.shape[-1], True, False, dtype=tf.bool)


def _without(classes: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Logits with which some of the classes are impossible."""
    # As good as -inf, which `tf.debugging.enable_check_numerics` refuses.
    return tf.where(classes, logits.dtype.min, logits)


def _for_each_position(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Class indices in the shape of the positions."""
    given, positions = y.shape, outputs.shape[:-1]
    if y.shape.rank == outputs.shape.rank and y.shape[-1] in (1, None):
        y = tf.squeeze(y, axis=-1)
    if not y.shape.is_compatible_with(positions):
        raise ValueError(
            "Outputs are the classes of positions, each of which has a label: "
            f"those of shape {outputs.shape} go with labels of shape "
            f"{positions}, or one-hot ones of their own. Received: labels of "
            f"shape {given}. Transcripts, as of CTC, do not label frames: a "
            "`FisherPenalty`, and `fisher_trace` with another estimator than "
            "'empirical', draw labels from the model and need none."
        )
    return y


def _is_dense(y: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Whether labels are probabilities per class, not class indices."""
    return (
        y.shape.rank == outputs.shape.rank
        and y.shape[-1] == outputs.shape[-1]
        and outputs.shape[-1] != 1
    )
