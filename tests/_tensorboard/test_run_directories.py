"""Directories of runs, and processes that want the same one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

from keras_fisher._tensorboard import run_directories
from keras_fisher._tensorboard import summaries
from keras_fisher._tensorboard import tags

_HYPERPARAMETERS = {"alpha": 0.1, "model": "network", "is_new": True}


def _write(directory, name, *buffers, step=0):
    writer = tf.summary.create_file_writer(str(directory / name))
    with writer.as_default():
        for buffer in buffers:
            tf.summary.experimental.write_raw_pb(buffer, step=step)
    writer.close()


def _run(directory, hyperparameters=_HYPERPARAMETERS, *, ends=False, last=0):
    """Writes the beginning of a run, its last point, and perhaps its end."""
    start = summaries.session_start({**hyperparameters, "batch_size": 8.0}, "")
    _write(directory, tags.HPARAMS, start)
    point = summaries.scalars({tags.TRACE: 1.0})
    _write(directory, tags.TRAIN, point, step=last)
    if ends:
        _write(directory, tags.HPARAMS, summaries.session_end())


def _choose(root, step=0):
    choice = run_directories.choose(str(root), step, _HYPERPARAMETERS)
    run_directories.unlock(choice.directory)
    return os.path.relpath(choice.directory, root), choice.begins_anew, choice


def _latest(root, step):
    return run_directories.latest(str(root), step, _HYPERPARAMETERS)


_LOCKS = """
import sys
sys.path[:0] = {path!r}
from keras_fisher._tensorboard import run_directories
print(run_directories.lock({directory!r}), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _locked(directory):
    """Has another process lock a directory, and kills it."""
    code = _LOCKS.format(path=sys.path, directory=str(directory))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "True\n"
        yield
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_starts_where_there_is_none(tmp_path):
    assert _choose(tmp_path / "new")[:2] == (".", False)
    assert _choose(tmp_path, step=3)[:2] == (".", False)
    assert os.listdir(tmp_path / "new") == [], "no lock stays"


@pytest.mark.parametrize(
    "run, expected",
    [
        ({}, (".", True)),
        ({"ends": True}, ("run_2", False)),
        (
            {"hyperparameters": _HYPERPARAMETERS | {"alpha": 0.2}},
            ("run_2", False),
        ),
        ({"hyperparameters": {"alpha": 0.1}}, ("run_2", False)),
    ],
)
def test_a_run_starts_over_what_it_has_begun(run, expected, tmp_path):
    _run(tmp_path, **run)
    *found, choice = _choose(tmp_path)
    assert tuple(found) == expected
    says = "takes its place" if expected[1] else "holds a run already"
    assert says in choice.warning


def test_a_resumed_run_goes_on_in_the_latest(tmp_path):
    _run(tmp_path, ends=True)
    _run(tmp_path / "run_2")
    assert _choose(tmp_path, step=3)[:2] == ("run_2", False)
    assert _latest(tmp_path, 3) == str(tmp_path / "run_2")
    assert _latest(tmp_path, 0) == str(tmp_path)


@pytest.mark.parametrize("ends", [False, True])
def test_a_resumed_run_goes_on_in_its_own_directory(ends, tmp_path):
    other = _HYPERPARAMETERS | {"alpha": 0.2}
    _run(tmp_path, other, ends=ends)
    _run(tmp_path / "run_2", ends=ends)
    _run(tmp_path / "run_3", other, ends=ends)
    assert _choose(tmp_path, step=3)[:2] == ("run_2", False)
    assert _latest(tmp_path, 3) == str(tmp_path / "run_2")


_MOVED = _HYPERPARAMETERS | {"alpha": 0.2}
_OTHER = _HYPERPARAMETERS | {"model": "another"}


@pytest.mark.parametrize(
    "runs, expected",
    [
        # What has moved since it began does not make it another run.
        ([(_MOVED, 3, False), (_OTHER, 3, False)], "."),
        # Of two that were killed, it is the one that was near.
        ([(_MOVED, 3, False), (_MOVED, 9, False)], "."),
        ([(_MOVED, 9, False), (_MOVED, 3, False)], "run_2"),
        ([(_MOVED, 3, False), (_HYPERPARAMETERS, 9, True)], "."),
        # One that has ended after more steps loses points to none but itself.
        ([(_OTHER, 9, True)], "run_2"),
        ([(_OTHER, 9, True), (_OTHER, 2, True)], "run_2"),
        ([(_HYPERPARAMETERS, 9, True)], "."),
        ([(_OTHER, 9, False)], "."),
    ],
)
def test_a_resumed_run_finds_where_it_was(runs, expected, tmp_path):
    for number, (hyperparameters, last, ends) in enumerate(runs, 1):
        directory = tmp_path if number == 1 else tmp_path / f"run_{number}"
        _run(directory, hyperparameters, ends=ends, last=last)
    assert _choose(tmp_path, step=4)[:2] == (expected, False)


def test_a_run_that_measures_nothing_is_not_written_over(tmp_path):
    start = summaries.session_start({**_HYPERPARAMETERS, "alpha": 0.2}, "")
    _write(tmp_path, tags.HPARAMS, start)
    assert _choose(tmp_path)[:2] == ("run_2", False)


@pytest.mark.slow
def test_what_another_process_writes_is_not_taken(tmp_path):
    with _locked(tmp_path):
        assert not run_directories.lock(str(tmp_path))
        *found, choice = _choose(tmp_path)
        assert found == ["run_2", False]
        assert "another process" in choice.warning
        _run(tmp_path)
        _run(tmp_path / "run_2", ends=True)
        assert _choose(tmp_path)[0] == "run_3"
    # Killed.
    assert _choose(tmp_path)[:2] == (".", True)
    with _locked(tmp_path / "run_2"):
        assert _choose(tmp_path, step=3)[0] == "."


def test_a_lock_taken_away_meanwhile_is_taken_again(tmp_path, monkeypatch):
    is_there = iter([False, True])
    monkeypatch.setattr(
        run_directories, "_is_there", lambda path, file: next(is_there)
    )
    assert run_directories.lock(str(tmp_path))
    assert next(is_there, None) is None
    run_directories.unlock(str(tmp_path))


def test_where_nothing_can_be_locked_nobody_is_told_apart(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert run_directories.lock(str(tmp_path / "file"))
    assert run_directories.lock("gs://bucket/logs")
    assert not os.path.exists("gs:")
