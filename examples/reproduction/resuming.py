"""Backups within a run, so that a kill costs minutes of it and not hours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time

import common

import keras_fisher

_SECONDS_BETWEEN_BACKUPS = 60.0


class Backup(keras_fisher.callbacks.BackupAndRestore):
    """Goes on with a run from the last backup, as if it had not stopped.

    One is made at the end of an epoch, if the last is a minute old. With it
    goes what was measured until then, which is never behind the weights. Mixup
    alone begins its draws anew.

    Args:
        directory: Of its own for the run. It is to be deleted with `delete`
            when the result of the run is safe.
        rows: What is measured at the ends of epochs: a list with a dictionary
            for each.
        early: Measures TrF_i, or None.
        begin: When this process began with the run, by `time.perf_counter`.
    """

    def __init__(
        self,
        directory: str,
        rows: list[dict],
        early: keras_fisher.callbacks.EarlyPhase | None,
        begin: float,
    ):
        super().__init__(directory, delete_checkpoint=False)
        self._rows, self._early = rows, early
        self._measured = os.path.join(directory, "measured.json")
        self._seconds_before, self._begin = 0.0, begin
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """That the run has taken, of all processes that were at it."""
        return self._seconds_before + time.perf_counter() - self._begin

    def on_train_begin(self, logs=None):
        is_new = not os.path.exists(self._measured)
        if is_new:  # or what a deletion has left
            delete(self.backup_dir)
        super().on_train_begin(logs)
        if is_new:
            return
        with open(self._measured, encoding="utf-8") as file:
            measured = json.load(file)
        self._rows[:] = measured["rows"]
        self._seconds_before = measured["seconds"]
        if self._early is not None:
            self._early.restore(**measured["early"])

    def on_epoch_begin(self, epoch, logs=None):
        # A process that died between the two writes was ahead here.
        del self._rows[epoch:]

    def on_epoch_end(self, epoch, logs=None):
        if time.monotonic() - self._last < _SECONDS_BETWEEN_BACKUPS:
            return
        with (
            common.replacing(self._measured) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            json.dump(self._so_far(), file)
        super().on_epoch_end(epoch, logs)
        self._last = time.monotonic()

    def _so_far(self) -> dict:
        measured = {"rows": self._rows, "seconds": self.seconds}
        if (early := self._early) is not None:
            is_known = early.early_step is not None
            measured["early"] = {
                "steps": early.steps,
                "traces": early.traces,
                "early": [early.early_step, early.early_trace]
                if is_known
                else None,
            }
        return measured


def delete(directory: str) -> None:
    """Deletes all backups of a run; what is half deleted is none."""
    obsolete = f"{directory}-obsolete"
    shutil.rmtree(obsolete, ignore_errors=True)
    with contextlib.suppress(OSError):  # There may be none, or another at it.
        os.rename(directory, obsolete)
    shutil.rmtree(obsolete, ignore_errors=True)
