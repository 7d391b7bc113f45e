"""Whether Keras is the one that the library is for: Keras 3 on TensorFlow."""

from __future__ import annotations

import os
from typing import Any


def check_backend() -> None:
    """Raises an `ImportError` unless Keras computes with TensorFlow."""
    cause = None
    try:
        import keras

        backend = keras.config.backend()
    except ImportError as error:
        # Of a backend that is not installed, perhaps.
        cause, backend = error, os.environ.get("KERAS_BACKEND", "tensorflow")
        if backend == "tensorflow":
            raise
    if backend != "tensorflow":
        raise ImportError(
            "keras_fisher needs Keras with the backend TensorFlow. Received: "
            f"the backend {backend!r}. Set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        ) from cause


def check_layer(layer: Any) -> None:
    """Raises a `ValueError` for a layer or model of Keras 2."""
    if any(
        cls.__module__.partition(".")[0] == "tf_keras"
        for cls in type(layer).__mro__
    ):
        raise ValueError(
            "keras_fisher needs a model of Keras 3. Received: "
            f"{type(layer).__name__} of tf_keras, which is Keras 2. Build it "
            "with the package `keras`, and without TF_USE_LEGACY_KERAS=1 in "
            "the environment."
        )
