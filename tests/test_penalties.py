"""The penalties against brute force: values, gradients, unbiasedness."""

from __future__ import annotations

import cases
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods
from keras_fisher import penalties
from keras_fisher._common import random_draws
from keras_fisher._derivatives import second_derivatives

_SEED = 11
_MODES = ("eager", "graph", "xla")
_CATEGORICAL = likelihoods.Categorical(from_logits=True)
_Y = np.arange(networks.BATCH) % networks.CLASSES


def _evaluate(penalty, model, x, y=_Y, likelihood=_CATEGORICAL):
    """Value, traces and gradients, as a training loop gets them."""
    with tf.GradientTape() as tape:
        forward = penalty.forward(model, x, seed=_SEED)
        term = penalty(forward, likelihood, y, seed=_SEED)
    gradients = tape.gradient(
        term.value,
        [v.value for v in model.trainable_variables],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    traces = tf.zeros([]) if term.traces is None else term.traces
    return term.value, traces, [tf.convert_to_tensor(g) for g in gradients]


def _run(mode, penalty, model, x, *, unknown_batch_size=False):
    """`_evaluate` from the current state, in one of the three modes."""

    def evaluate(x, y):
        return _evaluate(penalty, model, x, y)

    function = evaluate
    y = tf.constant(_Y)
    if mode != "eager":
        signature = tf.nest.map_structure(
            lambda t: tf.TensorSpec(
                [None if unknown_batch_size else t.shape[0], *t.shape[1:]],
                t.dtype,
            ),
            [x, y],
        )
        function = tf.function(
            evaluate,
            jit_compile=mode == "xla",
            input_signature=signature,
            autograph=False,
        )
    state = networks.state_of(model)
    results = function(x, y)
    networks.restore(state)
    return results


def _labels(model, x, rows=None):
    """The labels that `FisherPenalty` draws with `_SEED`."""
    state = networks.state_of(model)
    outputs = model(x, training=True)
    networks.restore(state)
    if rows is not None:
        outputs = tf.gather(outputs, rows)
    return _CATEGORICAL.sample(outputs, random_draws.draw(_SEED))


def _relative(actual, expected):
    actual, expected = (
        np.concatenate([np.ravel(t).astype("float64") for t in values])
        for values in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def _check_slope(function, model, gradients):
    """The derivative along a direction, against differences in float64."""
    direction = [
        np.random.default_rng(1).normal(size=v.shape)
        for v in model.trainable_variables
    ]
    slope = networks.directional_difference(
        function, model.trainable_variables, direction
    )
    along = sum(np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, slope, rtol=1e-6)


def _check_against_brute_force(
    penalty, name, mode, groups=None, tolerance=1e-6
):
    """Value and directional derivatives in float64."""
    model, x = networks.build(name, "float64")
    all_rows = [np.arange(networks.BATCH)]
    groups = all_rows if groups is None else groups
    rows = None if groups is all_rows else np.concatenate(groups)
    value, traces, gradients = _run(mode, penalty, model, x)
    labels = _labels(model, x, rows)

    def expected():
        trace = networks.brute_force_trace(
            model, x, _CATEGORICAL, labels, groups
        )
        return penalty.alpha * trace / networks.BATCH

    reference = expected()
    np.testing.assert_allclose(value, reference, rtol=1e-9)
    np.testing.assert_allclose(
        penalty.alpha * np.sum(traces) / networks.BATCH, reference, rtol=1e-9
    )
    random = np.random.default_rng(0)
    for _ in range(2):
        direction = [
            random.normal(size=v.shape) for v in model.trainable_variables
        ]
        slope = networks.directional_difference(
            expected, model.trainable_variables, direction
        )
        along = sum(
            np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction)
        )
        scale = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
        scale *= np.sqrt(sum(np.sum(np.square(d)) for d in direction))
        error = abs(along - slope) / max(abs(slope), 0.01 * scale)
        assert error < tolerance, (along, slope, error)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_value_and_gradient_equal_brute_force_in_float64(name):
    _check_against_brute_force(FisherPenalty(0.7), name, "eager")


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float64", marks=pytest.mark.slow), "float32"],
)
def test_eager_graph_and_xla_agree_in_both_precisions(name, dtype):
    penalty = FisherPenalty(0.7)
    model, x = networks.build(name, "float64")
    expected = _run("eager", penalty, model, x)
    model, x = networks.build(name, dtype)
    if name == "dropout":  # Keras draws another mask in another precision.
        expected = _run("eager", penalty, model, x)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    for mode in _MODES[1:] if dtype == "float64" else _MODES:
        if (name, mode) == ("dropout", "xla"):
            continue  # Keras's own layer draws another mask there.
        value, traces, gradients = _run(
            mode, penalty, model, x, unknown_batch_size=True
        )
        assert value.dtype == traces.dtype == dtype
        errors = [
            _relative([value], [expected[0]]),
            _relative([traces], [expected[1]]),
            _relative(gradients, expected[2]),
        ]
        assert max(errors) < tolerance, (mode, errors)


