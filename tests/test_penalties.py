"""The penalties: labels, variables, steps, arguments."""

from __future__ import annotations

import re

import evaluation
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


def test_gradient_penalty_uses_the_labels_given():
    model, x = networks.build("dense")
    value, traces, _ = evaluation.run("eager", GradientPenalty(0.7), model, x)
    rows = [np.arange(networks.BATCH)]
    trace = networks.brute_force_trace(
        model, x, evaluation.CATEGORICAL, tf.constant(evaluation.Y), rows
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
            UniformLabelPenalty().labels(
                evaluation.CATEGORICAL, outputs, None, seed
            )
            for seed in range(500)
        ]
    )
    shares = np.bincount(labels, minlength=3) / labels.size
    error = np.sqrt((1 / 3) * (2 / 3) / labels.size)
    assert np.abs(shares - 1 / 3).max() < 4 * error, shares


@pytest.mark.slow
def test_a_part_and_its_labels_are_drawn_independently_of_each_other():
    model, x = networks.build("dense")
    # All labels are as likely.
    for variable in model.layers[-1].trainable_variables:
        variable.assign(0 * variable)
    penalty = FisherPenalty(fraction=1 / networks.BATCH)
    counts = np.zeros([networks.BATCH, networks.CLASSES])
    seeds = 900
    for seed in range(seeds):
        forward = penalty.forward(model, x, seed=seed)
        labels = penalty.labels(
            evaluation.CATEGORICAL, forward.subset_outputs, None, seed
        )
        counts[int(forward.subset.first), int(labels[0])] += 1
    expected = seeds / counts.size
    chi_squared = np.sum((counts - expected) ** 2) / expected
    freedom = counts.size - 1
    # Four standard deviations above its mean.
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom), counts


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_exclude_leaves_variables_out_of_the_norm_but_not_out_of_the_trace(
    method,
):
    model, x = networks.build("dense")
    options = dict(alpha=0.7, method=method)
    _, traces, _ = evaluation.run("eager", FisherPenalty(**options), model, x)
    penalty = FisherPenalty(exclude=["bias$"], **options)
    value, same, gradients = evaluation.run("eager", penalty, model, x)
    kernels = ["kernel" in v.path for v in model.trainable_variables]
    assert sum(kernels) == 2 < len(kernels)
    np.testing.assert_allclose(same, traces, rtol=1e-12)
    expected = 0.7 * np.sum(np.array(traces)[kernels]) / networks.BATCH
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    exact = evaluation.run(
        "eager", FisherPenalty(0.7, exclude="bias$"), model, x
    )[2]
    assert evaluation.relative(gradients, exact) < 1e-6
    assert np.any(gradients[1]), "excluded variables still move the norm"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_excluding_all_variables_leaves_a_penalty_of_zero(method, dtype):
    model, x = networks.build("dense", dtype)
    penalty = FisherPenalty(method=method, exclude=".")
    value, traces, gradients = evaluation.run("eager", penalty, model, x)
    assert value == 0, value
    assert np.all(np.array(traces) > 0), traces
    assert not any(np.any(g) for g in gradients)


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


@pytest.mark.few(1)
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
        term = penalty(forward, evaluation.CATEGORICAL, seed=seed)
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


