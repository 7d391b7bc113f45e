"""Estimators of Tr(F) against enumeration, and their errors."""

from __future__ import annotations

import itertools

import enumeration
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._measuring import estimators
from keras_fisher._measuring import per_example
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian
from keras_fisher.likelihoods import Joint


def _tokens(classes=4):
    return enumeration.network(
        (4, 3),
        lambda: layers.Conv1D(4, 2, padding="same", activation="tanh"),
        lambda: layers.Dense(classes),
    )


def _segmentation(classes=3):
    return enumeration.network(
        (3, 2, 2),
        lambda: layers.Conv2D(3, 2, padding="same", activation="tanh"),
        lambda: layers.Conv2D(classes, 1),
    )


def _enumerated(model, x, log_probabilities) -> np.ndarray:
    """Σ_parts Σ_c p_c ‖∇ log p_c‖² of each example and variable.

    Args:
        model: The network.
        x: A batch.
        log_probabilities: Function of the outputs; returns log p of each
            answer of each part, of shape `(parts, answers)`.
    """
    norms = np.zeros([len(x), len(model.trainable_variables)])
    for i in range(len(x)):
        with tf.GradientTape(persistent=True) as tape:
            log_p = log_probabilities(model(x[i : i + 1]))
            entries = tf.unstack(tf.reshape(log_p, [-1]))
        for entry in entries:
            gradients = tape.gradient(entry, model.trainable_variables)
            norms[i] += np.exp(entry) * np.array(
                [np.sum(np.square(g)) for g in gradients]
            )
    return norms


def _log_softmax(outputs):
    return tf.reshape(tf.nn.log_softmax(outputs), [-1, outputs.shape[-1]])


def _log_sigmoid(outputs):
    logits = tf.reshape(outputs, [-1])
    return -tf.stack([tf.nn.softplus(-logits), tf.nn.softplus(logits)], -1)


def _log(outputs):
    return tf.math.log(tf.reshape(outputs, [-1, outputs.shape[-1]]))


def _log_yes_and_no(outputs):
    p = tf.reshape(outputs, [-1])
    return tf.math.log(tf.stack([p, 1 - p], axis=-1))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "make, likelihood, log_probabilities",
    [
        pytest.param(
            lambda: enumeration.classifier(2),
            Categorical(),
            _log_softmax,
            id="2",
        ),
        pytest.param(
            lambda: enumeration.classifier(10),
            Categorical(),
            _log_softmax,
            id="10",
        ),
        pytest.param(
            lambda: enumeration.classifier(100),
            Categorical(),
            _log_softmax,
            id="100",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: enumeration.classifier(10, "softmax"),
            Categorical(from_logits=False),
            _log,
            id="probabilities",
        ),
        pytest.param(_tokens, Categorical(), _log_softmax, id="tokens"),
        pytest.param(
            _segmentation, Categorical(), _log_softmax, id="segmentation"
        ),
        pytest.param(
            lambda: enumeration.classifier(3),
            Bernoulli(),
            _log_sigmoid,
            id="bernoulli",
        ),
        pytest.param(
            lambda: enumeration.classifier(3, "sigmoid"),
            Bernoulli(from_logits=False),
            _log_yes_and_no,
            id="bernoulli_probabilities",
        ),
        pytest.param(_tokens, Bernoulli(), _log_sigmoid, id="bernoulli_tokens"),
    ],
)
def test_exact_is_the_sum_over_all_labels(make, likelihood, log_probabilities):
    model, x = make()
    expected = _enumerated(model, x, log_probabilities)

    def exact(by):
        return keras_fisher.fisher_trace(
            model, x, estimator="exact", by=by, likelihood=likelihood
        )

    by_variable, by_example = exact("variable"), exact("example")
    np.testing.assert_allclose(
        list(by_variable.values()), expected.mean(axis=0), rtol=1e-9
    )
    np.testing.assert_allclose(by_example, expected.sum(axis=1), rtol=1e-9)
    assert exact("total").standard_error == 0.0


@pytest.mark.parametrize("stddev", [0.5, 2.0])
def test_exact_of_a_gaussian_is_the_norm_of_the_jacobian(stddev):
    model, x = enumeration.classifier(3)
    expected = 0.0
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            outputs = model(x[i : i + 1])[0]
        for jacobian in tape.jacobian(outputs, model.trainable_variables):
            expected += np.sum(np.square(jacobian)) / stddev**2 / len(x)
    trace = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood=Gaussian(stddev)
    )
    assert trace == pytest.approx(expected, rel=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_exact_takes_a_backward_pass_less_than_classes(
    jit_compile, monkeypatch
):
    passes = []
    correct = per_example.Recording.squared_norms

    def counted(self, *cotangents):
        passes.append(len(cotangents))
        return correct(self, *cotangents)

    monkeypatch.setattr(per_example.Recording, "squared_norms", counted)
    model, x = enumeration.classifier(8)
    model.jit_compile = jit_compile
    keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood="categorical"
    )
    # The check goes by fast norms alone; batches of five are cut into pieces of
    # two and one.
    assert passes == [7, 7]