@pytest.mark.parametrize(
    "name, size, mode",
    cases.in_turns(
        [
            ("dense", 1),
            ("dense", 4),
            ("batch_norm", 1),
            ("batch_norm", 4),
            ("shared", 2),
            ("embedding", 2),
            ("gru", 4),
        ],
        name=lambda value: f"{value[0]}-{value[1]}",
    ),
)
def test_micro_batches_equal_brute_force(name, mode, size):
    rows = np.arange(networks.BATCH)
    groups = np.split(rows, rows[size::size])
    _check_against_brute_force(
        FisherPenalty(0.7, micro_batch_size=size), name, mode, groups
    )


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(
    "name",
    ["dense", "batch_norm", pytest.param("gru", marks=pytest.mark.slow)],
)
def test_micro_batches_of_an_unknown_batch_size(name, mode):
    penalty = FisherPenalty(0.7, micro_batch_size=4)
    model, x = networks.build(name)
    expected = _run("eager", penalty, model, x)
    value, _, gradients = _run(mode, penalty, model, x, unknown_batch_size=True)
    np.testing.assert_allclose(value, expected[0], rtol=1e-9)
    assert _relative(gradients, expected[2]) < 1e-9


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", ["dense", "batch_norm", "embedding"])
def test_fraction_equals_brute_force_on_the_rows_it_draws(name, mode):
    start = random_draws.integers([], networks.BATCH, random_draws.draw(_SEED))
    rows = (start + tf.range(3)) % networks.BATCH
    _check_against_brute_force(
        FisherPenalty(0.7, fraction=0.5), name, mode, [rows.numpy()]
    )


@pytest.mark.parametrize("fraction, size", [(0.01, 1), (0.4, 2), (0.99, 6)])
def test_fraction_takes_the_nearest_number_of_examples(fraction, size):
    model, x = networks.build("dense")
    penalty = FisherPenalty(fraction=fraction)
    assert penalty.forward(model, x).subset.size == size


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_finite_difference_equals_exact_in_float64(name):
    model, x = networks.build(name)
    exact = _run("eager", FisherPenalty(0.7), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference")
    value, traces, gradients = _run("graph", penalty, model, x)
    np.testing.assert_allclose(value, exact[0], rtol=1e-9)
    np.testing.assert_allclose(traces, exact[1], rtol=1e-6, atol=1e-12)
    error = _relative(gradients, exact[2])
    assert error < 1e-6, error


@pytest.mark.parametrize("name", ["dense", "conv2d", "batch_norm", "lstm"])
@pytest.mark.parametrize("mode", _MODES)
def test_finite_difference_is_right_to_three_digits_in_float32(name, mode):
    model, x = networks.build(name, "float32")
    exact = _run("eager", FisherPenalty(0.7), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference")
    _, _, gradients = _run(mode, penalty, model, x)
    error = _relative(gradients, exact[2])
    assert error < 5e-3, error


@pytest.mark.parametrize("fraction, size", [(1.0, 2), (0.5, None), (0.7, 2)])
@pytest.mark.parametrize("name", ["dense", "batch_norm", "dropout"])
def test_finite_difference_of_parts_and_micro_batches(name, fraction, size):
    options = dict(fraction=fraction, micro_batch_size=size)
    model, x = networks.build(name)
    exact = _run("eager", FisherPenalty(0.7, **options), model, x)
    penalty = FisherPenalty(0.7, method="finite_difference", **options)
    value, _, gradients = _run("graph", penalty, model, x)
    np.testing.assert_allclose(value, exact[0], rtol=1e-9)
    assert _relative(gradients, exact[2]) < 1e-6


def test_finite_difference_changes_no_state_and_no_losses():
    model, x = networks.build("batch_norm")
    model.layers[0].add_loss(tf.constant(0.0))
    before = [v.numpy() for v in model.trainable_variables]
    with tf.GradientTape():
        penalty = FisherPenalty(method="finite_difference")
        forward = penalty.forward(model, x)
        state = [v.numpy() for _, v in _pairs(model)]
        penalty(forward, _CATEGORICAL)
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
            keras.layers.UpSampling2D(2, interpolation="bicubic"),
            keras.layers.Flatten(),
            keras.layers.Dense(networks.CLASSES),
        ]
    )
    return model, tf.random.stateless_normal([networks.BATCH, 4, 4, 2], [1, 2])