@pytest.mark.slow
def test_micro_batches_vary_less_than_the_whole_batch():
    model, x = networks.build("dense", "float32")
    deviations = []
    for size in (None, 1):
        penalty = FisherPenalty(micro_batch_size=size)
        traces = [
            np.sum(
                penalty(
                    penalty.forward(model, x), evaluation.CATEGORICAL, seed=s
                ).traces
            )
            for s in range(100)
        ]
        deviations.append(np.std(traces))
    assert deviations[1] < 0.7 * deviations[0], deviations


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
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(warmup_steps=2.5), "warmup_steps"),
        (dict(exclude="("), "exclude"),
        (dict(exclude=3), "exclude"),
        (dict(exclude=[re.compile("bias")]), "exclude"),
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


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [{}, dict(method="finite_difference"), dict(micro_batch_size=2)],
)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_variables_that_no_output_depends_on_count_as_zero(mode, options):
    keras.config.set_dtype_policy("float64")
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
    x = tf.ones([networks.BATCH, 4], "float64")
    value, traces, gradients = evaluation.run(
        mode, FisherPenalty(**options), model, x
    )
    expected, of_used, of_it = evaluation.run(
        mode, FisherPenalty(**options), keras.Sequential([used]), x
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(traces, [*of_used, 0, 0], rtol=1e-5)
    for actual, gradient in zip(gradients, [*of_it, 0, 0], strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=1e-3, atol=1e-6)
    penalty = FisherPenalty(exclude="^(?!.*unused)", **options)
    with pytest.raises(ValueError, match=r"no gradient.*unused/kernel"):
        evaluation.run(mode, penalty, model, x)


@pytest.mark.parametrize("cls", [GradientPenalty, InputGradientPenalty])
def test_penalties_that_need_labels_say_so(cls):
    model, x = networks.build("dense")
    penalty = cls()
    with pytest.raises(ValueError, match=f"{cls.__name__}.*no `y`"):
        penalty(penalty.forward(model, x), evaluation.CATEGORICAL)


class First(keras.layers.Layer):
    """Takes two inputs, and gives one."""

    def call(self, x, y=None):
        return x


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_input_gradients_take_arrays_and_inputs_that_are_not_there(convert):
    given = {
        "x": np.random.default_rng(0).normal(size=(6, 4)).astype("float32"),
        "y": None,
    }
    inputs = {
        name: keras.Input((4,), name=name, optional=True) for name in given
    }
    first = First()(inputs["x"], inputs["y"])
    model = keras.Model(inputs, keras.layers.Dense(3)(first))
    penalty, labels = InputGradientPenalty(0.5), np.arange(6) % 3
    given["x"] = convert(given["x"])
    logits = model(given).numpy()
    forward = penalty.forward(model, given)
    value = penalty(forward, evaluation.CATEGORICAL, labels).value
    # The gradient of each example by its input, written down.
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    kernel = model.layers[-1].kernel.numpy()
    gradients = (p - np.eye(3)[labels]) @ kernel.T
    expected = 0.5 * np.mean(np.sum(gradients**2, axis=1))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


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
    given = dict(
        alpha=0.3,
        fraction=0.5,
        every=10,
        reuse=False,
        start=3,
        stop=90,
        micro_batch_size=8,
        method="finite_difference",
        exclude=("bias$", "gamma"),
        bound=0.5,
        warmup_steps=7,
    )
    penalty = cls(**given)
    config = keras.saving.serialize_keras_object(penalty)
    again = penalties.get(config)
    found = {name: getattr(again, name) for name in given}
    assert {**found, "exclude": tuple(again.exclude)} == given
    assert type(again) is cls
    assert again.get_config() == penalty.get_config()
    assert "alpha=0.3" in repr(penalty)


@pytest.mark.parametrize(
    "cls", [FisherPenalty, GradientPenalty, UniformLabelPenalty]
)
def test_docstrings_give_the_arguments(cls):
    for name in keras_fisher.FisherPenalty().get_config():
        assert f"{name}: " in cls.__doc__, name


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_only_the_value_of_a_term_has_a_gradient(method):
    model, x = networks.build("dense")
    penalty = FisherPenalty(0.7, method=method)
    with tf.GradientTape(persistent=True) as tape:
        forward = penalty.forward(model, x, seed=evaluation.SEED)
        term = penalty(forward, likelihoods.Categorical(), seed=evaluation.SEED)
    variables = [v.value for v in model.trainable_variables]
    for part, flows in (
        (term.value, True),
        (term.traces, False),
        (term.squared_norm, False),
    ):
        found = tape.gradient(part, variables)
        assert all((g is not None) == flows for g in found), found