def test_masked_tokens_are_no_part_of_an_example():
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(5, 3, mask_zero=True),
            layers.Dense(3),
        ]
    )
    x = np.array([[1, 2, 0, 0], [3, 1, 4, 2]])

    def trace(x):
        return keras_fisher.fisher_trace(
            model, x, estimator="exact", by="example", likelihood="categorical"
        )

    alone = trace(x[:1, :2])
    np.testing.assert_allclose(trace(x)[:1], alone, rtol=1e-9)


@pytest.mark.parametrize(
    "estimator, num_samples, likelihood",
    [
        ("monte_carlo", 5, Gaussian(0.7)),
        enumeration.slow("monte_carlo", 1, Categorical()),
        ("batch", 5, Bernoulli()),
        enumeration.slow("monte_carlo", 1, Bernoulli()),
        enumeration.slow("monte_carlo", 1, Gaussian(0.7)),
        enumeration.slow("monte_carlo", 5, Categorical()),
        enumeration.slow("monte_carlo", 5, Bernoulli()),
        enumeration.slow("batch", 5, Categorical()),
        enumeration.slow("batch", 5, Gaussian(0.7)),
    ],
    ids=repr,
)
def test_errors_are_those_of_other_seeds(estimator, num_samples, likelihood):
    """Within 4 standard errors of exact; the errors stated are true."""
    model, _ = enumeration.classifier(3)
    x = np.random.default_rng(2).normal(size=(40, 3))
    exact = keras_fisher.fisher_trace(
        model, x, estimator="exact", by="layer", likelihood=likelihood
    )
    draws = 200
    estimates = [
        keras_fisher.fisher_trace(
            model,
            x,
            estimator=estimator,
            num_samples=num_samples,
            by="layer",
            likelihood=likelihood,
            seed=seed,
        )
        for seed in range(draws)
    ]
    for layer in exact:
        values = np.array([float(e[layer]) for e in estimates])
        stated = np.sqrt(
            np.mean([e[layer].standard_error ** 2 for e in estimates])
        )
        empirical = values.std(ddof=1)
        z = (values.mean() - exact[layer]) / (empirical / np.sqrt(draws))
        assert abs(z) < 4, f"{layer}: {z:.1f} standard errors off"
        assert 0.75 < stated / empirical < 1.25, (
            f"{layer}: stated {stated:.3g}, empirical {empirical:.3g}"
        )


def _masked_tokens(classes):
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(5, 4, mask_zero=True),
            layers.Dense(classes),
        ]
    )
    random = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return model, np.array([[1, 2, 0], [3, 0, 0], [4, 4, 1]])


def _two_heads():
    body, x = enumeration.classifier(4)
    inputs = keras.Input((3,))
    hidden = body(inputs)
    heads = [layers.Dense(3)(hidden), layers.Dense(2)(hidden)]
    return keras.Model(inputs, heads), x[:3]


# Functions that make a model and a few examples, its likelihood, and the
# numbers of answers at the positions of an example, of each output.
_ONE_DRAW = {
    "classes": (
        lambda: enumeration.classifier(4),
        Categorical(),
        [[4]],
        [()],
    ),
    "probabilities": (
        lambda: enumeration.classifier(4, "softmax"),
        Categorical(from_logits=False),
        [[4]],
        [()],
    ),
    "answers": (
        lambda: enumeration.classifier(3),
        Bernoulli(),
        [[2, 2, 2]],
        [(3,)],
    ),
    "tokens": (lambda: _masked_tokens(3), Categorical(), [[3] * 3], [(3,)]),
    "outputs": (
        _two_heads,
        Joint([Categorical(), Bernoulli()]),
        [[3], [2, 2]],
        [(), (2,)],
    ),
}


def _exact_error(model, x, likelihood, answers, positions, by):
    """That of one draw, by enumeration of all labels of each example."""
    variance = 0.0
    for i in range(len(x)):
        norms, p = [], []
        outputs = model(x[i : i + 1])
        for labels in itertools.product(
            *(range(n) for part in answers for n in part)
        ):
            cuts = np.cumsum([len(part) for part in answers])[:-1]
            y = [
                tf.reshape(tf.constant(part), [1, *shape])
                for part, shape in zip(np.split(labels, cuts), positions)
            ]
            y = y if len(y) > 1 else y[0]
            norms.append(
                keras_fisher.fisher_trace(
                    model,
                    x[i : i + 1],
                    y,
                    estimator="empirical",
                    by=by,
                    likelihood=likelihood,
                )
            )
            nll = likelihood.negative_log_likelihood(y, outputs)[0]
            p.append(np.exp(-nll))
        norms = np.array(
            [list(n.values()) if by != "total" else [n] for n in norms]
        )
        p = np.array(p)
        # All labels of hidden tokens as well: they change nothing.
        np.testing.assert_allclose(p.sum(), 1)
        variance += p @ norms**2 - (p @ norms) ** 2
    return np.sqrt(variance) / len(x)


