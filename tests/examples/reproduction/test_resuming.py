"""Runs that are interrupted, and go on."""

from __future__ import annotations

import os
import time

import experiment
import keras
import numpy as np
import pytest
import resuming

import keras_fisher


class KilledError(Exception):
    """In the place of the end of a process."""


def _at_the_second(function):
    """The function, which fails when it is called the second time."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KilledError
        return function(*args, **kwargs)

    return wrapper


# Before anything of an epoch is kept, and between its two writes.
_MOMENTS = {
    "measuring": (experiment.Watch, "on_epoch_end"),
    "writing": (keras_fisher.callbacks.BackupAndRestore, "on_epoch_end"),
}


def _trained(run, directory):
    directory.mkdir(exist_ok=True)
    path = directory / "network.keras"
    result = experiment.train(run, str(path))
    backups = directory / "network-backup"
    assert {*os.listdir(directory)} == {path.name, backups.name}
    resuming.delete(str(backups))
    assert os.listdir(directory) == [path.name]
    assert result.pop("seconds") > 0
    return result, keras.models.load_model(path).get_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, strength, moment",
    [
        ("FP", 0.1, "writing"),
        ("none", 0.0, "measuring"),
        ("SAM", 0.05, "measuring"),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(
    monkeypatch, tmp_path, method, strength, moment
):
    monkeypatch.setattr(resuming, "_SECONDS_BETWEEN_BACKUPS", 0.0)
    run = experiment.from_flags(
        learning_rate=0.05,
        method=method,
        strength=strength,
        label_noise=0.3,
        epochs=4,
    )
    expected, weights = _trained(run, tmp_path / "whole")
    owner, name = _MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(owner, name, _at_the_second(getattr(owner, name)))
        _trained(run, tmp_path / "killed")
    result, resumed = _trained(run, tmp_path / "killed")
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3, 4]
    np.testing.assert_equal(result, expected)
    for one, other in zip(resumed, weights, strict=True):
        np.testing.assert_array_equal(one, other)


def _model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def _backup(directory, rows, early=None):
    begin = time.perf_counter()
    backup = resuming.Backup(str(directory), rows, early, begin)
    backup.set_model(_model())
    backup.on_train_begin()
    return backup


def test_what_was_measured_goes_with_the_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(resuming, "_SECONDS_BETWEEN_BACKUPS", 0.0)
    early = keras_fisher.callbacks.EarlyPhase("accuracy", 0.5)
    early.restore([0, 4, 8], [1.0, 3.0, 2.0], early=(4, 3.0))
    before = _backup(tmp_path / "run", [{"epoch": 1}], early)
    before._begin -= 1000
    before.on_epoch_end(0)
    rows, restored = [], keras_fisher.callbacks.EarlyPhase("accuracy", 0.5)
    after = _backup(tmp_path / "run", rows, restored)
    after.on_epoch_begin(1)
    assert rows == [{"epoch": 1}]
    assert 1000 < after.seconds < 1100
    for name in "steps", "traces", "peaks", "early_step", "early_trace":
        assert getattr(restored, name) == getattr(early, name), name


def test_what_was_measured_ahead_of_the_weights_is_measured_again(tmp_path):
    rows = [{"epoch": 1}, {"epoch": 2}]
    _backup(tmp_path / "run", rows).on_epoch_begin(1)
    assert rows == [{"epoch": 1}]


def test_what_a_deletion_has_left_is_no_backup(monkeypatch, tmp_path):
    monkeypatch.setattr(resuming, "_SECONDS_BETWEEN_BACKUPS", 0.0)
    before = _backup(tmp_path / "run", [{"epoch": 1}])
    before.model.layers[-1].kernel.assign([[7.0], [7.0]])
    before.on_epoch_end(0)
    (tmp_path / "run" / "measured.json").unlink()
    after = _backup(tmp_path / "run", [])
    assert not np.any(after.model.layers[-1].kernel == 7.0)
    assert not [*(tmp_path / "run").glob("epoch*")]


def test_short_runs_write_no_backup(tmp_path):
    directory = tmp_path / "run"
    backup = resuming.Backup(str(directory), [], None, 0.0)
    _model().fit(np.ones((4, 2)), np.ones(4), verbose=0, callbacks=[backup])
    assert os.listdir(directory) == []
    resuming.delete(str(directory))
    assert os.listdir(tmp_path) == []
