"""Targets with noise flags, in `fit` and `evaluate`."""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher.datasets import add_label_noise


def _noisy(batch_size, weights=False):
    data = (training.X, training.Y) + (
        (np.linspace(0, 2, 50),) if weights else ()
    )
    data = tf.data.Dataset.from_tensor_slices(data)
    data = add_label_noise(data, 0.5, 3, seed=1)
    return data.batch(batch_size)


@pytest.mark.parametrize("batch_size", [7, *cases.slow([1, 50])])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "options", [dict(trace_every=None), dict(penalty=0.1)], ids=["plain", "fp"]
)
def test_noisy_and_clean_accuracy_equal_those_of_predict(
    batch_size, weights, options
):
    network = training.network(dropout=False, batch_norm=False)
    model = FisherModel(network, **options)
    training.compiled(model, optimizer=keras.optimizers.SGD(0.0))
    data = _noisy(batch_size, weights)
    logs = model.fit(data, epochs=2, verbose=0, validation_data=data).history
    evaluated = model.evaluate(data, return_dict=True, verbose=0)

    targets = next(iter(_noisy(50)))[1]
    predicted = model.predict(training.X, verbose=0).argmax(axis=1)
    noisy = targets["is_noisy"].numpy()
    given, true = targets["label"].numpy(), targets["true_label"].numpy()
    assert 0 < noisy.sum() < 50
    expected = {
        "clean_accuracy": np.mean((predicted == given)[~noisy]),
        "noisy_accuracy": np.mean((predicted == given)[noisy]),
        "recovered_accuracy": np.mean((predicted == true)[noisy]),
    }
    for name, value in expected.items():
        for epoch in (0, 1):
            for found in (
                logs[name][epoch],
                logs[f"val_{name}"][epoch],
                evaluated[name],
            ):
                np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(
        logs["accuracy"], np.mean(predicted == given), rtol=1e-6
    )


def test_noise_flags_as_arrays_with_weights_and_a_split():
    targets = {k: v.numpy() for k, v in next(iter(_noisy(50)))[1].items()}
    model = training.compiled(FisherModel(training.network(), 0.1))
    logs = model.fit(
        training.X,
        targets,
        sample_weight=np.linspace(0, 2, 50),
        validation_split=0.2,
        batch_size=8,
        verbose=0,
    ).history
    assert {"noisy_accuracy", "val_noisy_accuracy"} <= set(logs)


def test_plain_targets_have_no_noise_in_their_logs():
    model = training.compiled(FisherModel(training.network()))
    model.fit(_noisy(8), verbose=0)
    assert "noisy_accuracy" not in training.fit(model, epochs=1).history
    assert "noisy_accuracy" not in model.evaluate(
        training.X, training.Y, return_dict=True, verbose=0
    )
