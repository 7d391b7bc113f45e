"""Tables of logs hold what was written, whatever directory it went to."""

from __future__ import annotations

import math
import pathlib
import sys
import time

import numpy as np
import pandas as pd
import pytest
from tensorboard.plugins.hparams import api
import tensorflow as tf

from keras_fisher import logs

_COLUMNS = ["run", "split", "tag", "step", "value", "wall_time"]


def _write(directory, points, hyperparameters=None):
    """Writes as TensorFlow does, and returns the file."""
    before = set(pathlib.Path(directory).glob("*"))
    with tf.summary.create_file_writer(str(directory)).as_default():
        if hyperparameters is not None:
            api.hparams(hyperparameters)
        for tag, step, value in points:
            tf.summary.scalar(tag, value, step)
    [path] = set(pathlib.Path(directory).glob("*")) - before
    return path


def _write_events(path, events):
    """Writes as TensorFlow 1 did: `(wall_time, step, {tag: value})`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for wall_time, step, values in events:
            event = tf.compat.v1.Event(wall_time=wall_time, step=step)
            for tag, value in values.items():
                event.summary.value.add(tag=tag, simple_value=value)
            writer.write(event.SerializeToString())


def _rows(frame):
    return [tuple(row) for row in frame[_COLUMNS[:5]].to_numpy()]


def test_read_has_a_row_for_each_point(tmp_path):
    begin = time.time()
    trace = [("fisher/trace", 10, 4.0), ("fisher/trace", 0, 0.25)]
    _write(tmp_path / "lr=0.1" / "train", [*trace, ("epoch_loss", 0, 2.5)])
    _write(tmp_path / "lr=0.1" / "validation", [("epoch_loss", 0, 3.5)])
    _write(tmp_path / "lr=0.1" / "hparams", [("metric/loss", 0, 2.5)])
    _write(tmp_path / "lr=0.01" / "train", [("fisher/trace", 2**40, 8.0)])
    _write(tmp_path / "sweep" / "a" / "train", [("fisher/trace", 5, 1.5)])
    _write(tmp_path / "sweep" / "other", [("x", 1, math.nan)])
    frame = logs.read(tmp_path)
    assert [*frame.columns] == _COLUMNS
    assert frame.dtypes["step"] == "int64"
    assert frame.dtypes["value"] == frame.dtypes["wall_time"] == "float64"
    assert frame["wall_time"].between(begin - 1, time.time() + 1).all()
    *rows, last = _rows(frame)
    assert rows == [
        ("lr=0.01", "train", "fisher/trace", 2**40, 8.0),
        ("lr=0.1", "hparams", "metric/loss", 0, 2.5),
        ("lr=0.1", "train", "epoch_loss", 0, 2.5),
        ("lr=0.1", "train", "fisher/trace", 0, 0.25),
        ("lr=0.1", "train", "fisher/trace", 10, 4.0),
        ("lr=0.1", "validation", "epoch_loss", 0, 3.5),
        ("sweep/a", "train", "fisher/trace", 5, 1.5),
    ]
    assert last[:4] == ("sweep/other", "", "x", 1) and math.isnan(last[4])


def test_the_log_directory_can_be_a_run(tmp_path):
    _write(tmp_path / "train", [("a", 0, 1.0)])
    _write(tmp_path, [("b", 0, 2.0)])
    rows = [(".", "", "b", 0, 2.0), (".", "train", "a", 0, 1.0)]
    assert _rows(logs.read(tmp_path)) == rows
    # Whatever is said for it.
    assert _rows(logs.read(f"{tmp_path}/")) == rows
    assert _rows(logs.read(tmp_path / "train")) == [(".", "", "a", 0, 1.0)]


def test_the_index_is_in_the_order_of_writing(tmp_path):
    """Though all layers of a step have one event, with one time."""
    layers = [f"layer_{k}" for k in range(30)]
    for first in (0, 1):  # two files, written to in turns
        _write_events(
            tmp_path / "train" / f"events.out.tfevents.{first}",
            [
                (7.0 + step, step, dict.fromkeys(layers, 1.0))
                for step in range(first, 40, 2)
            ],
        )
    frame = logs.read(tmp_path)
    assert [*frame["tag"]] == [t for t in sorted(layers) for _ in range(40)]
    written = frame.sort_index()
    assert [*written["tag"]] == 40 * layers
    assert [*written["step"]] == [step for step in range(40) for _ in layers]


def test_of_points_written_twice_the_last_counts(tmp_path):
    """By their times: names of files do not always tell."""
    _write_events(
        tmp_path / "run" / "train" / "events.out.tfevents.2",
        [(100.0, 0, {"a": 1.0}), (101.0, 1, {"a": 2.0}), (109.0, 2, {"a": 9})],
    )
    _write_events(
        tmp_path / "run" / "train" / "events.out.tfevents.3",
        [(99.0, 0, {"a": 5.0}), (102.0, 1, {"a": 6.0}), (102.0, 1, {"a": 7.0})],
    )
    _write_events(
        tmp_path / "run" / "validation" / "events.out.tfevents.3",
        [(103.0, 1, {"a": 8.0})],
    )
    frame = logs.read(tmp_path)
    assert [*frame["value"]] == [1.0, 7.0, 9.0, 8.0]
    assert [*frame["wall_time"]] == [100.0, 102.0, 109.0, 103.0]


@pytest.mark.parametrize("lost", [1, 30])
def test_a_killed_run_loses_the_unfinished_record(lost, tmp_path):
    path = _write(tmp_path / "train", [("a", k, k) for k in range(4)])
    path.write_bytes(path.read_bytes()[:-lost])
    assert [*logs.read(tmp_path)["value"]] == [0.0, 1.0, 2.0]


def test_files_can_be_empty(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "events.out.tfevents.1.host").write_bytes(b"")
    frame = logs.read(tmp_path)
    assert [*frame.columns] == _COLUMNS and frame.empty
    assert frame["step"].dtype == "int64"
    assert frame["value"].dtype == frame["wall_time"].dtype == "float64"
    assert not frame["tag"].str.startswith("fisher/").any()
    assert logs.runs(tmp_path).empty


@pytest.mark.parametrize("function", [logs.read, logs.runs])
def test_errors_name_the_directory(function, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no directory.*missing.*Pass"):
        function(missing)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no event files.*Train with"):
        function(tmp_path)


@pytest.mark.parametrize("function", [logs.read, logs.runs])
def test_without_pandas_it_says_what_to_install(
    function, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"keras_fisher\[plot\]") as error:
        function(tmp_path)
    assert error.value.name == "pandas"


def test_runs_has_hyperparameters_and_then_metrics(tmp_path):
    _write(
        tmp_path / "a" / "hparams",
        [
            ("metric/loss", 0, 2.0),
            ("metric/loss", 1, 1.5),
            ("metric/accuracy", 1, 0.5),
            ("other", 1, 3.0),
        ],
        {"learning_rate": 0.5, "penalty": "fisher", "nesterov": True},
    )
    _write(tmp_path / "a" / "train", [("metric/no", 0, 1.0)])
    _write(
        tmp_path / "a-b" / "hparams",
        [("metric/loss", 0, 4.0), ("metric/early_trace", 0, 32.0)],
        {"learning_rate": 0.25, "alpha": 0.125},
    )
    table = logs.runs(tmp_path)
    assert table.index.name == "run"
    assert [*table.index] == ["a", "a-b"]
    hyperparameters = ["alpha", "learning_rate", "nesterov", "penalty"]
    metrics = ["accuracy", "early_trace", "loss"]
    assert [*table.columns] == hyperparameters + metrics
    nan = np.nan
    np.testing.assert_array_equal(table["alpha"], [nan, 0.125])
    np.testing.assert_array_equal(table["learning_rate"], [0.5, 0.25])
    np.testing.assert_array_equal(table["loss"], [1.5, 4.0])
    np.testing.assert_array_equal(table["early_trace"], [nan, 32.0])
    np.testing.assert_array_equal(table["accuracy"], [0.5, nan])
    assert table.loc["a", "nesterov"] is True
    assert table.loc["a", "penalty"] == "fisher"
    assert pd.isna(table.loc["a-b", "penalty"])


def test_the_final_metric_is_the_last_that_was_written(tmp_path):
    """Also if it is of an earlier step, or NaN."""
    _write_events(
        tmp_path / "hparams" / "events.out.tfevents.2",
        [(50.0, 9, {"metric/a": 1.0}), (60.0, 9, {"metric/b": 2.0})],
    )
    _write_events(
        tmp_path / "hparams" / "events.out.tfevents.3",
        [(51.0, 3, {"metric/a": math.nan}), (59.0, 8, {"metric/b": 3.0})],
    )
    table = logs.runs(tmp_path)
    assert [*table.index] == ["."]
    assert math.isnan(table.loc[".", "a"])
    assert table.loc[".", "b"] == 2.0


def test_runs_are_those_that_wrote_something(tmp_path):
    _write(tmp_path / "plain" / "train", [("a", 0, 1.0)])
    _write(tmp_path / "begun" / "hparams", [], {"alpha": 0.5})
    _write(tmp_path / "other", [("metric/loss", 0, 2.0)])
    # As for the configuration of a sweep.
    _write(tmp_path, [])
    _write(tmp_path / "empty" / "train", [])
    table = logs.runs(tmp_path)
    assert [*table.index] == ["begun", "other", "plain"]
    np.testing.assert_array_equal(table["alpha"], [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(table["loss"], [np.nan, 2.0, np.nan])


def test_hyperparameters_and_metrics_can_share_a_name(tmp_path):
    points = [("metric/loss", 0, 2.0), ("metric/accuracy", 0, 0.5)]
    _write(tmp_path / "hparams", points, {"loss": "mse"})
    table = logs.runs(tmp_path)
    assert table.loc["."].to_dict() == {
        "loss": "mse",
        "accuracy": 0.5,
        "metric/loss": 2.0,
    }


def test_runs_does_not_read_curves_to_the_end(tmp_path, monkeypatch):
    _write(tmp_path / "train", [("a", k, 1.0) for k in range(100)])
    taken = []
    scalars = logs.event_files.scalars

    def counted(directory):
        for point in scalars(directory):
            taken.append(point)
            yield point

    monkeypatch.setattr(logs.event_files, "scalars", counted)
    assert [*logs.runs(tmp_path).index] == ["."]
    assert len(taken) == 1
