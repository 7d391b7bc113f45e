"""Numbers of NumPy do wherever numbers of Python do, and are saved as these."""

from __future__ import annotations

import json

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import applications
from keras_fisher import fisher_trace
from keras_fisher import hessian_trace
from keras_fisher import layers
from keras_fisher import likelihoods
from keras_fisher._common import checks
from keras_fisher._tensorboard import event_files
from keras_fisher._tensorboard import hyperparameters
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard

_INTEGERS = [np.int64, np.int32, np.uint8]


@pytest.mark.parametrize("kind", _INTEGERS)
def test_checks_return_numbers_of_python(kind):
    assert type(checks.integer("n", kind(3), 1)) is int
    assert type(checks.number("x", kind(3), bool, "")) is float
    assert type(checks.number("x", np.float32(3), bool, "")) is float
    with pytest.raises(ValueError, match="integer"):
        checks.integer("n", np.bool_(True), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", cases.some_slow(_INTEGERS, [np.int32, np.uint8])
)
def test_models_train_and_are_saved(kind, tmp_path):
    penalty = FisherPenalty(
        np.float32(0.5),
        fraction=np.float16(0.5),
        every=kind(2),
        start=kind(1),
        stop=kind(255),
        micro_batch_size=kind(2),
        bound=np.float64(1.0),
    )
    model = FisherModel(
        training.network(), penalty, trace_every=kind(5), seed=kind(3)
    )
    training.compiled(model)
    json.dumps(model.penalty.get_config())
    board = FisherTensorBoard(
        tmp_path / "logs",
        write_every=kind(1),
        probe=training.X[:8],
        probe_every=kind(3),
        early_phase=EarlyPhase("loss", np.float32(0.5), warn_above=kind(50)),
        hyperparameters={
            "w": np.float64(1e-3),
            "n": kind(3),
            "yes": np.bool_(True),
            "tensor": tf.constant(2.0),
            "array": np.arange(2),
        },
    )
    training.fit(model, epochs=1, callbacks=[board])
    found = event_files.hyperparameters(str(tmp_path / "logs" / "hparams"))
    assert (found["w"], found["n"], found["tensor"]) == (1e-3, 3.0, 2.0)
    assert found["yes"] is True
    assert found["array"] == "[0 1]"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.trace_every, loaded.seed) == (5, 3)
    assert repr(loaded.penalty) == repr(penalty)


def test_layers_train_and_are_saved(tmp_path):
    layer = layers.FisherRegularization(
        training.network(),
        np.float32(0.5),
        likelihood=likelihoods.Categorical(from_logits=True),
        seed=np.int64(3),
    )
    model = training.compiled(keras.Sequential([keras.Input((6,)), layer]))
    training.fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].seed == 3


@pytest.mark.parametrize("kind", _INTEGERS)
def test_traces_are_measured(kind):
    model = training.compiled(training.dense_network(6))
    x, y = training.X[:8], training.Y[:8]
    assert fisher_trace(
        model, x, num_samples=kind(2), batch_size=kind(4), seed=kind(3)
    ) == fisher_trace(model, x, num_samples=2, batch_size=4, seed=3)
    assert hessian_trace(
        model, x, y, num_probes=kind(3), tolerance=np.float32(0.5), seed=kind(2)
    ) == hessian_trace(model, x, y, num_probes=3, tolerance=0.5, seed=2)


@pytest.mark.parametrize("kind", _INTEGERS)
def test_networks_are_built(kind):
    shape = kind(16), kind(16), kind(1)
    networks = [
        applications.SimpleCNN(shape, classes=kind(3)),
        applications.ResNet(shape, classes=kind(3), depth=kind(8)),
        applications.WideResNet(
            shape,
            classes=kind(3),
            depth=kind(10),
            widen_factor=kind(1),
            dropout=np.float32(0.5),
        ),
        applications.DenseNet(
            shape,
            classes=kind(3),
            depth=kind(7),
            growth_rate=kind(2),
            reduction=np.float32(0.5),
        ),
        applications.VGG11((kind(32), kind(32), kind(1)), classes=kind(3)),
    ]
    for network in networks:
        json.dumps(network.get_config())
        assert network.output_shape == (None, 3)


def test_lists_of_no_element_are_no_hyperparameters():
    found = hyperparameters.simple({"a": [], "b": None, "c": [1], "d": 0.0})
    assert found == {"c": "[1]", "d": 0.0}
