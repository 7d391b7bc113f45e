"""Second labels that differ from the first, and what pairs count for."""

from __future__ import annotations

import itertools

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
from keras_fisher.likelihoods import Joint
from keras_fisher.likelihoods import pairs

_SURE = [0.97, 0.002, 0.028]
_EVEN = [0.3, 0.2, 0.5]
_FIRST, _SECOND = 21, 22


def _bernoulli(yes):
    return [[1 - p, p] for p in yes]


# The probabilities of the answers at each position of an example, likelihoods
# that know them, and what the positions look like.
_CASES = {
    "sure": ([_SURE], Categorical(False), ()),
    "sure_logits": ([_SURE], Categorical(), ()),
    "even": ([_EVEN], Categorical(), ()),
    "tokens": ([_SURE, _EVEN, _SURE], Categorical(), (3,)),
    "pixels": ([_SURE, [0.9, 0.1, 0.0]] * 2, Categorical(False), (2, 2)),
    "answers": (_bernoulli([0.99, 0.02, 0.9]), Bernoulli(), (3,)),
    "answers_p": (_bernoulli([0.99, 0.02, 0.4]), Bernoulli(False), (3,)),
    "sequence": (_bernoulli([0.99, 0.02, 0.9, 0.5]), Bernoulli(), (2, 2)),
}
# What a mask leaves of three tokens.
_MASKS = [[1, 0, 1], [0, 1, 1], [0, 0, 1]]


def _outputs(p, likelihood, positions):
    """One example of outputs that say these probabilities."""
    p = np.array(p)
    if isinstance(likelihood, Bernoulli):
        p = p[:, 1]
        z = np.log(p) - np.log1p(-p)
        return (z if likelihood.from_logits else p).reshape(positions)
    # Softmax does not see the constant.
    values = np.log(p) + 2 if likelihood.from_logits else p
    return values.reshape(*positions, p.shape[-1])


def _numbers(labels, classes) -> np.ndarray:
    """One number for all labels of an example."""
    labels = np.reshape(labels, [len(labels), -1]).astype(int)
    return np.ravel_multi_index(labels.T, [classes] * labels.shape[1])


def _probabilities(p) -> np.ndarray:
    """Those of all labels of an example, by their number."""
    return np.array([np.prod(each) for each in itertools.product(*p)])


def _assert_variances(first, second, weights, p):
    """Of any function of the labels, half of the squared differences."""
    of_labels = distributions.rng(30).normal(size=(len(p), 6))
    variances = p @ of_labels**2 - (p @ of_labels) ** 2
    squares = np.square(of_labels[first] - of_labels[second])
    actual = (weights[:, None] * squares / 2).mean(axis=0)
    # How often each pair comes up, and what it says.
    often = p[:, None] * (p / (1 - p[:, None])) * (1 - np.eye(len(p)))
    weight = 2 / (1 / (1 - p[:, None]) + 1 / (1 - p))
    differences = of_labels[:, None] - of_labels
    says = weight[..., None] * np.square(differences) / 2
    mean = np.einsum("ab,abh->h", often, says)
    np.testing.assert_allclose(mean, variances, rtol=1e-9)
    spread = np.einsum("ab,abh->h", often, np.square(says)) - mean**2
    z = (actual - mean) / np.sqrt(spread / len(first) + 1e-12 * mean**2)
    assert np.all(np.abs(z) < 4), z


def _assert_weights(first, second, weights, p):
    a, b = 1 - p[first], 1 - p[second]
    np.testing.assert_allclose(weights, 2 / (1 / a + 1 / b), rtol=1e-9)


def _drawn(likelihood, outputs, mask=None):
    y = likelihood.sample(outputs, random_draws.draw(_FIRST))
    return y, *pairs.sample_other(
        likelihood, y, outputs, random_draws.draw(_SECOND), mask
    )


@pytest.mark.parametrize("name", _CASES)
def test_pairs_differ_and_tell_the_variance(name):
    p, likelihood, positions = _CASES[name]
    outputs = distributions.tiled(
        tf.constant(_outputs(p, likelihood, positions))
    )
    y, other, weights = _drawn(likelihood, outputs)
    assert (other.shape, other.dtype) == (y.shape, y.dtype)
    first, second = _numbers(y, len(p[0])), _numbers(other, len(p[0]))
    assert np.all(first != second)
    _assert_weights(first, second, weights, _probabilities(p))
    _assert_variances(first, second, weights.numpy(), _probabilities(p))


