"""What a step of `FisherModel` computes."""

from __future__ import annotations

import cases
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods
from keras_fisher.layers import FisherRegularization


def _epochs_by_hand(network, penalty, epochs):
    """Trains by the pure functions and plain SGD, with the schedule anew.

    Yields:
        After each epoch, the last trace and the last value of the penalty.
    """
    seed = keras.random.SeedGenerator(4)
    likelihood = likelihoods.Categorical()
    nothing = FisherPenalty(0.0)
    stored = [np.zeros(v.shape) for v in network.trainable_variables]
    trace, value, step = None, 0.0, 0
    for _ in range(epochs):
        for begin in range(0, 48, 8):
            x, y = training.X[begin : begin + 8], training.Y[begin : begin + 8]
            fresh = bool(penalty.is_fresh(step))
            measure = step % 10 == 0 or (fresh and penalty.measures_trace)
            with tf.GradientTape(persistent=True) as tape:
                forward = (penalty if fresh else nothing).forward(
                    network, tf.constant(x), seed=seed
                )
                loss = training.LOSS(y, forward.outputs)
                if fresh:
                    term = penalty(forward, likelihood, y, seed=seed)
                    value = term.value
                if measure and not (fresh and penalty.measures_trace):
                    term_of_trace = nothing(forward, likelihood, seed=seed)
                elif measure:
                    term_of_trace = term
            if measure:
                trace = np.sum(term_of_trace.traces)
            variables = [v.value for v in network.trainable_variables]
            gradients = tape.gradient(loss, variables)
            if fresh:
                stored = [
                    0.0 if g is None else g
                    for g in tape.gradient(term.value, variables)
                ]
            if fresh or (penalty.stores_gradient and penalty.is_active(step)):
                gradients = [g + p for g, p in zip(gradients, stored)]
            for v, g in zip(network.trainable_variables, gradients):
                v.assign_sub(0.1 * g)
            step += 1
        yield trace, value


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "penalty",
    [
        *cases.FISHER_PENALTIES,
        GradientPenalty(0.3, bound=None),
        UniformLabelPenalty(0.3, bound=None, every=2),
        InputGradientPenalty(0.3, bound=None),
    ],
    ids=cases.name_of_penalty,
)
def test_fit_equals_a_loop_with_the_pure_functions(penalty, mode):
    dropout = mode != "xla"
    model = FisherModel(training.network(dropout=dropout), penalty, seed=4)
    training.compiled(
        model,
        optimizer=keras.optimizers.SGD(0.1),
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
        steps_per_execution=3,
    )
    logs = model.fit(
        training.X[:48],
        training.Y[:48],
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
    ).history
    by_hand = training.network(dropout=dropout)
    for epoch, (trace, value) in enumerate(
        _epochs_by_hand(by_hand, penalty, epochs=2)
    ):
        found = logs["fisher_trace"][epoch], logs["fisher_penalty"][epoch]
        np.testing.assert_allclose(found, (trace, value), rtol=3e-3)
    for a, b in zip(training.weights(model.model), training.weights(by_hand)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_before_the_first_measurement_the_trace_is_not_a_number():
    penalty = FisherPenalty(0.1, start=100)
    model = training.compiled(
        FisherModel(training.network(), penalty, trace_every=None)
    )
    logs = training.fit(model, epochs=1).history
    assert np.isnan(logs["fisher_trace"][0])
    assert logs["fisher_penalty"] == [0.0]


def test_penalties_that_say_nothing_of_the_trace_log_none_by_themselves():
    model = training.compiled(
        FisherModel(training.network(), "gradient", trace_every=None)
    )
    assert "fisher_trace" not in training.fit(model, epochs=1).history


@pytest.mark.parametrize("accumulate", [None, 2])
def test_accumulated_batches_share_the_penalty(accumulate):
    """α (b/B) for each, so that the expected penalty stays."""
    optimizer = keras.optimizers.SGD(
        0.0, gradient_accumulation_steps=accumulate
    )
    model = FisherModel(
        training.network(batch_norm=False, dropout=False), 0.3, seed=4
    )
    training.compiled(model, optimizer=optimizer)
    model.train_on_batch(training.X[:8], training.Y[:8])
    measured = model.measurements
    np.testing.assert_allclose(
        measured.penalty,
        0.3 * measured.trace_by_variable.sum(1) / (8 * (accumulate or 1)),
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("network", ["dense", "conv2d", "batch_norm"])
def test_trace_in_half_precision_is_close_to_single_precision(policy, network):
    y = np.arange(networks.BATCH) % networks.CLASSES

    def mean_trace(policy):
        model, x = networks.build(network, policy)
        model = FisherModel(model, 0.01, trace_every=1, seed=2)
        training.compiled(model, optimizer=keras.optimizers.SGD(0.0))
        traces = []
        for _ in range(100):
            model.train_on_batch(x, y)
            traces.append(model.measurements.trace_by_variable.sum())
        if policy == "mixed_float16":
            scale = float(model.optimizer.dynamic_scale)
            assert scale >= 2.0**15, f"the loss scale collapsed to {scale}"
        return np.mean(traces)

    half, single = mean_trace(policy), mean_trace("float32")
    assert abs(half / single - 1) < 0.03, (half, single)


def test_mixed_float16_trains_and_keeps_its_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    model = training.compiled(FisherModel(training.network(), 0.1))
    logs = model.fit(
        training.X[:48],
        training.Y[:48],
        batch_size=8,
        epochs=20,
        shuffle=False,
        verbose=0,
    ).history
    scale = float(model.optimizer.dynamic_scale)
    assert scale >= 2.0**13, f"the loss scale collapsed to {scale}"
    steps = int(model.optimizer.iterations)
    assert steps >= 118, f"{120 - steps} of 120 steps were skipped"
    assert np.mean(logs["loss"][-3:]) < 0.9 * logs["loss"][0]


def test_a_reused_gradient_survives_a_scale_that_float16_has_not():
    keras.config.set_dtype_policy("float16")

    def trained(scale):
        network = training.network(dropout=False, batch_norm=False)
        model = FisherModel(
            network,
            GradientPenalty(0.3, bound=None, every=3),
            trace_every=None,
        )
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=scale
        )
        training.compiled(model, optimizer=optimizer)
        model.fit(
            training.X, training.Y, batch_size=8, shuffle=False, verbose=0
        )
        assert float(optimizer.dynamic_scale) == scale, "no step is skipped"
        return network.get_weights()

    for a, b in zip(trained(2.0**16), trained(2.0**10), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16"])
def test_16_bits_are_summed_up_in_single_precision(policy):
    """Counters would stop at 256, and traces end at 65,504."""
    keras.config.set_dtype_policy(policy)
    network = training.network(dropout=False, batch_norm=False)
    state = FisherModel(network, 0.1).state
    layer = FisherRegularization(network, 0.1, likelihood="categorical")
    for each in state, layer.state:
        assert each.fisher_trace.dtype == each.fisher_penalty.dtype == "float32"


def test_float64_is_measured_in_float64():
    keras.config.set_dtype_policy("float64")
    model = training.compiled(
        FisherModel(training.network(), 0.1, trace_every=1)
    )
    training.fit(model, epochs=1)
    assert model.measurements.trace_by_variable.dtype == np.float64
    assert model.state.fisher_trace.dtype == "float64"


def test_frozen_layers_are_no_parameters():
    """The traces of the others are those of a model that is not frozen."""
    found = []
    for trainable in (True, False):
        network = training.network(dropout=False)
        network.layers[0].trainable = trainable
        before = network.layers[0].get_weights()
        penalty = FisherPenalty(0.1, every=2)
        model = FisherModel(network, penalty, trace_every=1, seed=3)
        training.compiled(model)
        model.fit(training.X[:8], training.Y[:8], batch_size=8, verbose=0)
        found.append(model.measurements.trace_by_variable[0])
    training.assert_equal(network.layers[0].get_weights(), before)
    free, frozen = found
    assert len(free) == 6 and np.all(free > 0), free
    np.testing.assert_allclose(frozen, free[2:], rtol=1e-6)


def test_layers_can_be_frozen_and_unfrozen_between_fits():
    network = training.network(dropout=False)
    model = FisherModel(network, FisherPenalty(0.1, every=2), trace_every=1)
    first, last = network.layers[0], network.layers[-1]
    for trainable, variables in ((True, 6), (False, 4), (True, 6)):
        first.trainable = trainable
        before = first.get_weights()[0], last.get_weights()[0]
        training.fit(training.compiled(model))
        [traces] = model.measurements.trace_by_variable
        assert len(traces) == variables
        np.testing.assert_allclose(
            traces.sum(), model.state.fisher_trace, rtol=1e-6
        )
        moved = [
            not np.array_equal(layer.get_weights()[0], old)
            for layer, old in zip((first, last), before)
        ]
        assert moved == [trainable, True]
