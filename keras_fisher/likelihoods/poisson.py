"""Counts."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import Factor
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.base import diagonal
from keras_fisher.likelihoods.base import in_single_precision
from keras_fisher.likelihoods.base import log_of
from keras_fisher.likelihoods.base import no_uniform_labels

# Up to here TensorFlow's distribution function is right to ten digits.
_LARGEST_SEARCHED = 1e4


@keras.saving.register_keras_serializable(package="keras_fisher")
class Poisson(Likelihood):
    """Counts, whose rate is each output.

    -log p(y|x) = λ - y log λ + log y! for each output λ = f(x), which is at
    least 0, as `keras.losses.Poisson` takes it: end the model with an `exp` or
    a `softplus`.

    Example:
    >>> likelihood = keras_fisher.likelihoods.Poisson()
    >>> y, outputs = tf.ones((1, 1)), tf.fill((1, 1), 2.0)
    >>> round(float(likelihood.log_probability(y, outputs)[0, 0]), 4)
    -1.3069
    """

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        rates = tf.stop_gradient(tf.cast(outputs, tf.float64))
        counts = _quantile(random_draws.centred(tf.shape(rates), seed), rates)
        return tf.cast(counts, dtypes.at_least_single(outputs.dtype))

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        raise no_uniform_labels("A Poisson", "all counts")

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        rates = dtypes.precise(outputs)
        y = tf.reshape(tf.cast(y, rates.dtype), tf.shape(rates))
        # A rate of 0 is sure of a count of 0.
        events = tf.math.multiply_no_nan(log_of(rates), y)
        return events - rates - tf.math.lgamma(y + 1.0)

    def log_repetition(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return self.log_probability(y, outputs)

    def sample_again(self, y, outputs, seed, repeats, differs):
        rates = tf.cast(outputs, tf.float64)
        counts = tf.cast(y, tf.float64)
        u = random_draws.centred(tf.shape(rates), seed)
        # Of the distribution without y, whose step is skipped.
        log_p = self.log_probability(counts, rates)
        other = -u * tf.math.expm1(log_p)
        is_above = other > _distribution(counts - 1.0, rates)
        other = _quantile(
            tf.where(is_above, other + tf.exp(log_p), other), rates
        )
        # Rounded, a very sure 0 has no other.
        other = tf.where(other == counts, counts + 1.0, other)
        labels = tf.where(differs, other, _quantile(u, rates))
        return tf.where(repeats, y, tf.cast(labels, y.dtype))

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        # The variance of a count over the square of its rate.
        return diagonal(tf.math.divide_no_nan(1.0, tf.sqrt(outputs)))

    constrains_outputs = True

    def check(self, outputs: Any) -> None:
        outputs = in_single_precision(outputs)
        if not (outputs >= 0).all():
            raise ValueError(
                "The likelihood expects rates of at least 0, but the outputs "
                f"of the model range from {outputs.min():.3g} to "
                f"{outputs.max():.3g}. End the model with "
                '`activation="exponential"` or `"softplus"`.'
            )


def _distribution(counts: tf.Tensor, rates: tf.Tensor) -> tf.Tensor:
    """The probability of no more than so many, which may be -1."""
    found = tf.math.igammac(tf.maximum(counts, 0.0) + 1.0, rates)
    return tf.where(counts < 0, tf.zeros_like(found), found)


def _quantile(u: tf.Tensor, rates: tf.Tensor) -> tf.Tensor:
    """The smallest count that no more than has a probability of u."""
    z = tf.math.ndtri(u)
    # Cornish and Fisher's expansion; its error is a hundredth of a count.
    large = tf.math.ceil(
        rates + z * tf.sqrt(rates) + (tf.square(z) - 1.0) / 6.0 - 0.5
    )
    searched = tf.minimum(rates, _LARGEST_SEARCHED)
    most = tf.math.ceil(searched + 8.0 * tf.sqrt(searched) + 40.0)

    def halved(low, high):
        middle = tf.math.floor((low + high) / 2.0)
        is_less = _distribution(middle, searched) < u
        return tf.where(is_less, middle, low), tf.where(is_less, high, middle)

    bound = _LARGEST_SEARCHED + 8.0 * math.sqrt(_LARGEST_SEARCHED) + 42.0
    _, found = tf.while_loop(
        lambda low, high: True,
        halved,
        (-tf.ones_like(rates), most),
        maximum_iterations=math.ceil(math.log2(bound)),
    )
    return tf.where(rates > _LARGEST_SEARCHED, large, found)
