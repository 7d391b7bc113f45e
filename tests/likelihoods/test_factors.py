"""The score, and the Fisher information at the outputs."""

import cases
import distributions
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian
from keras_fisher.likelihoods import Laplace
from keras_fisher.likelihoods import Poisson


def _categorical_fisher(z):
    p = np.exp(z) / np.exp(z).sum()
    return np.diag(p) - np.outer(p, p)


def _bernoulli_fisher(z):
    p = 1 / (1 + np.exp(-z))
    return np.diag(p * (1 - p))


_FISHER = {
    "categorical": (Categorical(), tf.identity, _categorical_fisher),
    "categorical_p": (Categorical(False), tf.nn.softmax, _categorical_fisher),
    "bernoulli": (Bernoulli(), tf.identity, _bernoulli_fisher),
    "bernoulli_p": (Bernoulli(False), tf.sigmoid, _bernoulli_fisher),
    "gaussian": (
        Gaussian(0.7),
        tf.identity,
        lambda z: np.eye(len(z)) / 0.7**2,
    ),
    "laplace": (
        Laplace(0.7),
        tf.identity,
        lambda z: np.eye(len(z)) / 0.7**2,
    ),
    # With the exponential as the link.
    "poisson": (Poisson(), tf.exp, lambda z: np.diag(np.exp(z))),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("name", _FISHER)
def test_score_of_sampled_labels_has_mean_zero_and_the_fisher_as_covariance(
    name, mode, seed
):
    likelihood, link, fisher = _FISHER[name]
    z = np.array([0.3, -1.2, 1.4])
    logits = distributions.tiled(tf.constant(z))
    y = likelihood.sample(link(logits), random_draws.draw(seed))
    score = cases.compiled(
        lambda logits: distributions.gradient(
            lambda z: likelihood.negative_log_likelihood(y, link(z)), logits
        ),
        mode,
    )(logits).numpy()
    distributions.assert_mean(score, 0, "mean score")
    squares = np.einsum("ni,nj->nij", score, score)
    distributions.assert_mean(squares, fisher(z), "E[score score^T]")


def test_uniform_labels_give_another_second_moment_than_the_fisher():
    # The test above can tell: its labels come from the model.
    z = np.array([0.3, -1.2, 1.4])
    logits = distributions.tiled(tf.constant(z))
    y = Categorical().uniform(logits, random_draws.draw(0))
    score = distributions.gradient(
        lambda z: Categorical().negative_log_likelihood(y, z), logits
    ).numpy()
    squares = np.einsum("ni,nj->nij", score, score)
    with pytest.raises(AssertionError):
        distributions.assert_mean(
            squares, _categorical_fisher(z), "E[score score^T]"
        )
    p = np.exp(z) / np.exp(z).sum()
    distributions.assert_mean(score, p - 1 / 3, "mean score")


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("name", _FISHER)
def test_fisher_factors_are_roots_of_the_fisher_information(name, mode):
    """At the logits, through the link, also of two positions of an example."""
    likelihood, link, fisher = _FISHER[name]
    z = np.array([[0.3, -1.2, 1.4], [-2.0, 0.0, 3.0]])

    def factors(logits):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(logits)
            outputs = link(logits)
        count, factor = likelihood.fisher_factors(outputs)
        return tf.stack(
            [
                tape.gradient(outputs, logits, output_gradients=factor(k))
                for k in range(count)
            ]
        )

    found = cases.compiled(factors, mode)(tf.constant(z[None])).numpy()
    per_part = 2 if "categorical" in name else 3
    assert len(found) == 2 * per_part
    found = found.reshape(len(found), 6)
    expected = np.zeros([6, 6])
    expected[:3, :3], expected[3:, 3:] = fisher(z[0]), fisher(z[1])
    np.testing.assert_allclose(found.T @ found, expected, atol=1e-12)


@pytest.mark.parametrize("from_logits", [True, False])
def test_factors_of_certain_answers_are_finite(from_logits):
    outputs = tf.constant([[200.0, -200.0, -200.0], [-200.0, -200.0, 200.0]])
    if not from_logits:
        outputs = tf.nn.softmax(outputs)
    for likelihood in (Categorical(from_logits), Bernoulli(from_logits)):
        count, factor = likelihood.fisher_factors(outputs)
        for k in range(count):
            assert np.isfinite(factor(k)).all(), (likelihood, k)


def test_factors_of_masked_positions_are_zero():
    outputs = tf.ones([1, 2, 3])
    mask = tf.constant([[True, False]])
    count, factor = Categorical().fisher_factors(outputs, mask)
    factors = np.stack([factor(k) for k in range(count)])
    assert np.abs(factors[:, :, 0]).max() > 0
    assert np.abs(factors[:, :, 1]).max() == 0


def test_a_likelihood_of_ones_own_says_that_it_has_no_factors():
    class Own(likelihoods.Likelihood):
        pass

    with pytest.raises(NotImplementedError, match="monte_carlo"):
        Own().fisher_factors(tf.ones([1, 2]))


@pytest.mark.parametrize("name", _FISHER)
def test_score_is_the_derivative_of_weighted_examples(name):
    likelihood, link, _ = _FISHER[name]
    outputs = link(tf.constant([[0.3, -1.2, 1.4], [0.1, 0.2, 0.3]]))
    y = likelihood.sample(outputs, random_draws.draw(1))
    weights = tf.constant([2.0, 0.5])
    expected = distributions.gradient(
        lambda o: weights * likelihood.negative_log_likelihood(y, o), outputs
    )
    # Of any dtype.
    weights = tf.cast(weights, tf.float64)
    score = likelihood.score(y, outputs, weights=weights)
    np.testing.assert_allclose(score, expected, rtol=1e-6)
