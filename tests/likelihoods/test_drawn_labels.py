"""Labels drawn from any distribution."""

import cases
import distributions
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Categorical


@pytest.mark.parametrize("positions", [(2,), (2, 2)], ids=["tokens", "pixels"])
def test_positions_of_an_example_are_drawn_independently(positions):
    p = distributions.rng(13).dirichlet(np.ones(3), size=positions)
    drawn = Categorical(from_logits=False).sample(
        distributions.tiled(tf.constant(p)), random_draws.draw(4)
    )
    assert drawn.shape == (distributions.DRAWS, *positions), drawn.shape
    one_hot = np.eye(3)[drawn].reshape(distributions.DRAWS, -1, 3)
    p = p.reshape(-1, 3)
    for part in range(len(p)):
        distributions.assert_mean(
            one_hot[:, part], p[part], f"frequency in {part}"
        )
    pairs = np.einsum("na,nb->nab", one_hot[:, 0], one_hot[:, -1])
    distributions.assert_mean(pairs, np.outer(p[0], p[-1]), "frequency of two")


def test_consecutive_examples_are_drawn_independently():
    drawn = Categorical(from_logits=False).sample(
        distributions.tiled(tf.constant(distributions.P)), random_draws.draw(5)
    )
    one_hot = np.eye(4)[drawn]
    pairs = np.einsum("na,nb->nab", one_hot[:-1], one_hot[1:])
    distributions.assert_mean(
        pairs, np.outer(distributions.P, distributions.P), "frequency of two"
    )


@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_sure_labels_are_always_drawn(name):
    likelihood = distributions.CASES[name].likelihood
    outputs = tf.constant([[1.0, 0.0], [0.0, 1.0]] * 5000)
    drawn = likelihood.sample(outputs, random_draws.draw(6)).numpy()
    expected = outputs.numpy()
    if isinstance(likelihood, Categorical):
        expected = expected.argmax(axis=-1)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    "name",
    ["categorical_p", "bernoulli_p"],
)
def test_sure_labels_are_drawn_whatever_the_draw(monkeypatch, name):
    # The first and the last number that `random_draws.uniform` returns.
    first, last = 0.0, 1 - 2.0**-24
    draws = tf.constant(
        [[first, first], [first, last], [last, first], [last, last]], tf.float64
    )
    monkeypatch.setattr(
        random_draws,
        "uniform",
        lambda shape, seed, dtype=tf.float32: tf.cast(draws, dtype),
    )
    likelihood = distributions.CASES[name].likelihood
    for sure in (0, 1):
        outputs = tf.one_hot([sure] * 4, 2)
        expected = outputs.numpy()
        if isinstance(likelihood, Categorical):
            expected = expected.argmax(axis=-1)
        drawn = likelihood.sample(outputs, random_draws.draw(0)).numpy()
        np.testing.assert_array_equal(drawn, expected, f"{sure} is sure")


# How labels are drawn; a likelihood without uniform labels is not in the list.
_METHODS = [(name, "sample") for name in distributions.CASES]
_METHODS += [
    (name, "uniform")
    for name in distributions.CASES
    if name not in distributions.WITHOUT_UNIFORM_LABELS
]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_draws_do_not_depend_on_compilation(name, method, mode, dtype):
    likelihood, outputs, _ = distributions.case(name, dtype, (64, 3, 4))
    function = getattr(likelihood, method)
    signature = [
        tf.TensorSpec([None, 3, 4], dtype),
        tf.TensorSpec([2], tf.int64),
    ]
    compiled = cases.compiled(function, mode, signature)
    for seed in (7, 8):
        actual = compiled(outputs, random_draws.draw(seed))
        expected = function(outputs, random_draws.draw(seed))
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_draws_behind_a_layer_do_not_depend_on_compilation(name, method, mode):
    likelihood = distributions.CASES[name].likelihood
    activation = {
        "categorical_p": "softmax",
        "bernoulli_p": "sigmoid",
    }.get(name)
    keras.utils.set_random_seed(14)
    layer = keras.layers.Dense(4, activation=activation)
    layer.build((None, 5))

    def draw(x, seed):
        return getattr(likelihood, method)(layer(x), seed)

    signature = [tf.TensorSpec([None, 5]), tf.TensorSpec([2], tf.int64)]
    compiled = cases.compiled(draw, mode, signature)
    x = tf.constant(distributions.rng(15).normal(size=(64, 5)), tf.float32)
    for size in (64, 10):
        np.testing.assert_allclose(
            compiled(x[:size], random_draws.draw(9)),
            draw(x[:size], random_draws.draw(9)),
            atol=1e-5,
        )


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_same_seed_same_labels_and_another_seed_others(name, method):
    likelihood, outputs, _ = distributions.case(name, shape=(64, 3, 4))
    draws = [
        getattr(likelihood, method)(outputs, random_draws.draw(seed)).numpy()
        for seed in (1, 1, 2, 3)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    for other in draws[2:]:
        share = np.mean(draws[0] == other)
        assert share < 0.9, f"{share:.0%} of the labels are the same"


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_likelihood_takes_the_labels_it_draws(name, method):
    likelihood, outputs, _ = distributions.case(name)
    y = getattr(likelihood, method)(outputs, random_draws.draw(0))
    nll = likelihood.negative_log_likelihood(y, outputs)
    assert nll.shape == outputs.shape[:1], nll.shape
    assert np.isfinite(nll).all(), nll


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_no_gradient_flows_through_the_draw(name, method):
    likelihood, outputs, _ = distributions.case(name)
    draw = getattr(likelihood, method)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        drawn = tf.cast(draw(outputs, random_draws.draw(0)), tf.float32)
    assert tape.gradient(drawn, outputs) is None
    # The labels count as constants where outputs occur in both places.
    drawn = draw(outputs, random_draws.draw(0))
    np.testing.assert_array_equal(
        distributions.gradient(
            lambda z: likelihood.negative_log_likelihood(
                draw(z, random_draws.draw(0)), z
            ),
            outputs,
        ),
        distributions.gradient(
            lambda z: likelihood.negative_log_likelihood(drawn, z), outputs
        ),
    )
