"""Shared setup: every test starts from the same seeds and dtype policy."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import combinations
import keras
import pytest
import tensorflow as tf

_UNTUNED = tf.data.Options()
_UNTUNED.autotune.enabled = False
_iterate = tf.data.Dataset.__iter__


@pytest.fixture(autouse=True)
def _untuned_data(monkeypatch):
    # An epoch that ends while TensorFlow's tuner sleeps often waits for it,
    # up to as long as the epoch has taken.
    monkeypatch.setattr(
        tf.data.Dataset,
        "__iter__",
        lambda dataset: _iterate(dataset.with_options(_UNTUNED)),
    )


@pytest.fixture(autouse=True)
def _fresh_keras():
    # Without the garbage collection, which takes longer than most tests.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def double_precision():
    """What is made computes in it, also where Keras goes by `floatx`."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Before those are left out that are marked slow."""
    combinations.mark_the_others(items)


def pytest_terminal_summary(terminalreporter):
    """Counts random cases of fuzzing, kills of `test_interruption`."""
    counts = {"random_cases": [], "kills": []}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    counts.get(name, []).append(value)
    if cases := counts["random_cases"]:
        terminalreporter.write_line(
            f"{sum(cases)} random cases, of {len(cases)} properties"
        )
    if kills := list(filter(None, counts["kills"])):
        terminalreporter.write_line(
            f"{len(kills)} runs killed, {sum(kills)} times in all"
        )