def test_finite_difference_works_without_second_derivative():
    model, x = _no_second_derivative()
    penalty = FisherPenalty(method="finite_difference")
    value, _, gradients = _run("graph", penalty, model, x)
    along = sum(float(tf.reduce_sum(tf.square(g))) for g in gradients)
    length = np.sqrt(along)
    labels = _labels(model, x)

    def expected():
        rows = [np.arange(networks.BATCH)]
        trace = networks.brute_force_trace(model, x, _CATEGORICAL, labels, rows)
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
        _run("graph", FisherPenalty(), model, x)


@pytest.mark.parametrize("mode", _MODES)
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
                _CATEGORICAL.negative_log_likelihood(
                    tf.constant(_Y), model(x, training=True)
                )
            )
        networks.restore(state)
        gradients = tf.nest.flatten(tape.gradient(loss, x))
        squares = sum(np.sum(np.square(g)) for g in gradients)
        return 0.7 * squares / networks.BATCH

    value, _, gradients = _run(mode, penalty, model, x)
    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    _check_slope(expected, model, gradients)


def test_input_gradient_penalty_is_a_mean_over_examples():
    model, x = networks.build("dense")
    whole = _run("eager", InputGradientPenalty(0.7), model, x)[0]
    values = []
    for i in range(networks.BATCH):
        penalty = InputGradientPenalty(0.7)
        forward = penalty.forward(model, x[i : i + 1])
        values.append(penalty(forward, _CATEGORICAL, _Y[i : i + 1]).value)
    np.testing.assert_allclose(whole, np.mean(values), rtol=1e-9)
    halves = InputGradientPenalty(0.7, micro_batch_size=3)
    np.testing.assert_allclose(
        whole, _run("eager", halves, model, x)[0], rtol=1e-9
    )


def test_gradient_penalty_uses_the_labels_given():
    model, x = networks.build("dense")
    value, traces, _ = _run("eager", GradientPenalty(0.7), model, x)
    rows = [np.arange(networks.BATCH)]
    trace = networks.brute_force_trace(
        model, x, _CATEGORICAL, tf.constant(_Y), rows
    )
    np.testing.assert_allclose(value, 0.7 * trace / networks.BATCH)
    assert traces.shape == [], "GP says nothing of Tr(F)"


