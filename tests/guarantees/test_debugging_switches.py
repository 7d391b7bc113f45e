"""The switches that TensorFlow has for debugging change nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import likelihoods


@pytest.fixture
def check_numerics():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.fixture
def run_functions_eagerly():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def _fitted(**kwargs):
    # Measured and penalized in turns, and neither at some steps.
    penalty = FisherPenalty(0.1, every=3, reuse=False)
    model = FisherModel(training.network(), penalty, trace_every=2, seed=0)
    training.compiled(model, **kwargs)
    return model, training.fit(model, epochs=1).history


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="graph"),
        pytest.param({"run_eagerly": True}, id="eager"),
        pytest.param(
            {"steps_per_execution": 3}, id="several", marks=pytest.mark.slow
        ),
    ],
)
def test_numbers_that_are_checked_are_finite(kwargs, check_numerics):
    model, logs = _fitted(**kwargs)
    tf.debugging.disable_check_numerics()
    expected, expected_logs = _fitted(**kwargs)
    for name, values in expected_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-5, err_msg=name)
    for a, b in zip(training.weights(model), training.weights(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checked_models_are_saved_and_measured(check_numerics, tmp_path):
    model = training.compiled(FisherModel(training.network(), 0.1))
    # Before anything was measured, too.
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")
    assert keras_fisher.fisher_trace(model, training.X, num_samples=10) > 0
    assert np.isfinite(
        keras_fisher.hessian_trace(model, training.X, training.Y, num_probes=2)
    )


def test_the_layer_is_checked(check_numerics):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_fisher.layers.FisherRegularization(
                keras.layers.Dense(3),
                FisherPenalty(0.1, every=2),
                likelihood=likelihoods.Categorical(from_logits=True),
            ),
        ]
    )
    training.compiled(model)
    logs = training.fit(model, epochs=1).history
    assert np.isfinite(logs["loss"]).all() and logs["fisher_trace"][0] > 0


def test_what_overflows_is_told_where_it_happens(check_numerics):
    model = training.compiled(FisherModel(training.network(), 1e38))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Inf|NaN"):
        training.fit(model, epochs=1)


def test_functions_that_run_eagerly_are_measured(run_functions_eagerly):
    model = training.compiled(training.network())
    traces = {}
    for estimator in ("monte_carlo", "exact", "batch"):
        traces[estimator] = [
            float(
                keras_fisher.fisher_trace(
                    model, training.X, estimator=estimator, seed=0
                )
            )
        ]
    curvature = keras_fisher.hessian_trace(
        model, training.X, training.Y, num_probes=2, seed=0
    )
    assert tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(False)
    for estimator, found in traces.items():
        expected = keras_fisher.fisher_trace(
            model, training.X, estimator=estimator, seed=0
        )
        assert found == pytest.approx([expected], rel=1e-5), estimator
    assert curvature == pytest.approx(
        keras_fisher.hessian_trace(
            model, training.X, training.Y, num_probes=2, seed=0
        ),
        rel=1e-4,
    )


def test_the_probe_runs_where_functions_run_eagerly(
    run_functions_eagerly, tmp_path
):
    model = training.compiled(FisherModel(training.network(), 0.1))
    board = keras_fisher.callbacks.FisherTensorBoard(
        tmp_path, probe=(training.X, training.Y)
    )
    logs = training.fit(model, epochs=1, callbacks=[board]).history
    assert np.isfinite(logs["fisher_trace"]).all()
