"""Keras's backup of a run, so that a kill at any moment leaves one."""

from __future__ import annotations

import os
import re
import tempfile

import keras
import tensorflow as tf

from keras_fisher._training import replicas

_BACKUP = re.compile(r"epoch-(\d+)/?")


class BackupAndRestore(keras.callbacks.Callback):
    """Goes on with a run that was interrupted, from its last whole epoch.

    Does what `keras.callbacks.BackupAndRestore` does at the ends of epochs,
    and in a way that a process may be killed at any moment. Keras's own
    overwrites its only file in place, which a kill leaves torn, and writes the
    number of the epoch after it, so that a kill in between repeats an epoch.
    Here a backup is written beside the last one and takes its place when it is
    complete.

    With several workers the chief writes, and all read what it has written:
    `backup_dir` has to be a directory that they share.

    Put it behind the callbacks that write curves, so that no backup is ahead
    of them. For backups within long passes over the data, make epochs shorter
    (`steps_per_epoch`).

    Args:
        backup_dir: Directory of its own for the run.
        delete_checkpoint: Whether the backup is deleted when training ends. A
            process that is killed after that begins anew.

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
        self.backup_dir = str(backup_dir)
        self.delete_checkpoint = delete_checkpoint

    def on_train_begin(self, logs=None):
        last = max(self._epochs(), default=0)
        mean = replicas.mean(self.model.distribute_strategy, last)
        if mean != last:
            raise ValueError(
                "`backup_dir` must be a directory that all workers share. "
                f"Received: backup_dir={self.backup_dir!r}, where this worker "
                f"finds a backup of {last} epochs, and the workers find one "
                f"of {mean:g} on average."
            )
        if last:
            self._keras(self._path(last)).on_train_begin()

    def on_epoch_end(self, epoch, logs=None):
        if not replicas.writes(self.model.distribute_strategy):
            # Saving may need all workers: to read a variable, say.
            with tempfile.TemporaryDirectory() as unused:
                self._keras(unused).on_epoch_end(epoch)
            return
        old = self._epochs()
        self._keras(self._aside).on_epoch_end(epoch)
        tf.io.gfile.rename(self._aside, self._path(epoch + 1))
        self._delete(old)

    def on_train_end(self, logs=None):
        writes = replicas.writes(self.model.distribute_strategy)
        if self.delete_checkpoint and writes:
            self._delete(self._epochs())

    def _keras(self, directory: str) -> keras.callbacks.BackupAndRestore:
        """Keras's callback, which reads and writes one backup."""
        backup = keras.callbacks.BackupAndRestore(directory)
        backup.set_model(self.model)
        return backup

    @property
    def _aside(self) -> str:
        """Where a backup is that is no longer, or not yet, complete."""
        return os.path.join(self.backup_dir, "incomplete")

    def _path(self, epochs: int) -> str:
        return os.path.join(self.backup_dir, f"epoch-{epochs}")

    def _epochs(self) -> list[int]:
        """Numbers of epochs that there are backups of, rising."""
        if not tf.io.gfile.isdir(self.backup_dir):
            return []
        found = map(_BACKUP.fullmatch, tf.io.gfile.listdir(self.backup_dir))
        return sorted(int(match[1]) for match in found if match)

    def _delete(self, epochs: list[int]) -> None:
        for number in epochs:
            if tf.io.gfile.exists(self._aside):
                tf.io.gfile.rmtree(self._aside)
            tf.io.gfile.rename(self._path(number), self._aside)
        if tf.io.gfile.exists(self._aside):
            tf.io.gfile.rmtree(self._aside)
