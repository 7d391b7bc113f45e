"""Which directory a run is written to: one run and one process in each.

A process locks the directory that it writes a run into. The lock is the
operating system's, so that a killed process holds none.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import errno
import itertools
import os
from typing import Any
from typing import NamedTuple

import tensorflow as tf

from keras_fisher._tensorboard import event_files
from keras_fisher._tensorboard import hyperparameters as hyperparameters_lib
from keras_fisher._tensorboard import tags

try:
    import fcntl
except ImportError:  # not on Windows, where processes are not told apart
    fcntl = None

_held = {}  # the open file of each process and directory


class Choice(NamedTuple):
    """Where to write.

    Attributes:
        directory: The directory, locked.
        warning: What the user should know of it; None for nothing.
        begins_anew: Whether a run was begun there that this one repeats.
    """

    directory: str
    warning: str | None = None
    begins_anew: bool = False


def choose(root: str, step: int, hyperparameters: Mapping[str, Any]) -> Choice:
    """Chooses between a directory and `run_2`, `run_3`, ... inside of it.

    A run that is resumed goes on where one has its hyperparameters (the
    learning rate and α may have moved) and was left at about its step, or else
    in the latest, but for one that has ended after more steps. One that starts
    takes the first where there is none, or where one with the same
    hyperparameters has begun and not ended. None takes what another process is
    writing into.

    Args:
        root: The directory.
        step: Number of optimizer steps that the run has made.
        hyperparameters: Those of the run that are known, as written.
    """
    if step:
        for directory in _resumable(root, step, hyperparameters):
            if lock(directory):
                return Choice(directory, _elsewhere(root, directory))
    is_locked = False
    for directory in _candidates(root):
        if not lock(directory):
            is_locked = True
            continue
        if not _holds_run(directory):
            why = "is being written by another process" if is_locked else None
            return Choice(directory, _elsewhere(root, directory, why))
        if not step and _has_begun(directory, hyperparameters):
            return Choice(
                directory,
                f"A run with the same hyperparameters has begun in {directory} "
                "and not ended. This one begins at step 0 and takes its "
                "place; what was written is kept beside it, in files "
                "replaced-*, which TensorBoard does not read.",
                begins_anew=True,
            )
        unlock(directory)
    raise AssertionError("there is always another directory")


def latest(root: str, step: int, hyperparameters: Mapping[str, Any]) -> str:
    """What `choose` chooses for a resumed run; for those who only read."""
    if not step:
        return root
    return [*_resumable(root, step, hyperparameters), root][0]


def lock(directory: str) -> bool:
    """Locks a directory for this process; False if another has locked it.

    Where files cannot be locked, as in remote storage, nobody ever has.
    """
    key = _key(directory)
    if fcntl is None or "://" in directory or key in _held:
        return True
    try:
        os.makedirs(directory, exist_ok=True)
        file = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT)
    except OSError:
        return True  # which is said where curves are to be written
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    if not _is_there(_lock_file(directory), file):
        os.close(file)  # unlocked, and taken away, in between
        return lock(directory)
    _held[key] = file
    return True


def unlock(directory: str) -> None:
    """Lets other processes write into a directory."""
    file = _held.pop(_key(directory), None)
    if file is not None:
        with contextlib.suppress(OSError):
            os.remove(_lock_file(directory))
        os.close(file)


def _lock_file(directory: str) -> str:
    return os.path.join(directory, ".lock")


def _key(directory: str) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(directory)


def _is_there(path: str, file: int) -> bool:
    """Whether an open file still has the name that it was opened under."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _candidates(root: str) -> Iterator[str]:
    yield root
    for number in itertools.count(2):
        yield os.path.join(root, f"run_{number}")


def _runs(root: str) -> list[str]:
    """The directories that hold runs, in their order."""
    existing = itertools.takewhile(tf.io.gfile.isdir, _candidates(root))
    return [directory for directory in existing if _holds_run(directory)]


def _resumable(
    root: str, step: int, hyperparameters: Mapping[str, Any]
) -> list[str]:
    """The directories that a run may go on in, the likeliest first."""
    lasting = hyperparameters_lib.without_moving(hyperparameters)
    ranks = {}
    for directory in reversed(_runs(root)):
        last, written = _last_step(directory), _hyperparameters(directory)
        is_over = last > step and _has_ended(directory)
        is_alike = hyperparameters_lib.has(written, lasting)
        if is_alike or not is_over:
            ranks[directory] = (
                not is_alike,
                is_over,
                not hyperparameters_lib.has(written, hyperparameters),
                # Which killed processes were near, and not where none is alike.
                abs(last - step) if is_alike else 0,
            )
    return sorted(ranks, key=ranks.get)


def _last_step(directory: str) -> int:
    """The step of the last point of our curves; -1 without any."""
    points = event_files.scalars(os.path.join(directory, tags.TRAIN))
    steps = (p.step for p in points if tags.is_fisher(p.tag))
    return max(steps, default=-1)


def _elsewhere(root: str, directory: str, why: str | None = None) -> str | None:
    if directory == root:
        return None
    return (
        f"{root} {why or 'holds a run already'}, so this one is written to "
        f"{directory}. Give each run a directory of its own."
    )


def _holds_run(directory: str) -> bool:
    # A run that measures nothing tells of its hyperparameters all the same.
    if _hyperparameters(directory):
        return True
    return any(
        tags.is_fisher(point.tag)
        for point in event_files.scalars(os.path.join(directory, tags.TRAIN))
    )


def _has_begun(directory: str, hyperparameters: Mapping[str, Any]) -> bool:
    """Whether a run with these has begun in a directory, and not ended."""
    written = _hyperparameters(directory)
    return hyperparameters_lib.has(written, hyperparameters) and not _has_ended(
        directory
    )


def _has_ended(directory: str) -> bool:
    return event_files.has_ended(os.path.join(directory, tags.HPARAMS))


def _hyperparameters(directory: str) -> dict[str, float | str | bool]:
    return event_files.hyperparameters(os.path.join(directory, tags.HPARAMS))