def test_uniform_label_penalty_draws_labels_uniformly():
    model, x = networks.build("dense")
    # A network that is sure of class 0 would never draw another one.
    model.layers[-1].bias.assign([50.0, 0.0, 0.0])
    outputs = model(x)
    labels = np.concatenate(
        [
            UniformLabelPenalty().labels(_CATEGORICAL, outputs, None, seed)
            for seed in range(500)
        ]
    )
    shares = np.bincount(labels, minlength=3) / labels.size
    error = np.sqrt((1 / 3) * (2 / 3) / labels.size)
    assert np.abs(shares - 1 / 3).max() < 4 * error, shares


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_exclude_leaves_variables_out_of_the_norm_but_not_out_of_the_trace(
    method,
):
    model, x = networks.build("dense")
    options = dict(alpha=0.7, method=method)
    _, traces, _ = _run("eager", FisherPenalty(**options), model, x)
    penalty = FisherPenalty(exclude=["bias$"], **options)
    value, same, gradients = _run("eager", penalty, model, x)
    kernels = ["kernel" in v.path for v in model.trainable_variables]
    assert sum(kernels) == 2 < len(kernels)
    np.testing.assert_allclose(same, traces, rtol=1e-12)
    expected = 0.7 * np.sum(np.array(traces)[kernels]) / networks.BATCH
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    exact = _run("eager", FisherPenalty(0.7, exclude="bias$"), model, x)[2]
    assert _relative(gradients, exact) < 1e-6
    assert np.any(gradients[1]), "excluded variables still move the norm"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_excluding_all_variables_leaves_a_penalty_of_zero(method, dtype):
    model, x = networks.build("dense", dtype)
    penalty = FisherPenalty(method=method, exclude=".")
    value, traces, gradients = _run("eager", penalty, model, x)
    assert value == 0, value
    assert np.all(np.array(traces) > 0), traces
    assert not any(np.any(g) for g in gradients)


def test_loss_scale_is_taken_out_again():
    model, x = networks.build("dense", "float32")
    for method in ("exact", "finite_difference"):
        penalty = FisherPenalty(0.7, method=method)
        results = []
        for scale in (1.0, tf.constant(2.0**15)):
            with tf.GradientTape() as tape:
                forward = penalty.forward(model, x)
                term = penalty(
                    forward, _CATEGORICAL, seed=_SEED, loss_scale=scale
                )
            gradients = tape.gradient(term.value, model.trainable_variables)
            results.append(([term.value], gradients))
        assert _relative(results[1][0], results[0][0]) < 1e-6
        assert _relative(results[1][1], results[0][1]) < 1e-2


def test_more_batches_a_step_divide_the_penalty():
    model, x = networks.build("dense")
    penalty = FisherPenalty(0.7)
    forward = penalty.forward(model, x)
    one, four = (
        penalty(forward, _CATEGORICAL, seed=_SEED, batches=n).value
        for n in (1, 4)
    )
    np.testing.assert_allclose(one, 4 * four)


# Tr(F) in closed form.


def _closed_form_trace(model, x):
    """(1/B) Σ_i Σ_y p(y|x_i) ‖∇_θ -log p(y|x_i)‖², training mode."""
    with tf.GradientTape(persistent=True) as tape:
        log_p = tf.nn.log_softmax(model(x, training=True))
        parts = [
            [log_p[i, c] for c in range(log_p.shape[1])]
            for i in range(log_p.shape[0])
        ]
    total = 0.0
    for i, row in enumerate(parts):
        for c, part in enumerate(row):
            gradients = tape.gradient(part, model.trainable_variables)
            square = sum(np.sum(np.square(g)) for g in gradients)
            total += float(tf.exp(log_p[i, c])) * square
    return total / len(parts)


_UNBIASED = {
    "whole batch": {},
    "micro-batches": {"micro_batch_size": 2},
    "uneven micro-batches": {"micro_batch_size": 4},
    "fraction": {"fraction": 0.5},
    "one example": {"fraction": 0.01},
    "both": {"fraction": 0.7, "micro_batch_size": 2},
}


@pytest.mark.parametrize("options", _UNBIASED.values(), ids=_UNBIASED.keys())
@pytest.mark.parametrize("name", ["softmax_regression", "batch_norm"])
def test_mean_over_many_labels_is_the_closed_form_trace(name, options):
    if name == "softmax_regression":
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)])
        x = tf.constant(np.random.default_rng(3).normal(size=(6, 5)), "float32")
        # Of softmax regression: Σ_i (1 - Σ_c p_c²) (‖x_i‖² + 1) / B.
        p = tf.nn.softmax(model(x)).numpy()
        expected = np.mean(
            (1 - np.sum(p**2, axis=1)) * (1 + np.sum(np.square(x), axis=1))
        )
        np.testing.assert_allclose(
            _closed_form_trace(model, x), expected, rtol=1e-5
        )
    else:
        model, x = networks.build(name, "float32")
        state = networks.state_of(model)
        expected = _closed_form_trace(model, x)
        networks.restore(state)
    penalty = FisherPenalty(0.7, **options)
    seed = keras.random.SeedGenerator(5)

    @tf.function
    def draw():
        forward = penalty.forward(model, x, seed=seed)
        term = penalty(forward, _CATEGORICAL, seed=seed)
        return tf.reduce_sum(term.traces), term.value

    draws = np.array([draw() for _ in range(3000)])
    estimates, values = draws.T
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert abs(estimates.mean() - expected) < 4 * error, (
        estimates.mean(),
        expected,
        error,
    )
    np.testing.assert_allclose(values, 0.7 * estimates / 6, rtol=1e-5)


