"""A wrong second derivative in a network is noticed in `fit`."""

from __future__ import annotations

import warnings

import foreign
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher._derivatives import derivative_check

_MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several": {"steps_per_execution": 3},
}


def _network(function):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8),
            foreign.Applied(function, name="of_a_user"),
            layers.Dropout(0.2, seed=3),
            layers.Dense(3),
        ]
    )


def _model(function, penalty=0.1, **kwargs):
    return training.compiled(
        FisherModel(_network(function), penalty, seed=0), **kwargs
    )


def _warnings_of(recorded) -> list[str]:
    return [
        str(each.message)
        for each in recorded
        if "Second derivatives" in str(each.message)
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", _MODES)
def test_a_wrong_one_is_told_once_with_its_name(mode, recwarn):
    model = _model(foreign.wrong_in_x, **_MODES[mode])
    training.fit(model)
    training.fit(model)
    (message,) = _warnings_of(recwarn)
    assert "of_a_user" in message and "finite_difference" in message


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", _MODES)
def test_a_right_one_is_not(mode, recwarn):
    training.fit(_model(foreign.right, **_MODES[mode]))
    assert not _warnings_of(recwarn)


@pytest.mark.parametrize(
    "penalty, steps",
    [(FisherPenalty(0.1, start=9), 2), (FisherPenalty(0.1, every=4), 1)],
    ids=["starts later", "every few steps"],
)
def test_it_looks_at_the_first_penalty(penalty, steps, recwarn):
    model = _model(foreign.wrong_in_x, penalty)
    # Seven batches an epoch.
    training.fit(model, epochs=1)
    assert len(_warnings_of(recwarn)) == (steps == 1)
    training.fit(model, epochs=1)
    assert len(_warnings_of(recwarn)) == 1


def _looks(monkeypatch) -> list:
    """Gets an entry for each look, which then finds nothing."""
    seen = []

    def look(*args, **kwargs):
        seen.append(args)
        return []

    monkeypatch.setattr(derivative_check, "check", look)
    return seen


@pytest.mark.parametrize(
    "penalty, count",
    [
        (FisherPenalty(0.1, method="finite_difference"), 0),
        (None, 0),
        (FisherPenalty(0.1), 1),
    ],
    ids=["differences", "none", "exact"],
)
def test_what_needs_no_second_derivative_is_not_looked_at(
    penalty, count, monkeypatch
):
    looks = _looks(monkeypatch)
    training.fit(_model(foreign.wrong_in_x, penalty))
    assert len(looks) == count


@pytest.mark.parametrize("mode", ["graph", "several"])
def test_layers_that_run_in_graphs_alone_are_trained(mode, recwarn):
    def named(x):
        assert x.op.name  # which tensors of eager execution have not
        return tf.tanh(x)

    model = _model(named, **_MODES[mode])
    history = training.fit(model)
    assert np.isfinite(history.history["loss"]).all()
    assert not _warnings_of(recwarn)


@pytest.mark.parametrize("is_known", [True, False])
def test_networks_that_are_known_are_not_looked_at(is_known, monkeypatch):
    looks = _looks(monkeypatch)
    network = training.network() if is_known else _network(foreign.right)
    model = training.compiled(FisherModel(network, 0.1))
    own, on_the_host = tf.py_function, []

    def noted(*args, **kwargs):
        on_the_host.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(tf, "py_function", noted)
    training.fit(model)
    assert len(looks) == len(on_the_host) == (not is_known)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_training_is_the_same_to_the_bit(mode, monkeypatch):
    found = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(derivative_check, "check", lambda *_, **__: [])
        model = _model(foreign.right, **_MODES[mode])
        training.fit(model)
        found.append([v.numpy() for v in model.variables])
    training.assert_equal(*found)


def test_under_a_strategy_of_one(recwarn):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = _model(foreign.wrong_in_x)
    training.fit(model)
    assert len(_warnings_of(recwarn)) == 1


def test_the_report_of_the_same_network():
    report = keras_fisher.check_derivatives(
        _network(foreign.wrong_in_x), training.X
    )
    verdicts = {
        each.path.rpartition("/")[2].rstrip("_0123456789"): each.verdict
        for each in report
    }
    assert verdicts.pop("of_a_user") == "differs"
    assert set(verdicts.values()) == {"exact"}
    assert not report.is_exact and "of_a_user: differs" in str(report)
    report = keras_fisher.check_derivatives(
        _network(foreign.right), training.X, training.Y
    )
    assert report.is_exact
    frozen = _network(foreign.right)
    frozen.trainable = False
    with pytest.raises(ValueError, match="no derivatives"):
        keras_fisher.check_derivatives(frozen, training.X)


def test_a_report_that_cannot_tell_is_not_exact():
    dense = layers.Dense(3, dtype="bfloat16")
    model = keras.Sequential([keras.Input((4,)), dense])
    report = keras_fisher.check_derivatives(model, np.ones((2, 4)))
    assert [each.verdict for each in report] == ["undecided"]
    assert not report.is_exact, str(report)


def test_the_report_builds_and_changes_nothing():
    model = training.Subclassed()
    seeds = [v.numpy() for v in model.non_trainable_variables]
    report = keras_fisher.check_derivatives(model, training.X)
    assert len(report.layers) == 4 and report.is_exact, str(report)
    np.testing.assert_array_equal(seeds, model.non_trainable_variables)


def test_where_warnings_are_errors_it_is_that_error():
    model = _model(foreign.wrong_in_x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="of_a_user"):
            training.fit(model)
