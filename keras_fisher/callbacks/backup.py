"""Keras's backup of a run, so that a kill at any moment leaves one."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hashlib
import io
import json
import os
import re
from typing import Any
import warnings

import keras
import tensorflow as tf

from keras_fisher._common import files
from keras_fisher._training import replicas

_BACKUP = re.compile(r"epoch-(\d+)/?")
_CHECKSUMS = "checksums.json"
_CHUNK = 1 << 24  # bytes


class BackupAndRestore(keras.callbacks.Callback):
    """Goes on with a run that was interrupted, from its last whole epoch.

    Does what `keras.callbacks.BackupAndRestore` does at the ends of epochs,
    and in a way that a process may be killed at any moment. Keras's own
    overwrites its only file in place, which a kill leaves torn, and writes the
    number of the epoch after it, so that a kill in between repeats an epoch.
    Here a backup is written beside the last one and takes its place when it is
    complete.

    Every file of a backup has a checksum. One that has lost a file, or whose
    bytes have changed, is not used: the one before it is, with a warning. So
    two are kept, which takes room for two on the disk, and for one in memory
    while it is written.

    With several workers the chief writes, and all read what it has written:
    `backup_dir` has to be a directory that they share.

    Put it behind the callbacks that write curves, so that no backup is ahead
    of them. For backups within long passes over the data, make epochs shorter
    (`steps_per_epoch`).

    Args:
        backup_dir: Directory of its own for the run.
        delete_checkpoint: Whether backups are deleted when training ends. A
            process that is killed after that begins anew.

    Raises:
        ValueError: When training starts, if the model is not built, or if
            `backup_dir` cannot be written, or holds backups and all of them
            are damaged.
        OSError: If a backup cannot be written, as where the disk is full. The
            one before it stays.

    Example:
    ```python
    backup = keras_fisher.callbacks.BackupAndRestore("backup")
    model.fit(dataset, epochs=20, callbacks=[backup])
    ```
    """

    def __init__(self, backup_dir: str, *, delete_checkpoint: bool = True):
        super().__init__()
        if not backup_dir:
            raise ValueError(
                "`backup_dir` is the directory to write backups into. "
                f"Received: backup_dir={backup_dir!r}"
            )
        self.backup_dir: str = str(backup_dir)
        self.delete_checkpoint = delete_checkpoint

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self.model.built:  # Only after a kill Keras would say so.
            raise ValueError(
                "A backup is restored before the first step, into variables "
                f"that have to be there. Received: {self.model.name!r}, which "
                "is not built. Before `fit`, call it on a batch of inputs, or "
                "its `build` with their shape."
            )
        strategy = self.model.distribute_strategy
        if replicas.writes(strategy):
            files.check_writable("backup_dir", self.backup_dir)
        last = self._last_intact()
        mean = replicas.mean(strategy, last)
        if mean != last:
            raise ValueError(
                "`backup_dir` must be a directory that all workers share. "
                f"Received: backup_dir={self.backup_dir!r}, where this worker "
                f"finds a backup of {last} epochs, and the workers find one "
                f"of {mean:g} on average."
            )
        if last:
            self._keras(self._path(last), self.model).on_train_begin()

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        # Keras begins the next `fit` there, too, if this one is interrupted.
        self.model._initial_epoch = None

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        # Before it is asked who writes: saving may need all workers, to read
        # a variable, say.
        content = _saved(self.model)
        if replicas.writes(self.model.distribute_strategy):
            self._write(content, epoch)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        writes = replicas.writes(self.model.distribute_strategy)
        if self.delete_checkpoint and writes:
            for number in self._epochs():
                self._delete(number)

    # Writing.

    def _write(self, content: bytes, epoch: int) -> None:
        number, old = epoch + 1, self._epochs()
        try:
            _remove(self._aside)
            writer = self._keras(self._aside, _Written(content))
            writer.on_epoch_end(epoch)
            _write_checksums(self._aside)
            if number in old:  # and damaged
                self._delete(number)
            tf.io.gfile.rename(self._aside, self._path(number))
        except files.ERRORS as error:
            with contextlib.suppress(*files.ERRORS):
                _remove(self._aside)
            raise OSError(
                f"The backup of {number} epochs, {len(content) / 1e6:.3g} MB, "
                f"cannot be written into {self.backup_dir!r}: {error}. Make "
                "room, or whatever else is missing, and start the same run "
                "again: it goes on from the last whole backup, of "
                f"{max(old, default=0)} epochs."
            ) from error
        before = [n for n in old if n < number][-1:]
        for other in {*old} - {number, *before}:
            self._delete(other)

    def _delete(self, number: int) -> None:
        # Under another name first: what is half deleted is no backup.
        _remove(self._obsolete)
        tf.io.gfile.rename(self._path(number), self._obsolete)
        _remove(self._obsolete)

    # Reading.

    def _last_intact(self) -> int:
        """Number of epochs of the backup to go on from; 0 if there is none."""
        damaged = []
        for number in reversed(self._epochs()):
            faults = _faults(self._path(number))
            if not faults:
                for message in damaged:
                    warnings.warn(
                        f"{message} The one of {number} epochs is taken.",
                        stacklevel=2,
                    )
                return number
            damaged.append(
                f"The backup {self._path(number)} is damaged and not used: "
                f"{', '.join(faults)}."
            )
        if damaged:
            raise ValueError(
                "No backup in `backup_dir` is intact. Received: backup_dir="
                f"{self.backup_dir!r}. {' '.join(damaged)} Put the files back "
                "if you have copies, or delete the directory to begin anew."
            )
        return 0

    # Where what is.

    def _keras(self, directory: str, model) -> keras.callbacks.Callback:
        """Keras's callback, which reads and writes one backup."""
        backup = keras.callbacks.BackupAndRestore(directory)
        backup.set_model(model)
        return backup

    @property
    def _aside(self) -> str:
        """Where a backup is that is not yet complete."""
        return os.path.join(self.backup_dir, "incomplete")

    @property
    def _obsolete(self) -> str:
        """Where one is that is being deleted."""
        return os.path.join(self.backup_dir, "obsolete")

    def _path(self, epochs: int) -> str:
        return os.path.join(self.backup_dir, f"epoch-{epochs}")

    def _epochs(self) -> list[int]:
        """Numbers of epochs that there are backups of, rising."""
        if not tf.io.gfile.isdir(self.backup_dir):
            return []
        found = map(_BACKUP.fullmatch, tf.io.gfile.listdir(self.backup_dir))
        return sorted(int(match[1]) for match in found if match)


