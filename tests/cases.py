"""What tests choose from: modes, penalties, versions, slow values."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras
import pytest
import tensorflow as tf

from keras_fisher import FisherPenalty
from keras_fisher import penalties

MODES = ("eager", "graph", "xla")
# One of each kind of subset, schedule and method.
FISHER_PENALTIES = [
    FisherPenalty(0.3, bound=None),
    FisherPenalty(0.3, bound=None, fraction=0.5),
    FisherPenalty(0.3, bound=None, micro_batch_size=4),
    FisherPenalty(0.3, bound=None, method="finite_difference"),
    FisherPenalty(0.3, bound=None, every=3),
    FisherPenalty(0.3, bound=None, every=3, reuse=False, start=2, stop=6),
]


def has_keras(version: str) -> bool:
    """Whether Keras is of this version, like `"3.13"`, or newer."""
    parts = keras.__version__.split(".")[:2]
    return [int(part) for part in parts] >= [int(p) for p in version.split(".")]


def since_keras(version: str) -> pytest.MarkDecorator:
    """Marks tests of what Keras has had since a version."""
    reason = f"Keras {keras.__version__} has not what {version} has"
    return pytest.mark.skipif(not has_keras(version), reason=reason)


def name_of_penalty(penalty: penalties.Penalty) -> str:
    """Its class, and what tells it from others."""
    name = type(penalty).__name__
    return f"{name}{penalty.every}{penalty.method[0]}"


def compiled(function: Callable, mode: str, signature=None) -> Callable:
    """The function in one of `MODES`."""
    if mode == "eager":
        return function
    return tf.function(
        function,
        input_signature=signature,
        jit_compile=mode == "xla",
        autograph=False,
    )


def slow(values: Iterable) -> list:
    """Parameters that are tried in `test-all` alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def some_slow(names: Iterable[str], slow: Iterable[str]) -> list:
    """All names, of which some are tried in `test-all` alone."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in slow else name
        for name in names
    ]
