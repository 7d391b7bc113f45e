"""Another Keras than the one that the library is for."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import pytest
import training

from keras_fisher import FisherModel
from keras_fisher import check_derivatives
from keras_fisher import fisher_trace
from keras_fisher import hessian_trace
from keras_fisher import layers
from keras_fisher._common import keras_3


@pytest.mark.parametrize("backend", ["jax", "numpy"])
def test_another_backend_is_refused_at_import(backend):
    """Whether or not it is installed."""
    result = subprocess.run(
        [sys.executable, "-c", "import keras_fisher"],
        env=os.environ
        | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: keras_fisher needs Keras with")
    assert repr(backend) in last
    assert "KERAS_BACKEND=tensorflow" in last


def test_an_installed_backend_is_refused(monkeypatch):
    keras_3.check_backend()
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ImportError, match="'torch'"):
        keras_3.check_backend()


_Keras2 = type("Sequential", (), {"__module__": "tf_keras.src.models"})


@pytest.mark.parametrize(
    "function",
    [
        FisherModel,
        layers.FisherRegularization,
        lambda model: fisher_trace(model, training.X),
        lambda model: hessian_trace(model, training.X, training.Y),
        lambda model: check_derivatives(model, training.X),
    ],
)
def test_a_model_of_keras_2_is_refused(function):
    class Model(_Keras2):
        pass

    with pytest.raises(ValueError, match="Model of tf_keras, which is Keras 2"):
        function(Model())
