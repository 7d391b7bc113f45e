"""Real numbers with normal errors."""

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
class Gaussian(Likelihood):
    """Real-valued labels, normal around each output.

    -log p(y|x) = (y - f(x))² / 2σ² + log σ + log(2π)/2 for each output. With
    σ = 1 the gradient is that of half the squared error, summed over outputs.

    Args:
        stddev: The standard deviation σ, a positive number.

    Raises:
        ValueError: If it is not.

    Example:
    >>> likelihood = keras_fisher.likelihoods.Gaussian(stddev=1.0)
    >>> y, outputs = tf.ones((1, 1)), tf.fill((1, 1), 2.0)
    >>> round(float(likelihood.log_probability(y, outputs)[0, 0]), 4)
    -1.4189
    """

    def __init__(self, stddev: float = 1.0):
        self.stddev = checks.number(
            "stddev",
            stddev,
            lambda s: 0 < s < math.inf,
            "a positive, finite number",
        )

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        mean = tf.stop_gradient(dtypes.precise(outputs))
        noise = random_draws.normal(tf.shape(mean), seed, mean.dtype)
        return mean + self.stddev * noise

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        raise no_uniform_labels("A Gaussian", "the real line")

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        y = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))
        scaled = (y - outputs) / self.stddev
        constant = math.log(self.stddev) + 0.5 * math.log(2 * math.pi)
        return -0.5 * tf.square(scaled) - constant

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        return diagonal(tf.ones_like(outputs) / self.stddev)

    def get_config(self) -> dict:
        return {"stddev": self.stddev}
