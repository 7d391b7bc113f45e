"""Batches to measure on: from arrays, a batch, or a data set."""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks

# Shorter work shows no progress bar.
_SECONDS_WITHOUT_BAR = 2.0


def size_of(x: Any) -> int:
    """Number of examples in a batch."""
    return int(keras.tree.flatten(x)[0].shape[0])


def rows(structure: Any, begin: int, end: int) -> Any:
    """Some of the examples of tensors; None stays."""
    return keras.tree.map_structure(
        lambda t: None if t is None else t[begin:end], structure
    )


class Batches:
    """Batches `(x, y, sample_weight)` of tensors, with a progress bar.

    Args:
        x: Inputs with the examples as first axis of each, or a batched
            `tf.data.Dataset`, which each iteration reads once.
        y: Labels, or None.
        batch_size: Examples in a batch of arrays; None for all.
        verbose: 0 for no progress bar, 1 for one, `"auto"` for one that
            appears if the work takes longer than two seconds.

    Attributes:
        first: The first batch.

    Raises:
        ValueError: If there is no example, if arrays differ in their number,
            or if arguments do not go together.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
    ):
        checks.choice("verbose", verbose, (0, 1, "auto"))
        if batch_size is not None:
            batch_size = checks.integer("batch_size", batch_size, 1)
        self._verbose = verbose
        self._arrays = None
        if isinstance(x, tf.data.Dataset):
            if y is not None or batch_size is not None:
                raise ValueError(
                    "A data set brings its own labels and batches. Received "
                    "`y` or `batch_size` beside it. Leave them out, and "
                    "`batch()` the data set."
                )
            self._dataset = x
            count = int(x.cardinality())
            self._count = count if count >= 0 else None
        else:
            self._arrays = _tensors((x, y))
            self._examples = _common_size(self._arrays)
            self._batch_size = batch_size or max(1, self._examples)
            self._count = -(-self._examples // self._batch_size)
        self._read = self._batches()
        self.first = next(self._read, None)
        if self.first is None:
            raise ValueError("There is no example to measure on.")

    def _batches(self) -> Iterator[tuple]:
        if self._arrays is None:
            for element in self._dataset:
                x, y, weight = keras.utils.unpack_x_y_sample_weight(element)
                _check_batched(x)
                yield x, y, weight
            return
        for begin in range(0, self._examples, self._batch_size):
            x, y = rows(self._arrays, begin, begin + self._batch_size)
            yield x, y, None

    def __iter__(self) -> Iterator[tuple]:
        read = self._read
        # The first iteration goes on from the batch that was looked at.
        if read is None:
            batches = self._batches()
        else:
            batches = itertools.chain([self.first], read)
        self._read = None
        return self._with_progress(batches)

    def _with_progress(self, batches: Iterator[tuple]) -> Iterator[tuple]:
        if self._verbose == 0:
            yield from batches
            return
        begin = time.monotonic()
        bar = None
        for done, batch in enumerate(batches, start=1):
            yield batch
            late = time.monotonic() - begin > _SECONDS_WITHOUT_BAR
            wanted = self._verbose == 1 or (late and done != self._count)
            if bar is None and wanted:
                bar = keras.utils.Progbar(self._count, unit_name="batch")
            if bar is not None:
                bar.update(done, finalize=done == self._count)
        if bar is not None and self._count is None:
            bar.update(done, finalize=True)


def _tensors(structure: Any) -> Any:
    def tensor(a):
        return a if tf.is_tensor(a) else tf.convert_to_tensor(np.asarray(a))

    return keras.tree.map_structure(
        lambda a: None if a is None else tensor(a), structure
    )


def _common_size(arrays: Any) -> int:
    leaves = [a for a in keras.tree.flatten(arrays) if a is not None]
    if any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError(
            "Inputs and labels have the examples as their first axis. "
            "Received a scalar."
        )
    sizes = {int(leaf.shape[0]) for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            "All inputs and labels must be of the same number of examples. "
            f"Received arrays of the shapes {[tuple(a.shape) for a in leaves]}."
        )
    return sizes.pop()


def _check_batched(x: Any) -> None:
    if keras.tree.flatten(x)[0].shape.rank == 0:
        raise ValueError(
            "The data set must be batched: its first axis runs over examples. "
            "Received scalars. Call `dataset.batch(...)`."
        )