def test_micro_batches_vary_less_than_the_whole_batch():
    model, x = networks.build("dense", "float32")
    deviations = []
    for size in (None, 1):
        penalty = FisherPenalty(micro_batch_size=size)
        traces = [
            np.sum(
                penalty(penalty.forward(model, x), _CATEGORICAL, seed=s).traces
            )
            for s in range(100)
        ]
        deviations.append(np.std(traces))
    assert deviations[1] < 0.7 * deviations[0], deviations


# Likelihoods other than the softmax of logits.


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
@pytest.mark.parametrize("mode", _MODES)
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
        return _evaluate(penalty, model, x, likelihood=likelihood)

    if mode != "eager":
        evaluate = tf.function(evaluate, jit_compile=mode == "xla")
    value, _, gradients = evaluate()
    labels = likelihood.sample(model(x), random_draws.draw(_SEED))

    def expected():
        rows = [np.arange(networks.BATCH)]
        trace = networks.brute_force_trace(model, x, likelihood, labels, rows)
        return 0.7 * trace / networks.BATCH

    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    _check_slope(expected, model, gradients)


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
    value = penalty(penalty.forward(model, x), _CATEGORICAL, seed=_SEED).value
    outputs = model(x)
    labels = _CATEGORICAL.sample(outputs, random_draws.draw(_SEED))
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


# The schedule.


def test_schedule_is_half_open_and_counts_from_start():
    penalty = FisherPenalty(every=3, start=2, stop=9)
    steps = np.arange(12)
    np.testing.assert_array_equal(steps[penalty.is_active(steps)], range(2, 9))
    np.testing.assert_array_equal(steps[penalty.is_fresh(steps)], [2, 5, 8])
    for step in steps:
        tensor = tf.constant(step)
        assert bool(penalty.is_active(tensor)) == bool(penalty.is_active(step))
        assert bool(penalty.is_fresh(tensor)) == bool(penalty.is_fresh(step))


def test_stores_a_gradient_only_where_steps_in_between_add_it():
    assert FisherPenalty(every=10).stores_gradient
    assert not FisherPenalty(every=10, reuse=False).stores_gradient
    assert not FisherPenalty().stores_gradient


# Arguments.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(alpha=float("nan")), "alpha"),
        (dict(alpha=float("inf")), "alpha"),
        (dict(alpha=-0.1), "alpha"),
        (dict(alpha="0.1"), "alpha"),
        (dict(alpha=True), "alpha"),
        (dict(fraction=0.0), "fraction"),
        (dict(fraction=1.1), "fraction"),
        (dict(fraction=float("nan")), "fraction"),
        (dict(every=0), "every"),
        (dict(every=2.0), "every"),
        (dict(start=-1), "start"),
        (dict(start=5, stop=5), "stop"),
        (dict(start=5, stop=3), "stop"),
        (dict(micro_batch_size=0), "micro_batch_size"),
        (dict(method="central"), "method"),
        (dict(exclude="("), "exclude"),
    ],
)
@pytest.mark.parametrize("cls", [FisherPenalty, InputGradientPenalty])
def test_bad_arguments_are_refused_with_what_was_received(
    cls, arguments, message
):
    with pytest.raises(ValueError, match=message) as error:
        cls(**arguments)
    name, value = list(arguments.items())[-1]
    assert str(value) in str(error.value), (name, error.value)


