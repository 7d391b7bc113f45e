"""Outputs and labels of each distribution, and its log density in loops."""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np
from scipy import stats
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian
from keras_fisher.likelihoods import Laplace
from keras_fisher.likelihoods import Poisson

DTYPES = ["float16", "bfloat16", "float32", "float64"]
# The shape of the positions of a batch of examples.
POSITIONS = {"batch": (6,), "tokens": (4, 3), "pixels": (3, 2, 2)}
CLASSES = 5


def double(tensor):
    return tf.cast(tensor, tf.float64).numpy()


def rng(*entropy):
    return np.random.default_rng([2021, *entropy])


def categorical_outputs(positions, from_logits, dtype, classes=CLASSES):
    logits = 2 * rng(1).normal(size=(*positions, classes))
    outputs = logits if from_logits else tf.nn.softmax(logits)
    return tf.cast(outputs, dtype)


def bernoulli_outputs(shape, from_logits, dtype):
    logits = 2 * rng(2).normal(size=shape)
    return tf.cast(logits if from_logits else tf.sigmoid(logits), dtype)


def indices(positions, classes=CLASSES):
    return rng(3).integers(0, classes, size=positions)


def loop_over_positions(positions, at_position, mask=None):
    """Returns the sum of `at_position(index)` for each example."""
    sums = [0.0] * positions[0]
    for index in np.ndindex(*positions):
        if mask is None or mask[index[: mask.ndim]]:
            sums[index[0]] += at_position(index)
    return np.array(sums)


def categorical_loop(y, outputs, from_logits, mask=None):
    def at_position(index):
        row = [float(output) for output in outputs[index]]
        if from_logits:
            normalizer = math.log(math.fsum(math.exp(z) for z in row))
            row = [z - normalizer for z in row]
        else:
            row = [math.log(p) for p in row]
        if y.shape == outputs.shape:
            return -math.fsum(t * z for t, z in zip(y[index], row))
        label = y[index] if y.ndim == outputs.ndim - 1 else y[index][0]
        return -row[int(label)]

    return loop_over_positions(outputs.shape[:-1], at_position, mask)


def bernoulli_loop(y, outputs, from_logits, mask=None):
    y = np.reshape(y, outputs.shape)

    def at_position(index):
        p = float(outputs[index])
        if from_logits:
            p = 1 / (1 + math.exp(-p))
        return -(y[index] * math.log(p) + (1 - y[index]) * math.log1p(-p))

    return loop_over_positions(outputs.shape, at_position, mask)


def gaussian_loop(y, outputs, stddev, mask=None):
    y = np.reshape(y, outputs.shape)

    def at_position(index):
        return -stats.norm.logpdf(y[index], outputs[index], stddev)

    return loop_over_positions(outputs.shape, at_position, mask)


def laplace_loop(y, outputs, scale, mask=None):
    y = np.reshape(y, outputs.shape)

    def at_position(index):
        return -stats.laplace.logpdf(y[index], outputs[index], scale)

    return loop_over_positions(outputs.shape, at_position, mask)


def poisson_loop(y, outputs, mask=None):
    y = np.reshape(y, outputs.shape)

    def at_position(index):
        return -stats.poisson.logpmf(int(y[index]), float(outputs[index]))

    return loop_over_positions(outputs.shape, at_position, mask)


class Case(NamedTuple):
    """A distribution, and how to make outputs and labels for it.

    Attributes:
        likelihood: The distribution.
        shape: Of outputs, with examples first.
        outputs: Function of a shape and a dtype.
        labels: Function of the shape of the outputs.
        loop: -log p of each example in a Python loop, a function of labels,
            outputs and a mask, as arrays.
    """

    likelihood: likelihoods.Likelihood
    shape: tuple[int, ...]
    outputs: Callable
    labels: Callable
    loop: Callable


def _categorical(from_logits):
    return Case(
        Categorical(from_logits),
        (4, 3, CLASSES),
        lambda shape, dtype: categorical_outputs(
            shape[:-1], from_logits, dtype, shape[-1]
        ),
        lambda shape: indices(shape[:-1]),
        lambda y, outputs, mask=None: categorical_loop(
            y, outputs, from_logits, mask
        ),
    )


def _bernoulli(from_logits):
    return Case(
        Bernoulli(from_logits),
        (4, 3, 2),
        lambda shape, dtype: bernoulli_outputs(shape, from_logits, dtype),
        lambda shape: indices(shape, 2),
        lambda y, outputs, mask=None: bernoulli_loop(
            y, outputs, from_logits, mask
        ),
    )


CASES = {
    "categorical": _categorical(True),
    "categorical_p": _categorical(False),
    "bernoulli": _bernoulli(True),
    "bernoulli_p": _bernoulli(False),
    "gaussian": Case(
        Gaussian(0.7),
        (4, 3, 2),
        lambda shape, dtype: tf.cast(rng(8).normal(size=shape), dtype),
        lambda shape: rng(9).normal(size=shape),
        lambda y, outputs, mask=None: gaussian_loop(y, outputs, 0.7, mask),
    ),
    "laplace": Case(
        Laplace(0.7),
        (4, 3, 2),
        lambda shape, dtype: tf.cast(rng(8).normal(size=shape), dtype),
        lambda shape: rng(9).normal(size=shape),
        lambda y, outputs, mask=None: laplace_loop(y, outputs, 0.7, mask),
    ),
    "poisson": Case(
        Poisson(),
        (4, 3, 2),
        lambda shape, dtype: tf.cast(rng(8).gamma(2.0, size=shape), dtype),
        lambda shape: rng(9).poisson(2.0, size=shape),
        poisson_loop,
    ),
}
WITHOUT_UNIFORM_LABELS = ("gaussian", "laplace", "poisson")


def case(name, dtype="float32", shape=None):
    """Returns a likelihood, outputs that it takes, and labels."""
    found = CASES[name]
    shape = shape or found.shape
    labels = tf.constant(found.labels(shape))
    return found.likelihood, found.outputs(shape, dtype), labels


def gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


DRAWS = 20_000


def tiled(outputs, count=DRAWS):
    """Returns a batch of `count` examples with the same outputs."""
    return tf.tile(outputs[None], [count] + [1] * outputs.shape.rank)


def assert_mean(values, expected, what, errors=4.0):
    """Compares a mean over the first axis within its standard error."""
    mean = values.mean(axis=0)
    error = values.std(axis=0) / np.sqrt(len(values))
    z = np.abs(mean - expected) / np.maximum(error, 1e-12)
    assert np.all(z < errors), (
        f"{what} is {mean}, expected {expected}: off by {np.max(z):.1f} "
        f"standard errors of {error}"
    )


P = np.array([0.02, 0.5, 0.13, 0.35])


class LogPoisson(likelihoods.Likelihood):
    def log_probability(self, y, outputs):
        y = tf.cast(y, outputs.dtype)
        return y * outputs - tf.exp(outputs) - tf.math.lgamma(y + 1)
