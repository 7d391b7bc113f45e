"""One training run of an experiment."""

from __future__ import annotations

import json
import math

import common
import experiment
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher


@pytest.mark.parametrize(
    "method, strength",
    [
        ("FP", 0.1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("none", 0.0), ("SAM", 0.05), ("mixup", 0.4)]
        ),
    ],
)
def test_a_result_is_that_of_the_saved_network(tmp_path, method, strength):
    run = experiment.from_flags(
        learning_rate=0.05, method=method, strength=strength, label_noise=0.3
    )
    path = str(tmp_path / "network.keras")
    result = experiment.train(run, path)
    json.dumps(result)
    network = keras.models.load_model(path)
    data = common.load_data("digits", 256, label_noise=0.3)
    predicted, given, true = [], [], []
    for x, y in data.examples.as_numpy_iterator():
        predicted.append(np.argmax(network(x), axis=-1))
        given.append(y["label"])
        true.append(y["true_label"])
    predicted, given, true = map(np.concatenate, (predicted, given, true))
    noisy = given != true
    expected = {
        "train_accuracy": np.mean(predicted == given),
        "clean_accuracy": np.mean((predicted == given)[~noisy]),
        "noisy_accuracy": np.mean((predicted == given)[noisy]),
        "recovered_accuracy": np.mean((predicted == true)[noisy]),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-6), name
    x, y = next(data.test.unbatch().batch(10_000).as_numpy_iterator())
    accuracy = np.mean(np.argmax(network(x), axis=-1) == y)
    assert result["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    traces = [row["trace"] for row in result["history"]]
    assert result["peak_trace"] == max(traces) > 0
    assert result["clean_trace"] > 0 and result["noisy_trace"] > 0
    tests = [row["test_accuracy"] for row in result["history"]]
    assert result["best_test_accuracy"] == max(tests)


@pytest.mark.slow
def test_methods_do_what_they_are_called(tmp_path):
    def weights(method, strength=0.0):
        run = experiment.from_flags(
            learning_rate=0.05, method=method, strength=strength
        )
        path = str(tmp_path / "network.keras")
        experiment.train(run, path)
        return keras.models.load_model(path).get_weights()

    plain = weights("none")
    for method in set(experiment.METHODS) - {"none", "mixup"}:
        # Of almost no strength they are almost nothing, but not nothing.
        weak, strong = weights(method, 1e-4), weights(method, 0.5)
        near = max(np.abs(a - b).max() for a, b in zip(weak, plain))
        far = max(np.abs(a - b).max() for a, b in zip(strong, plain))
        assert 0 < near < 0.2 * far, (method, near, far)


def test_a_run_has_the_penalty_that_it_describes():
    for method in experiment.METHODS:
        run = experiment.from_flags(
            learning_rate=0.1,
            method=method,
            strength=0.3,
            start=7,
            fraction=0.5,
        )
        penalty = experiment.penalty(run)
        if method not in experiment.PENALTIES:
            assert penalty is None, method
            continue
        assert (penalty.alpha, penalty.start, penalty.fraction) == (0.3, 7, 0.5)
        assert (penalty.bound is not None) == method.startswith("bounded")


@pytest.mark.parametrize("shape", [(16, 12, 2), (16, 6, 6, 2)])
def test_mixup_mixes_inputs_and_labels_with_the_same_weights(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    y = np.eye(16, dtype="float32")
    batches = tf.data.Dataset.from_tensors((x, y))
    mixed, labels = next(
        experiment._mixed(batches, 1.0, seed=3).as_numpy_iterator()
    )
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    assert (labels.max(axis=1) < 0.95).sum() >= 4, labels.max(axis=1)
    # A label says which examples an input is made of, and how much of each.
    expected = np.tensordot(labels, x, axes=1)
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)


def test_the_best_and_the_peak_are_of_all_epochs():
    rows = [
        dict(epoch=1, trace=5.0, test_accuracy=0.4),
        dict(epoch=2, trace=math.inf, test_accuracy=0.9),
        dict(epoch=3, trace=7.0),
        dict(epoch=4, trace=2.0, test_accuracy=0.6),
    ]
    early = keras_fisher.callbacks.EarlyPhase()
    early.restore([0, 4], [2.0, 6.0], threshold=0.5, early=(4, 3.5))
    result = experiment.summary(rows, early)
    assert result["best_test_accuracy"] == 0.9
    assert result["peak_trace"] == 7.0, "what is finite"
    assert result["early_trace"] == 3.5
    assert (result["trace"], result["test_accuracy"]) == (2.0, 0.6)
    assert math.isnan(experiment.summary(rows, None)["early_trace"])


@pytest.mark.parametrize("size", [3, 40])
def test_traces_are_measured_on_clean_and_on_noisy_examples(size):
    data = common.load_data("digits", 64, label_noise=0.5)
    kinds = {}
    for x, y in data.examples.unbatch().as_numpy_iterator():
        kinds.setdefault(bool(y["is_noisy"]), []).append(x)
    probes = experiment._probes(data, size)
    for name, is_noisy in ("clean_trace", False), ("noisy_trace", True):
        np.testing.assert_array_equal(probes[name], kinds[is_noisy][:size])
    assert len(probes["trace"]) == size
    plain = experiment._probes(common.load_data("digits", 64), size)
    assert {name: len(x) for name, x in plain.items()} == {"trace": size}