def test_variables_without_gradient_are_named():
    used, unused = (keras.layers.Dense(3, name=n) for n in ("used", "unused"))

    class Careless(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = used, unused

        def call(self, x):
            self.unused(x)
            return self.used(x)

    model = Careless()
    model(tf.zeros([1, 4]))
    with pytest.raises(ValueError, match=r"no gradient.*unused/kernel"):
        _run("eager", FisherPenalty(), model, tf.ones([networks.BATCH, 4]))
    penalty = FisherPenalty(exclude="unused")
    value, traces, _ = _run(
        "graph", penalty, model, tf.ones([networks.BATCH, 4])
    )
    assert value > 0
    np.testing.assert_array_equal(np.array(traces) > 0, [1, 1, 0, 0])


@pytest.mark.parametrize("cls", [GradientPenalty, InputGradientPenalty])
def test_penalties_that_need_labels_say_so(cls):
    model, x = networks.build("dense")
    penalty = cls()
    with pytest.raises(ValueError, match=f"{cls.__name__}.*no `y`"):
        penalty(penalty.forward(model, x), _CATEGORICAL)


def test_input_gradients_need_inputs_of_floating_point():
    model, x = networks.build("embedding")
    with pytest.raises(ValueError, match=r"floating point.*int64"):
        InputGradientPenalty().forward(model, x)


@pytest.mark.parametrize(
    "identifier, expected",
    [
        (0.3, FisherPenalty),
        (1, FisherPenalty),
        ("fisher", FisherPenalty),
        ("gradient", GradientPenalty),
        ("uniform_label", UniformLabelPenalty),
        ("input_gradient", InputGradientPenalty),
        (GradientPenalty, GradientPenalty),
        (UniformLabelPenalty(0.3), UniformLabelPenalty),
    ],
)
def test_get_finds_penalties(identifier, expected):
    penalty = penalties.get(identifier)
    assert type(penalty) is expected
    if isinstance(identifier, (int, float)):
        assert penalty.alpha == identifier


@pytest.mark.parametrize("identifier", ["fischer", object(), True, [0.1]])
def test_get_refuses_the_rest(identifier):
    with pytest.raises(ValueError, match="A penalty is"):
        penalties.get(identifier)
    assert penalties.get(None) is None


@pytest.mark.parametrize(
    "cls",
    [
        FisherPenalty,
        GradientPenalty,
        UniformLabelPenalty,
        InputGradientPenalty,
    ],
)
def test_penalties_survive_serialization(cls):
    penalty = cls(
        0.3,
        fraction=0.5,
        every=10,
        reuse=False,
        start=3,
        stop=90,
        micro_batch_size=8,
        method="finite_difference",
        exclude=["bias$", "gamma"],
    )
    config = keras.saving.serialize_keras_object(penalty)
    again = penalties.get(config)
    assert type(again) is cls
    assert again.get_config() == penalty.get_config()
    assert "alpha=0.3" in repr(penalty)


@pytest.mark.parametrize(
    "cls", [FisherPenalty, GradientPenalty, UniformLabelPenalty]
)
def test_docstrings_give_the_arguments(cls):
    for name in keras_fisher.FisherPenalty().get_config():
        assert f"{name}: " in cls.__doc__, name


class _Recomputed(keras.layers.Wrapper):
    """Keeps no activations."""

    def call(self, x):
        return tf.recompute_grad(lambda x: self.layer(x))(x)


@pytest.mark.parametrize(
    "method, message",
    [
        ("exact", "no second derivative.*Rematerialization"),
        ("finite_difference", "its variables.*Rematerialization"),
    ],
)
def test_what_recompute_grad_cannot_do_is_an_error(method, message):
    model = keras.Sequential(
        [keras.Input((3,)), _Recomputed(keras.layers.Dense(2))]
    )
    model = keras_fisher.FisherModel(model, FisherPenalty(method=method))
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones([4, 3]), np.zeros(4, int), verbose=0)


class _Unfinished(keras.layers.Layer):
    def call(self, x):
        raise NotImplementedError("to be written")


def test_what_a_layer_of_the_user_has_not_implemented_stays_its_error():
    model = keras.Sequential([_Unfinished(), keras.layers.Dense(2)])
    with pytest.raises(NotImplementedError), second_derivatives.explained():
        model(np.ones([4, 3]))
