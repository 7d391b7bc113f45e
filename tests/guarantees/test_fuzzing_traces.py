"""Random traces against loops and enumeration."""

from __future__ import annotations

from typing import NamedTuple

import fuzzing
from hypothesis import strategies as st
import keras
import networks
import numpy as np
import random_networks
from random_networks import Network
import tensorflow as tf

import keras_fisher
from keras_fisher._common import random_draws


class _Trace(NamedTuple):
    network: Network
    estimator: str
    by: str
    num_samples: int
    training: bool
    examples: int
    sizes: tuple[int, int]  # of batches, two ways to split
    as_dataset: bool
    seed: int


@st.composite
def _traces(draw):
    network = draw(random_networks.random_networks(most_blocks=2))
    estimator = draw(
        st.sampled_from(("monte_carlo", "exact", "empirical", "batch"))
    )
    by = ["total", "layer", "variable", "example"]
    # Statistics over the batch are a matter of `"batch"` alone, and there is
    # nothing to compare with where masks are drawn.
    may_train = estimator == "batch" and not (
        network.has("dropout") or network.has("nested")
    )
    return _Trace(
        network,
        estimator,
        draw(st.sampled_from(by[:3] if estimator == "batch" else by)),
        draw(st.integers(1, 3)),
        may_train and draw(fuzzing.EVEN),
        draw(st.integers(1, 5)),
        (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        draw(fuzzing.EVEN),
        draw(st.integers(0, 999)),
    )


def _squares_of_examples(case: _Trace, model, x, y, size) -> np.ndarray:
    """Of shape `(draws, rows, variables)`, one backward pass for each entry."""
    if case.estimator == "exact":
        return _enumerated(case, model, x)[None]
    # With batch statistics, if asked for.
    state = networks.state_of(model)
    step = size if case.training else case.examples
    outputs = tf.concat(
        [
            model(
                keras.tree.map_structure(lambda t, i=i: t[i : i + step], x),
                training=case.training,
            )
            for i in range(0, case.examples, step)
        ],
        axis=0,
    )
    networks.restore(state)
    likelihood = random_networks.likelihood_of(case.network)
    draws = 1 if case.estimator == "empirical" else case.num_samples
    squares = []
    for k in range(draws):
        labels = y
        if case.estimator != "empirical":
            # The labels of an example have a place of their own in the draw.
            seed = tf.constant([case.seed, k], tf.int64)
            labels = likelihood.sample(
                outputs, random_draws.from_example(seed, 0)
            )
        if case.estimator == "batch":
            squares.append(_squares_of_batches(case, model, x, labels, size))
            continue
        gradients = random_networks.gradients_of_examples(
            case.network, model, x, labels, training=False
        )
        squares.append(
            [[np.sum(np.square(g)) for g in each] for each in gradients]
        )
    return np.array(squares)


def _squares_of_batches(case, model, x, labels, size):
    """The shares of the batches in the mean of B ‖ĝ‖²."""
    rows = []
    for begin in range(0, case.examples, size):
        part, given = keras.tree.map_structure(
            lambda t, i=begin: t[i : i + size], (x, labels)
        )
        gradients = random_networks.gradients_of_examples(
            case.network, model, part, given, training=case.training
        )
        count = len(gradients)
        rows.append(
            [
                count * np.sum(np.square(sum(each) / count)) * count
                for each in zip(*gradients)
            ]
        )
    return rows


def _enumerated(case, model, x) -> np.ndarray:
    """Σ over parts and their answers of p ‖∇ log p‖²."""
    network = case.network
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x, training=False)
        mask = getattr(outputs, "_keras_mask", None)
        if network.family == "categorical":
            answers = [
                tf.fill(outputs.shape[:-1], tf.constant(c, tf.int64))
                for c in range(network.outputs)
            ]
        elif network.family == "bernoulli":
            answers = [tf.zeros_like(outputs), tf.ones_like(outputs)]
        else:
            # (y - f)² / 2σ² at y = f + σ has the gradient 1/σ, whose square
            # is the variance of the score.
            stddev = random_networks.likelihood_of(network).stddev
            answers = [tf.stop_gradient(outputs) + stddev]
        losses = [
            tf.unstack(
                tf.reshape(
                    random_networks.negative_log_likelihoods(
                        network, answer, outputs, mask
                    ),
                    [-1],
                )
            )
            for answer in answers
        ]
    parts = len(losses[0]) // case.examples
    squares = np.zeros([case.examples, len(model.trainable_variables)])
    for of_answer in losses:
        for i, loss in enumerate(of_answer):
            gradients = tape.gradient(
                loss,
                [v.value for v in model.trainable_variables],
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            p = 1.0 if network.family == "gaussian" else np.exp(-loss)
            # What is masked has no probability, and a gradient of zero.
            squares[i // parts] += [
                p * np.sum(np.square(tf.convert_to_tensor(g), dtype="float64"))
                for g in gradients
            ]
    return squares


def _check_trace(case: _Trace):
    model = random_networks.build(case.network)
    x, y = random_networks.batch(case.network, model, case.examples, case.seed)
    single = case.network.dtype == "float32"
    options = (
        dict(rtol=2e-3, atol=1e-5) if single else dict(rtol=1e-8, atol=1e-11)
    )
    for size in case.sizes:
        data, batch_size = (x, y), size
        if case.as_dataset:
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
            data, batch_size = (data,), None
        found = keras_fisher.fisher_trace(
            model,
            *data,
            estimator=case.estimator,
            num_samples=case.num_samples,
            by=case.by,
            likelihood=random_networks.likelihood_of(case.network),
            batch_size=batch_size,
            training=case.training,
            seed=case.seed,
            verbose=0,
        )
        squares = _squares_of_examples(case, model, x, y, size)
        _compare(case, model, found, squares, options)


def _compare(case, model, found, squares, options):
    means = squares.mean(axis=0)
    if case.by == "example":
        np.testing.assert_allclose(found, means.sum(axis=1), **options)
        return
    by_variable = means.sum(axis=0) / case.examples
    if case.by == "total":
        total = by_variable.sum()
        np.testing.assert_allclose(found, total, **options)
        error = found.standard_error
        if len(squares) > 1:
            variances = squares.sum(axis=2).var(axis=0, ddof=1)
            expected = np.sqrt(variances.sum() / len(squares)) / case.examples
            np.testing.assert_allclose(error, expected, **options)
        elif case.estimator in ("exact", "empirical"):
            assert error == 0, error
        return
    expected = {}
    for variable, value in zip(model.trainable_variables, by_variable):
        name = variable.path
        if case.by == "layer":
            name = name.rpartition("/")[0]
        expected[name] = expected.get(name, 0.0) + value
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **options, err_msg=name)


@fuzzing.few_or_many
def test_traces_equal_loops_and_sums_over_all_labels_in_any_batches(
    is_long, record_property
):
    fuzzing.try_cases(_check_trace, _traces(), 2, 80, record_property, is_long)