@pytest.mark.parametrize("mask", _MASKS, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize("name", ["tokens", "answers"])
def test_hidden_positions_do_not_count(name, dtype, mask):
    p, likelihood, positions = _CASES[name]
    outputs = distributions.tiled(
        tf.constant(_outputs(p, likelihood, positions))
    )
    y, other, weights = _drawn(
        likelihood,
        outputs,
        distributions.tiled(tf.cast(tf.constant(mask), dtype)),
    )
    seen = np.flatnonzero(mask)
    first, second = (
        _numbers(labels.numpy()[:, seen], len(p[0])) for labels in (y, other)
    )
    assert np.all(first != second)
    p = _probabilities([p[k] for k in seen])
    _assert_weights(first, second, weights, p)
    _assert_variances(first, second, weights.numpy(), p)


def test_a_mask_may_have_fewer_axes_than_the_positions():
    p, likelihood, positions = _CASES["sequence"]
    outputs = distributions.tiled(
        tf.constant(_outputs(p, likelihood, positions))
    )
    mask = distributions.tiled(tf.constant([False, True]))
    y, other, _ = _drawn(likelihood, outputs, mask)
    assert np.any(y[:, 1] != other[:, 1], axis=-1).all()


@pytest.mark.parametrize("name", ["tokens", "answers"])
def test_where_nothing_is_seen_nothing_counts(name):
    p, likelihood, positions = _CASES[name]
    outputs = distributions.tiled(
        tf.constant(_outputs(p, likelihood, positions)), 50
    )
    _, _, weights = _drawn(likelihood, outputs, tf.zeros([50, 3], tf.bool))
    np.testing.assert_array_equal(weights, np.zeros(50))


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (Categorical(False), [[0.0, 1.0, 0.0]] * 9),
        (Categorical(), [[-2000.0, 1000.0]] * 9),
        (Bernoulli(False), [[0.0, 1.0]] * 9),
        (Bernoulli(), [[1000.0]] * 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_all_is_certain_nothing_counts(likelihood, outputs, dtype):
    y, other, weights = _drawn(likelihood, tf.constant(outputs, dtype))
    assert np.all(weights < 1e-30), weights
    if np.all(weights == 0):
        np.testing.assert_array_equal(y, other)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_weights_are_exact_however_sure_the_model_is(gap, dtype):
    """1 - p is 2 exp(-gap), far below what a p of this dtype can tell."""
    logits = tf.constant([[gap, 0.0, 0.0]] * 20, dtype)
    _, _, weights = _drawn(Categorical(), logits)
    rare = 2 * np.exp(-gap) / (1 + 2 * np.exp(-gap))
    unlikely = 1 - rare / 2
    expected = 2 / (1 / rare + 1 / unlikely)
    np.testing.assert_allclose(weights, [expected] * 20, rtol=3e-6)
    logits = tf.constant([[gap], [-gap]] * 10, dtype)
    _, _, weights = _drawn(Bernoulli(), logits)
    rare = 1 / (1 + np.exp(gap))
    expected = 2 / (1 / rare + 1 / (1 - rare))
    np.testing.assert_allclose(weights, [expected] * 20, rtol=3e-6)


def test_weights_are_as_exact_as_probabilities_tell():
    """In single precision, p next to 1."""
    p = np.float32(1) - np.float32(2.0**-24)
    rare = 1 - float(p)
    expected = 2 / (1 / rare + 1 / (1 - rare))
    for likelihood, outputs in (
        (Bernoulli(False), [[p]]),
        (Bernoulli(False), [[rare]]),
        (Categorical(False), [[p, rare]]),
    ):
        _, _, weights = _drawn(likelihood, tf.constant(outputs, tf.float32))
        np.testing.assert_allclose(weights, [expected], rtol=3e-6)


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_labels_of_several_outputs_are_drawn_together(names):
    parts = [_CASES[name] for name in ("sure", "answers")]
    outputs = [
        distributions.tiled(tf.constant(_outputs(*part))) for part in parts
    ]
    # One without labels in between.
    outputs.insert(1, tf.zeros([distributions.DRAWS, 2]))
    joint = Joint([parts[0][1], None, parts[1][1]], names)
    if names:
        outputs = dict(zip(names, outputs))
    y, other, weights = _drawn(joint, outputs)
    assert other[1] is None
    first, second = (
        8 * _numbers(labels[0], 3) + _numbers(labels[2], 2)
        for labels in (y, other)
    )
    assert np.all(first != second)
    p = np.outer(*[_probabilities(part[0]) for part in parts]).ravel()
    _assert_weights(first, second, weights, p)
    _assert_variances(first, second, weights.numpy(), p)
    # The outputs draw with seeds of their own.
    free = (y[0] != other[0]).numpy()
    np.testing.assert_allclose(
        other[2].numpy()[free].mean(axis=0), [0.99, 0.02, 0.9], atol=0.02
    )


def test_masks_of_several_outputs_are_those_of_each():
    p, likelihood, positions = _CASES["tokens"]
    z = distributions.tiled(tf.constant(_outputs(p, likelihood, positions)), 99)
    hidden = tf.zeros([99, 3], tf.bool)
    y, other, _ = _drawn(Joint([likelihood] * 2), [z, z], [hidden, None])
    assert np.any(y[1] != other[1], axis=-1).all()


@pytest.mark.parametrize("likelihood", [Gaussian(), distributions.LogPoisson()])
def test_labels_that_never_come_twice_are_drawn_independently(
    likelihood, monkeypatch
):
    outputs = tf.constant(distributions.rng(31).normal(size=(6, 4, 2)))
    monkeypatch.setattr(
        distributions.LogPoisson,
        "sample",
        lambda self, outputs, seed: likelihoods.draws.uniform(
            tf.shape(outputs), seed, outputs.dtype
        ),
    )
    mask = tf.constant([[False, True, True, True]] * 6)
    for joint in (likelihood, Joint([Categorical(), likelihood])):
        z, hidden, seed = outputs, mask, random_draws.draw(_SECOND)
        if joint is not likelihood:
            z, hidden = [outputs[..., 0], outputs], [None, mask]
        y, other, weights = _drawn(joint, z, hidden)
        if joint is not likelihood:
            y, other, seed = y[1], other[1], random_draws.of_output(seed, 1)
        np.testing.assert_array_equal(other, likelihood.sample(outputs, seed))
        assert np.all(y != other)
        np.testing.assert_array_equal(weights, np.ones(6))


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("name", distributions.CASES)
def test_other_labels_do_not_depend_on_compilation(name, mode):
    likelihood, outputs, _ = distributions.case(name, "float32", (64, 3, 4))
    mask = tf.constant(distributions.rng(32).random((64, 3)) < 0.7)
    y = likelihood.sample(outputs, random_draws.draw(_FIRST))

    def function(y, outputs, mask, seed):
        seed = random_draws.from_example(seed, 0)
        return pairs.sample_other(likelihood, y, outputs, seed, mask)

    signature = [
        tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (y, outputs, mask)
    ]
    compiled = cases.compiled(
        function, mode, [*signature, tf.TensorSpec([2], tf.int64)]
    )
    for size in (64, 10):
        arguments = [
            *[t[:size] for t in (y, outputs, mask)],
            random_draws.draw(7),
        ]
        for actual, expected in zip(compiled(*arguments), function(*arguments)):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", distributions.CASES)
def test_other_labels_are_the_same_whatever_they_are_drawn_with(name):
    likelihood, outputs, _ = distributions.case(name, "float64", (8, 3, 4))
    y = likelihood.sample(outputs, random_draws.draw(_FIRST))

    def others(begin, end):
        seed = random_draws.from_example(random_draws.draw(5), begin)
        labels, _ = pairs.sample_other(
            likelihood, y[begin:end], outputs[begin:end], seed
        )
        return labels.numpy()

    np.testing.assert_array_equal(
        others(0, 8), np.concatenate([others(0, 3), others(3, 8)])
    )
