"""Keras's TensorBoard callback, with Tr(F) at the step it was measured."""

from __future__ import annotations

import os

import keras
import numpy as np
import tensorflow as tf


class FisherTensorBoard(keras.callbacks.TensorBoard):
    """Writes what `keras.callbacks.TensorBoard` does, and Tr(F) beside it.

    For a `FisherModel`. Every measured step is written, whatever
    `update_freq` and `steps_per_execution` are, at its optimizer step (the
    number of updates before it): `fisher/trace`, and with a penalty
    `fisher/penalty`, next to Keras's own training summaries.

    Args:
        log_dir: Directory of the run.
        **kwargs: Other arguments of `keras.callbacks.TensorBoard`.
    """

    def __init__(self, log_dir: str = "logs", **kwargs):
        super().__init__(log_dir=log_dir, **kwargs)
        self._directory = os.path.join(str(log_dir), "train")
        self._writer = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._writer = tf.summary.create_file_writer(
            self._directory, filename_suffix=".fisher"
        )

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        measured = self.model.measurements
        with self._writer.as_default():
            for step, traces, penalty in zip(*measured):
                values = {"trace": traces.sum(), "penalty": penalty}
                for name, value in values.items():
                    if not np.isnan(value):
                        tf.summary.scalar(f"fisher/{name}", value, step)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._writer.flush()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._writer.close()