class _Memory(io.BytesIO):
    """A file in memory, with a name that Keras saves weights under.

    HDF5 does not stand an error of the disk: closing the file, it ends the
    process.
    """

    def __str__(self) -> str:
        return "memory.weights.h5"


def _saved(model: keras.Model) -> bytes:
    """What `save_weights` writes."""
    memory = _Memory()
    model.save_weights(memory)
    return memory.getvalue()


class _Written:
    """Stands for a model whose weights have been saved before."""

    def __init__(self, content: bytes):
        self._content = content

    def save_weights(self, filepath, overwrite=True) -> None:
        with tf.io.gfile.GFile(filepath, "wb") as file:
            file.write(self._content)


def _remove(directory: str) -> None:
    if tf.io.gfile.exists(directory):
        tf.io.gfile.rmtree(directory)


def _write_checksums(directory: str) -> None:
    checksums = {
        name: _checksum(os.path.join(directory, name))
        for name in tf.io.gfile.listdir(directory)
    }
    with tf.io.gfile.GFile(os.path.join(directory, _CHECKSUMS), "w") as file:
        file.write(json.dumps(checksums))


def _checksum(path: str) -> str:
    checksum = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
    return checksum.hexdigest()


def _faults(directory: str) -> list[str]:
    """What is wrong with a backup; empty if it is as it was written."""
    try:
        with tf.io.gfile.GFile(os.path.join(directory, _CHECKSUMS)) as file:
            checksums = json.loads(file.read())
        files_in_it = dict(checksums).items()
    except (*files.ERRORS, ValueError, TypeError):
        files_in_it = ()
    if not files_in_it:
        return [f"{_CHECKSUMS} is missing or damaged"]
    found = []
    for name, expected in files_in_it:
        try:
            if _checksum(os.path.join(directory, name)) != expected:
                found.append(f"{name} has changed")
        except files.ERRORS as error:
            found.append(f"{name} is missing or unreadable ({error})")
    return found
