"""Squared gradient norms and their derivatives, against brute force."""

from __future__ import annotations

import functools

import cases
import evaluation
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods
from keras_fisher._common import random_draws


@pytest.mark.few(2)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_value_and_gradient_equal_brute_force_in_float64(name):
    evaluation.check_against_brute_force(FisherPenalty(0.7), name, "eager")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float64", marks=pytest.mark.slow), "float32"],
)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.impossible("Keras draws another mask", name="dropout", mode="xla")
def test_modes_agree_in_both_precisions(name, dtype, mode):
    penalty = FisherPenalty(0.7)
    model, x = networks.build(name, "float64")
    expected = evaluation.run("eager", penalty, model, x)
    model, x = networks.build(name, dtype)
    if name == "dropout":  # Keras draws another mask in another precision.
        expected = evaluation.run("eager", penalty, model, x)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    value, traces, gradients = evaluation.run(
        mode, penalty, model, x, unknown_batch_size=True
    )
    assert value.dtype == traces.dtype == dtype
    errors = [
        evaluation.relative([value], [expected[0]]),
        evaluation.relative([traces], [expected[1]]),
        evaluation.relative(gradients, expected[2]),
    ]
    assert max(errors) < tolerance, errors


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", ["dense", "batch_norm", "embedding"])
def test_fraction_equals_brute_force_on_the_rows_it_draws(name, mode):
    start = random_draws.integers(
        [], networks.BATCH, random_draws.draw(evaluation.SEED, stream=1)
    )
    rows = (start + tf.range(3)) % networks.BATCH
    evaluation.check_against_brute_force(
        FisherPenalty(0.7, fraction=0.5), name, mode, [rows.numpy()]
    )


