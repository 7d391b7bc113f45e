"""Second labels that differ from the first ones: what tells one draw's error.

For independent labels y, y' of an example and any h of them, the variance of
h(y) is E (h(y) - h(y'))² / 2. Where a model is sure, nearly all pairs are
twice the same label and say zero. So y' is drawn given that it differs, and
the pair weighted by how rare that is. With p(y) the probability of all labels
of an example together, a pair {a, b} comes up as (a, b) with probability
p(a) p(b) / (1 - p(a)), and likewise as (b, a). The harmonic mean of 1 - p(a)
and 1 - p(b) as a weight makes 2 p(a) p(b) of both together, what independent
pairs have: it is the weight without bias whose variance is least, as it does
not depend on which label came first. With two classes it is constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import LABELS
from keras_fisher.likelihoods.base import Likelihood


def sample_other(
    likelihood: Likelihood,
    y: Any,
    outputs: Any,
    seed: tf.Tensor,
    mask: Any = None,
) -> tuple[Any, tf.Tensor]:
    """Draws a second ŷ that tells the variance, however sure the model is.

    Up to a position, which is drawn, it is y; there it is another label;
    behind it any. Several outputs of an example are one row of positions.

    Args:
        likelihood: Of the outputs.
        y: Labels drawn by its `sample`, with another seed.
        outputs: Model outputs, of shape `(batch, ...)`.
        seed: As for `Likelihood.sample`.
        mask: As for `Likelihood.negative_log_likelihood`.

    Returns:
        Labels, different from y where they can come twice, and weights w of
        shape `(batch,)`, such that E w (h(y) - h(ŷ))² / 2 is the variance of
        h(y) for any function h of the labels of an example.
    """
    parts = likelihood.parts(outputs, (LABELS, y), ("masks", mask))
    log_same = [_log_same(*part[1:]) for part in parts]
    sizes = [tf.reduce_prod(tf.shape(each)[1:]) for each in log_same]
    flat = _side_by_side(log_same)
    # The first position that differs: those before do not, this one does.
    log_first = tf.cumsum(flat, axis=1, exclusive=True) + _log_not(flat)
    noise = random_draws.gumbel(
        tf.shape(flat), random_draws.another(seed), flat.dtype
    )
    first = tf.argmax(log_first + noise, axis=1)[:, None]
    number = tf.range(tf.shape(flat, tf.int64)[1])[None]
    # Nothing differs where all labels are certain, or hidden.
    differs = (number == first) & (flat < 0)
    repeats = (number <= first) & ~differs
    others = list(y) if likelihood.takes_several_outputs else [y]
    log_same_again = []
    for (k, each, output, label, hidden), like, same, other in zip(
        parts,
        log_same,
        tf.split(repeats, sizes, axis=1),
        tf.split(differs, sizes, axis=1),
    ):
        others[k] = each.sample_again(
            label,
            output,
            random_draws.of_output(seed, k),
            tf.reshape(same, tf.shape(like)),
            tf.reshape(other, tf.shape(like)),
        )
        log_same_again.append(_log_same(each, output, others[k], hidden))
    weights = _harmonic_mean(
        -tf.math.expm1(tf.reduce_sum(flat, axis=1)),
        -tf.math.expm1(tf.reduce_sum(_side_by_side(log_same_again), axis=1)),
    )
    return others if likelihood.takes_several_outputs else others[0], weights


def _log_same(likelihood, output, y, mask) -> tf.Tensor:
    """Log of the probability to draw y, at each position; of hidden ones 0."""
    log_same = tf.cast(likelihood.log_repetition(y, output), tf.float64)
    if mask is None:
        return log_same
    mask = keras_layers.aligned_mask(mask, log_same)
    return tf.where(tf.cast(mask, tf.bool), log_same, 0)


def _side_by_side(tensors: list[tf.Tensor]) -> tf.Tensor:
    """One row of positions for each example."""
    return tf.concat(
        [
            tf.reshape(t, [tf.shape(t)[0], tf.reduce_prod(tf.shape(t)[1:])])
            for t in tensors
        ],
        axis=1,
    )


def _log_not(log_p: tf.Tensor) -> tf.Tensor:
    """log(1 - p), finite at 1."""
    tiny = np.finfo("float64").tiny
    return tf.math.log(tf.maximum(-tf.math.expm1(log_p), tiny))


def _harmonic_mean(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """2 / (1/a + 1/b), of numbers that may be very small or zero."""
    smaller, larger = tf.minimum(a, b), tf.maximum(a, b)
    return smaller * tf.math.divide_no_nan(2 * larger, smaller + larger)
