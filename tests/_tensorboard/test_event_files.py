"""Event files that are read and rewritten are those that TensorFlow wrote."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import api
import tensorflow as tf

from keras_fisher._tensorboard import event_files


def _write(directory, points, suffix=None):
    writer = tf.summary.create_file_writer(
        str(directory), filename_suffix=suffix
    )
    with writer.as_default():
        for tag, step, value in points:
            tf.summary.scalar(tag, value, step)
    writer.close()


_POINTS = [("a", 0, 1.0), ("b", 0, 2.5), ("a", 3, -1.0), ("a", 2**40, 7.0)]


def _read(directory):
    return [p[:3] for p in event_files.scalars(str(directory))]


def test_scalars_come_in_the_order_of_writing(tmp_path):
    _write(tmp_path, _POINTS[:2], suffix=".1")
    _write(tmp_path, _POINTS[2:], suffix=".2")
    assert _read(tmp_path) == _POINTS
    times = [p.wall_time for p in event_files.scalars(str(tmp_path))]
    assert times == sorted(times) and times[0] > 1.7e9


def test_other_summaries_are_no_scalars(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        tf.summary.histogram("h", [1.0, 2.0], 0)
        tf.summary.text("t", "text", 0)
        tf.summary.image("i", np.zeros([1, 2, 2, 3]), 0)
        tf.summary.scalar("s", 3.0, 0)
    writer.close()
    assert _read(tmp_path) == [("s", 0, 3.0)]


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_record_cut_short_ends_the_file(lost, tmp_path):
    _write(tmp_path, _POINTS)
    [path] = map(pathlib.Path, event_files.paths(str(tmp_path)))
    path.write_bytes(path.read_bytes()[:-lost])
    assert _read(tmp_path) == _POINTS[:-1]


def test_nothing_is_there(tmp_path):
    assert _read(tmp_path / "missing") == []
    (tmp_path / "events.out.tfevents.1.empty").touch()
    assert _read(tmp_path) == []
    assert event_files.hyperparameters(str(tmp_path)) == {}


def test_directories_are_those_that_hold_event_files(tmp_path):
    for name in ("b/train", "a", "a/c/validation"):
        _write(tmp_path / name, _POINTS)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").touch()
    assert event_files.directories(str(tmp_path)) == [
        str(tmp_path / name) for name in ("a", "a/c/validation", "b/train")
    ]


def test_hyperparameters_are_the_last_ones(tmp_path):
    for suffix, rate in ((".1", 0.5), (".2", 0.25)):
        writer = tf.summary.create_file_writer(
            str(tmp_path), filename_suffix=suffix
        )
        with writer.as_default():
            api.hparams({"rate": rate, "name": "x", "flag": True, "n": 3})
        writer.close()
    assert event_files.hyperparameters(str(tmp_path)) == {
        "rate": 0.25,
        "name": "x",
        "flag": True,
        "n": 3,
    }


def test_points_are_taken_out_and_the_rest_stays(tmp_path):
    directory = tmp_path / "run"
    _write(directory, _POINTS, suffix=".1")
    _write(directory, [("b", 1, 1.0), ("c", 9, 1.0)], suffix=".2")
    first, second = map(pathlib.Path, event_files.paths(str(directory)))
    was = first.read_bytes(), second.read_bytes()
    count = event_files.take_out(
        str(directory), lambda tag, step: tag == "a" and step >= 3
    )
    assert count == 2
    assert _read(directory) == [*_POINTS[:2], ("b", 1, 1.0), ("c", 9, 1.0)]
    # TensorBoard reads what was written anew.
    events = event_accumulator.EventAccumulator(str(directory)).Reload()
    assert [e.step for e in events.Tensors("a")] == [0]
    # A file without such points is left alone; the other one was kept.
    assert second.read_bytes() == was[1]
    [kept] = directory.glob("replaced-1.*")
    assert kept.read_bytes() == was[0]
    assert len(list(directory.iterdir())) == 3


def test_what_was_kept_is_never_overwritten(tmp_path):
    _write(tmp_path, _POINTS)
    for step in (3, 0):
        event_files.take_out(str(tmp_path), lambda _, at, s=step: at >= s)
    assert _read(tmp_path) == []
    sizes = [
        (tmp_path / name).stat().st_size
        for name in sorted(p.name for p in tmp_path.glob("replaced-*"))
    ]
    assert len(sizes) == 2 and sizes[0] > sizes[1]


def test_a_record_that_holds_several_points_loses_some(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path))
    from keras_fisher._tensorboard import summaries

    with writer.as_default():
        tf.summary.experimental.write_raw_pb(
            summaries.scalars({"a": 1.0, "b": 2.0}), step=4
        )
    writer.close()
    assert event_files.take_out(str(tmp_path), lambda t, _: t == "b") == 1
    assert _read(tmp_path) == [("a", 4, 1.0)]


def test_files_of_one_second_are_read_in_their_order(tmp_path):
    for k in range(9, 12):
        _write(tmp_path, [("a", k, 0.0)])
        [path] = tmp_path.glob("*.v2")
        path.rename(tmp_path / f"events.out.tfevents.100.host.7.{k}.v3")
    assert [step for _, step, _ in _read(tmp_path)] == [9, 10, 11]