@pytest.mark.few(1)
@pytest.mark.parametrize("by", ["total", "layer", "variable"])
@pytest.mark.parametrize("name", _ONE_DRAW)
def test_the_error_of_one_draw_is_that_of_enumeration(name, by):
    make, likelihood, answers, positions = _ONE_DRAW[name]
    model, x = make()
    expected = _exact_error(model, x, likelihood, answers, positions, by)
    squares = []
    for seed in range(300):
        found = keras_fisher.fisher_trace(
            model, x, likelihood=likelihood, seed=seed, by=by
        )
        found = list(found.values()) if by != "total" else [found]
        squares.append([each.standard_error**2 for each in found])
    mean = np.mean(squares, axis=0)
    z = (mean - expected**2) / (np.std(squares, axis=0) / np.sqrt(300))
    assert np.all(np.abs(z) < 4), (np.sqrt(mean), expected)


@pytest.mark.parametrize(
    ("sure", "size"),
    [
        (0.99, 64),
        enumeration.slow(0.99, 256),
        enumeration.slow(0.9, 64),
        enumeration.slow(0.9, 256),
        enumeration.slow(0.5, 64),
        enumeration.slow(0.5, 256),
    ],
)
def test_two_errors_cover_the_truth_however_sure_the_model(sure, size):
    model, _ = enumeration.classifier(10)
    head = model.layers[-1]
    head.kernel.assign(0.3 * head.kernel)
    head.bias.assign([np.log(9 * sure / (1 - sure)), *[0.0] * 9])
    x = np.random.default_rng(4).normal(size=(size, 3))
    exact = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood="categorical"
    )
    estimates = [
        keras_fisher.fisher_trace(model, x, likelihood="categorical", seed=seed)
        for seed in range(300)
    ]
    errors = np.array([each.standard_error for each in estimates])
    covered = np.abs(np.array(estimates) - exact) <= 2 * errors
    assert np.all(errors > 0)
    assert np.mean(covered) > 0.9, f"{np.mean(covered):.1%}"


@pytest.mark.few(1)
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=repr)
def test_errors_of_one_draw_are_the_same_under_xla(likelihood):
    model, x = enumeration.classifier(3)
    found = []
    for jit_compile in (False, True):
        model.jit_compile = jit_compile
        # A seed of more than 32 bits, as a random one is.
        found.append(
            keras_fisher.fisher_trace(
                model, x, likelihood=likelihood, seed=2**40 + 3
            )
        )
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0].standard_error == pytest.approx(
        found[1].standard_error, rel=1e-9
    )


@pytest.mark.slow
def test_errors_of_examples():
    model, x = enumeration.classifier(3)
    exact = keras_fisher.fisher_trace(
        model, x, estimator="exact", by="example", likelihood="categorical"
    )
    sampled = keras_fisher.fisher_trace(
        model,
        x,
        by="example",
        likelihood="categorical",
        num_samples=400,
        seed=0,
    )
    assert sampled.shape == sampled.standard_error.shape == (5,)
    z = (sampled - exact) / sampled.standard_error
    assert np.all(np.abs(z) < 4), z
    one = keras_fisher.fisher_trace(
        model, x, by="example", likelihood="categorical"
    )
    assert np.isnan(one.standard_error).all()


def test_batch_with_one_draw_has_no_error_to_tell():
    model, x = enumeration.classifier(3)
    trace = keras_fisher.fisher_trace(
        model, x, estimator="batch", likelihood="categorical"
    )
    assert trace > 0
    assert np.isnan(trace.standard_error)


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [11, estimators.MOST_TOGETHER])
def test_each_draw_is_one_of_the_labels_and_counts_once(count):
    """Also where draws do not fill the last group that is traced."""
    model, x = enumeration.classifier(3)
    x = x[:1]

    def trace(**kwargs):
        return float(
            keras_fisher.fisher_trace(
                model, x, by="example", likelihood="categorical", **kwargs
            )[0]
        )

    norms = [trace(y=np.array([k]), estimator="empirical") for k in range(3)]
    means = [trace(num_samples=n, seed=0) for n in (count, count + 1)]
    last = (count + 1) * means[1] - count * means[0]
    errors = np.abs(np.subtract(last, norms)) / np.max(norms)
    assert errors.min() < 1e-9, (last, norms)


@pytest.mark.slow
def test_many_draws_are_not_the_first_ones_again():
    model, x = enumeration.classifier(3)
    block = 7 * estimators.MOST_TOGETHER
    once, twice = (
        keras_fisher.fisher_trace(
            model, x, likelihood="categorical", num_samples=n, seed=0
        )
        for n in (block, 2 * block)
    )
    assert float(once) != pytest.approx(float(twice), rel=1e-9)


@keras.saving.register_keras_serializable("tests")
class _RoundAndRound(Gaussian):
    """Whose factors do not end where the last one is."""

    def factors(self, outputs):
        count, factor = super().factors(outputs)
        return count, lambda k: factor(k % count)


def test_no_factor_counts_twice():
    model, x = enumeration.classifier(11)
    found, expected = (
        keras_fisher.fisher_trace(
            model, x, estimator="exact", likelihood=likelihood
        )
        for likelihood in (_RoundAndRound(), Gaussian())
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
