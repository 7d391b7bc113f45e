"""Independent answers, yes or no."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import Factor
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.base import diagonal
from keras_fisher.likelihoods.base import in_single_precision
from keras_fisher.likelihoods.base import is_side_of
from keras_fisher.likelihoods.base import log_of
from keras_fisher.likelihoods.base import not_logits
from keras_fisher.likelihoods.base import not_probabilities


@keras.saving.register_keras_serializable(package="keras_fisher")
class Bernoulli(Likelihood):
    """Independent yes-or-no labels, the sigmoid of each output.

    -log p(y|x) = -y log p - (1 - y) log(1 - p) for each output, with p the
    sigmoid of a logit, or a probability itself.
    Labels have the shape of the outputs; a label between 0 and 1 counts as
    both answers, weighted.

    Args:
        from_logits: Whether outputs are logits rather than probabilities.

    Example:
    >>> likelihood = keras_fisher.likelihoods.Bernoulli(from_logits=True)
    >>> y, outputs = tf.ones((1, 1)), tf.zeros((1, 1))
    >>> round(float(likelihood.log_probability(y, outputs)[0, 0]), 4)
    -0.6931
    """

    def __init__(self, from_logits: bool = True):
        self.from_logits = bool(from_logits)

    def _yes(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        return tf.sigmoid(outputs) if self.from_logits else outputs

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        p = tf.stop_gradient(self._yes(outputs))
        draws = random_draws.uniform(tf.shape(p), seed, p.dtype)
        return tf.cast(draws < p, p.dtype)

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        draws = random_draws.uniform(tf.shape(outputs), seed)
        return tf.cast(draws < 0.5, dtypes.at_least_single(outputs.dtype))

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        outputs = dtypes.precise(outputs)
        y = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))
        if self.from_logits:
            yes, no = -tf.nn.softplus(-outputs), -tf.nn.softplus(outputs)
        else:
            yes, no = log_of(outputs), log_of(1 - outputs)
        return y * yes + (1 - y) * no

    def log_repetition(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        if self.from_logits:
            return self.log_probability(y, outputs)
        p = dtypes.precise(outputs)
        return tf.math.log1p(-tf.where(y > 0.5, 1 - p, p))

    def sample_again(self, y, outputs, seed, repeats, differs):
        labels = tf.where(differs, 1 - y, self.sample(outputs, seed))
        return tf.where(repeats, y, labels)

    def factors(self, outputs: tf.Tensor) -> tuple[int, Factor]:
        # The variance of a yes, p (1 - p), at the logit; 1 over it at p.
        if self.from_logits:
            p = tf.sigmoid(outputs)
            return diagonal(tf.sqrt(p * tf.sigmoid(-outputs)))
        variance = outputs * (1 - outputs)
        return diagonal(tf.math.divide_no_nan(1.0, tf.sqrt(variance)))

    @property
    def constrains_operations(self) -> bool:
        return self.from_logits

    def check_operation(self, operation: Any, outputs: Any = None) -> None:
        if operation == "Sigmoid":
            raise not_logits("they come out of a sigmoid", "Bernoulli")

    @property
    def constrains_outputs(self) -> bool:
        return not self.from_logits

    def check(self, outputs: Any) -> None:
        if self.from_logits:
            return
        outputs = in_single_precision(outputs)
        if not ((outputs >= 0).all() and (outputs <= 1).all()):
            raise not_probabilities(outputs, "", "sigmoid")

    def is_correct(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return is_side_of(0.0 if self.from_logits else 0.5, y, outputs)

    def get_config(self) -> dict:
        return {"from_logits": self.from_logits}
