"""Real numbers with errors of two-sided exponential size."""

from __future__ import annotations

import math

import keras
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import Factor
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.base import diagonal
from keras_fisher.likelihoods.base import no_uniform_labels


@keras.saving.register_keras_serializable(package="keras_fisher")
class Laplace(Likelihood):
    """Real-valued labels, whose median is each output.

    -log p(y|x) = |y - f(x)| / b + log 2b for each output. With b = 1 the
    gradient is that of the absolute error, summed over outputs.

    Args:
        scale: The mean absolute error b, a positive number.

    Raises:
        ValueError: If it is not.

    Example:
    >>> likelihood = keras_fisher.likelihoods.Laplace(scale=1.0)
    >>> y, outputs = tf.ones((1, 1)), tf.fill((1, 1), 2.0)
    >>> round(float(likelihood.log_probability(y, outputs)[0, 0]), 4)
    -1.6931
    """

    def __init__(self, scale: float = 1.0):
        self.scale = checks.number(
            "scale",
            scale,
            lambda b: 0 < b < math.inf,
            "a positive, finite number",
        )

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        median = tf.stop_gradient(dtypes.precise(outputs))
        side = random_draws.centred(tf.shape(median), seed) - 0.5
        error = -tf.sign(side) * tf.math.log1p(-2.0 * tf.abs(side))
        return median + self.scale * tf.cast(error, median.dtype)

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        raise no_uniform_labels("A Laplace", "the real line")

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        y = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))
        return -tf.abs(y - outputs) / self.scale - math.log(2 * self.scale)

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        return diagonal(tf.ones_like(outputs) / self.scale)

    def get_config(self) -> dict:
        return {"scale": self.scale}
