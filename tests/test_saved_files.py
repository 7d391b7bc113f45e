"""Files that earlier versions have written still load, and train on."""

from __future__ import annotations

import pathlib

import cases
import keras
import numpy as np
import pytest

import keras_fisher  # noqa: F401

_DATA = pathlib.Path(__file__).parent / "data"
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(24, 6)).astype("float32")
_Y = _RANDOM.integers(0, 3, 24)
_LABELS = {
    # A stored gradient, dropout and statistics.
    "one_output": _Y,
    # A likelihood for each of three outputs, and Adam's moments.
    "outputs": {
        "kind": _Y,
        "flag": (_Y > 0).astype("float32")[:, None],
        "size": _X[:, :2],
    },
    # FisherRegularization around Rematerialization, in a stock model.
    "layer": _Y,
}


@pytest.mark.few(1)
@cases.since_keras("3.15")  # which has written them
@pytest.mark.parametrize("name", _LABELS)
def test_files_from_before_the_move_go_on_as_their_writers_did(name):
    """Written by flat modules, which are no more; beside what they did next."""
    model = keras.models.load_model(_DATA / f"{name}.keras")
    found = {}
    for when in ("before", "after"):
        if when == "after":
            model.fit(_X, _LABELS[name], 8, shuffle=False, verbose=0)
        outputs = keras.tree.flatten(model.predict(_X, verbose=0))
        found |= {f"{when}_{k}": value for k, value in enumerate(outputs)}
    with np.load(_DATA / f"{name}.npz") as expected:
        assert found.keys() == set(expected.files)
        for key in expected.files:
            # Another processor rounds in another way.
            np.testing.assert_allclose(
                found[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key
            )