@pytest.mark.parametrize("fraction, size", [(0.01, 1), (0.4, 2), (0.99, 6)])
def test_fraction_takes_the_nearest_number_of_examples(fraction, size):
    model, x = networks.build("dense")
    penalty = FisherPenalty(fraction=fraction)
    assert penalty.forward(model, x).subset.size == size


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.4, 0.5, 0.99])
def test_fraction_of_a_number_that_only_the_batch_tells(fraction):
    model, _ = networks.build("dense")
    penalty = FisherPenalty(fraction=fraction)

    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.float64)])
    def size(x):
        return penalty.forward(model, x).subset.size

    found = [int(size(tf.zeros([n, 5], tf.float64))) for n in range(1, 8)]
    assert found == [max(1, round(fraction * n)) for n in range(1, 8)]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_finite_difference_equals_exact_in_float64(name):
    model, x = networks.build(name)
    exact = evaluation.run("eager", FisherPenalty(0.7), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference")
    value, traces, gradients = evaluation.run("graph", penalty, model, x)
    np.testing.assert_allclose(value, exact[0], rtol=1e-9)
    np.testing.assert_allclose(traces, exact[1], rtol=1e-6, atol=1e-12)
    error = evaluation.relative(gradients, exact[2])
    assert error < 1e-6, error


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["dense", "conv2d", "batch_norm", "lstm"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_finite_difference_is_right_to_three_digits_in_float32(name, mode):
    model, x = networks.build(name, "float32")
    exact = evaluation.run("eager", FisherPenalty(0.7), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference")
    _, _, gradients = evaluation.run(mode, penalty, model, x)
    error = evaluation.relative(gradients, exact[2])
    assert error < 5e-3, error


@pytest.mark.few(1)
@pytest.mark.parametrize("fraction, size", [(1.0, 2), (0.5, None), (0.7, 2)])
@pytest.mark.parametrize("name", ["dense", "batch_norm", "dropout"])
def test_finite_difference_of_parts_and_micro_batches(name, fraction, size):
    options = dict(fraction=fraction, micro_batch_size=size)
    model, x = networks.build(name)
    exact = evaluation.run("eager", FisherPenalty(0.7, **options), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference", **options)
    value, _, gradients = evaluation.run("graph", penalty, model, x)
    np.testing.assert_allclose(value, exact[0], rtol=1e-9)
    assert evaluation.relative(gradients, exact[2]) < 1e-6


def test_finite_difference_changes_no_state_and_no_losses():
    model, x = networks.build("batch_norm")
    model.layers[0].add_loss(tf.constant(0.0))
    before = [v.numpy() for v in model.trainable_variables]
    with tf.GradientTape():
        penalty = FisherPenalty(method="finite_difference")
        forward = penalty.forward(model, x)
        state = [v.numpy() for _, v in _pairs(model)]
        penalty(forward, evaluation.CATEGORICAL)
    after = [v.numpy() for _, v in _pairs(model)]
    for a, b in zip(state, after):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before, model.trainable_variables):
        np.testing.assert_array_equal(a, b)


def _pairs(model):
    return [(v.path, v) for v in model.non_trainable_variables]


def _no_second_derivative():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            keras.layers.Conv2D(3, 2, activation="tanh"),
            keras.layers.Lambda(tf.nn.local_response_normalization),
            keras.layers.Flatten(),
            keras.layers.Dense(networks.CLASSES),
        ]
    )
    return model, tf.random.stateless_normal([networks.BATCH, 4, 4, 2], [1, 2])


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_finite_difference_where_gradients_do_not_know_their_shapes(mode):
    dense = functools.partial(keras.layers.Dense, dtype="float64")
    model = keras.Sequential(
        [
            keras.Input((2, 1), dtype="float64"),
            dense(1, activation="tanh"),
            dense(1, activation="tanh"),
            keras.layers.Flatten(dtype="float64"),
            dense(networks.CLASSES),
        ]
    )
    x = tf.random.stateless_normal(
        [networks.BATCH, 2, 1], [1, 2], dtype="float64"
    )
    expected = evaluation.run("eager", FisherPenalty(0.7), model, x)
    found = evaluation.run(
        mode,
        FisherPenalty(0.7, method="finite_difference"),
        model,
        x,
        unknown_batch_size=True,
    )
    error = evaluation.relative(found[2], expected[2])
    assert error < 1e-5, error


def test_finite_difference_works_without_second_derivative():
    model, x = _no_second_derivative()
    penalty = FisherPenalty(method="finite_difference")
    value, _, gradients = evaluation.run("graph", penalty, model, x)
    along = sum(float(tf.reduce_sum(tf.square(g))) for g in gradients)
    length = np.sqrt(along)
    labels = evaluation.labels_of(model, x)

    def expected():
        rows = [np.arange(networks.BATCH)]
        trace = networks.brute_force_trace(
            model, x, evaluation.CATEGORICAL, labels, rows
        )
        return penalty.alpha * trace / networks.BATCH

    np.testing.assert_allclose(value, expected(), rtol=1e-5)
    slope = networks.directional_difference(
        expected,
        model.trainable_variables,
        [g.numpy() / length for g in gradients],
        step=1e-2,
    )
    np.testing.assert_allclose(along / length, slope, rtol=1e-2)
    with pytest.raises(LookupError):
        evaluation.run("graph", FisherPenalty(), model, x)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("name", ["conv1d", "batch_norm", "two_inputs"])
def test_input_gradient_penalty_equals_brute_force(name, method, mode):
    model, x = networks.build(name)
    penalty = InputGradientPenalty(0.7, method=method)

    def expected():
        state = networks.state_of(model)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(
                evaluation.CATEGORICAL.negative_log_likelihood(
                    tf.constant(evaluation.Y), model(x, training=True)
                )
            )
        networks.restore(state)
        gradients = tf.nest.flatten(tape.gradient(loss, x))
        squares = sum(np.sum(np.square(g)) for g in gradients)
        return 0.7 * squares / networks.BATCH

    value, _, gradients = evaluation.run(mode, penalty, model, x)
    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    evaluation.check_slope(expected, model, gradients)


@pytest.mark.parametrize("is_connected", [True, False])
def test_outputs_have_to_depend_on_all_inputs(is_connected):
    a, b = keras.Input((4,)), keras.Input((4,))
    hidden = a + b if is_connected else a + keras.ops.stop_gradient(b)
    outputs = keras.layers.Dense(networks.CLASSES)(hidden)
    model = keras.Model([a, b], outputs)
    x = [tf.ones([networks.BATCH, 4])] * 2
    if is_connected:
        value, *_ = evaluation.run("graph", InputGradientPenalty(), model, x)
        assert value > 0
        return
    with pytest.raises(ValueError, match="do not depend on some of the inputs"):
        evaluation.run("graph", InputGradientPenalty(), model, x)


def test_input_gradient_penalty_is_a_mean_over_examples():
    model, x = networks.build("dense")
    whole = evaluation.run("eager", InputGradientPenalty(0.7), model, x)[0]
    values = []
    for i in range(networks.BATCH):
        penalty = InputGradientPenalty(0.7)
        forward = penalty.forward(model, x[i : i + 1])
        values.append(
            penalty(
                forward, evaluation.CATEGORICAL, evaluation.Y[i : i + 1]
            ).value
        )
    np.testing.assert_allclose(whole, np.mean(values), rtol=1e-9)
    halves = InputGradientPenalty(0.7, micro_batch_size=3)
    np.testing.assert_allclose(
        whole, evaluation.run("eager", halves, model, x)[0], rtol=1e-9
    )


def test_loss_scale_is_taken_out_again():
    model, x = networks.build("dense", "float32")
    for method in ("exact", "finite_difference"):
        penalty = FisherPenalty(0.7, method=method)
        results = []
        for scale in (1.0, tf.constant(2.0**15)):
            with tf.GradientTape() as tape:
                forward = penalty.forward(model, x)
                term = penalty(
                    forward,
                    evaluation.CATEGORICAL,
                    seed=evaluation.SEED,
                    loss_scale=scale,
                )
            gradients = tape.gradient(term.value, model.trainable_variables)
            results.append(([term.value], gradients))
        assert evaluation.relative(results[1][0], results[0][0]) < 1e-6
        assert evaluation.relative(results[1][1], results[0][1]) < 1e-2


def test_more_batches_a_step_divide_the_penalty():
    model, x = networks.build("dense")
    penalty = FisherPenalty(0.7)
    forward = penalty.forward(model, x)
    one, four = (
        penalty(
            forward, evaluation.CATEGORICAL, seed=evaluation.SEED, batches=n
        ).value
        for n in (1, 4)
    )
    np.testing.assert_allclose(one, 4 * four)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Categorical(from_logits=False),
        likelihoods.Bernoulli(from_logits=True),
        likelihoods.Bernoulli(from_logits=False),
        likelihoods.Gaussian(stddev=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", cases.MODES)
def test_other_likelihoods_equal_brute_force(likelihood, mode):
    model, x = networks.build("dense")
    if not getattr(likelihood, "from_logits", True):
        activation = (
            "softmax"
            if isinstance(likelihood, likelihoods.Categorical)
            else "sigmoid"
        )
        model.layers[-1].activation = keras.activations.get(activation)
    penalty = FisherPenalty(0.7)

    def evaluate():
        return evaluation.evaluated(penalty, model, x, likelihood=likelihood)

    if mode != "eager":
        evaluate = tf.function(evaluate, jit_compile=mode == "xla")
    value, _, gradients = evaluate()
    labels = likelihood.sample(model(x), random_draws.draw(evaluation.SEED))

    def expected():
        rows = [np.arange(networks.BATCH)]
        trace = networks.brute_force_trace(model, x, likelihood, labels, rows)
        return 0.7 * trace / networks.BATCH

    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    evaluation.check_slope(expected, model, gradients)


def test_tokens_are_independent_parts_of_one_example():
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [
            keras.Input((4, 2), dtype="float64"),
            keras.layers.Dense(networks.CLASSES),
        ]
    )
    x = tf.constant(np.random.default_rng(2).normal(size=(5, 4, 2)))
    penalty = FisherPenalty(1.0)
    value = penalty(
        penalty.forward(model, x), evaluation.CATEGORICAL, seed=evaluation.SEED
    ).value
    outputs = model(x)
    labels = evaluation.CATEGORICAL.sample(
        outputs, random_draws.draw(evaluation.SEED)
    )
    score = tf.nn.softmax(outputs) - tf.one_hot(labels, 3, dtype="float64")
    kernel = np.einsum("bti,btc->ic", x, score) / 5
    bias = np.sum(score, axis=(0, 1)) / 5
    expected = np.sum(kernel**2) + np.sum(bias**2)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_masked_tokens_are_no_part_of_the_example():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(5, 3, mask_zero=True),
            keras.layers.Dense(networks.CLASSES),
        ]
    )
    short = tf.constant([[1, 2], [3, 4], [2, 2]])
    padded = tf.pad(short, [[0, 0], [0, 2]])
    penalty = UniformLabelPenalty(1.0)
    likelihood = _SameLabels(from_logits=True)
    short_value, padded_value = (
        penalty(penalty.forward(model, x), likelihood).value
        for x in (short, padded)
    )
    np.testing.assert_allclose(short_value, padded_value, rtol=1e-6)
    part = FisherPenalty(1.0, fraction=0.5).forward(model, padded)
    np.testing.assert_array_equal(part.mask, part.subset.of(padded != 0))


class _SameLabels(likelihoods.Categorical):
    def uniform(self, outputs, seed):
        return tf.zeros(tf.shape(outputs)[:-1], tf.int64)
