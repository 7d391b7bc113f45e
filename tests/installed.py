"""Tries an installed keras_fisher that has nothing but what it needs.

python tests/installed.py
"""

from __future__ import annotations

import importlib.metadata
import pathlib

import keras
import numpy as np

import keras_fisher


def main() -> None:
    """Trains a `FisherModel`, and looks for the files of the package."""
    files = {str(file) for file in importlib.metadata.files("keras_fisher")}
    assert "keras_fisher/py.typed" in files, sorted(files)
    package = pathlib.Path(keras_fisher.__file__).parent
    assert "site-packages" in package.parts, package
    version = importlib.metadata.version("keras_fisher")
    assert version == keras_fisher.__version__, version
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model = keras_fisher.FisherModel(network, penalty=0.1, seed=0)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    history = model.fit(x, y, verbose=0)
    trace = history.history["fisher_trace"][-1]
    assert 0 < trace < np.inf, trace
    print(f"keras_fisher {version} is installed and trains: Tr(F) = {trace}")


if __name__ == "__main__":
    main()
