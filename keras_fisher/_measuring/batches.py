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
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import preprocessing
from keras_fisher._measuring import streams

# Shorter work shows no progress bar.
_SECONDS_WITHOUT_BAR = 2.0


def size_of(x: Any) -> int:
    """Number of examples in a batch."""
    return int(examples_lib.number(x))


# Some of the examples of tensors; None stays.
rows = examples_lib.rows


class Batches:
    """Batches `(x, y, sample_weight)` of tensors, with a progress bar.

    Args:
        x: Inputs with the examples as first axis of each; or batches, as
            `streams.of` takes them, which each iteration reads once.
        y: Labels, or None.
        batch_size: Examples in a batch of arrays; None for all.
        steps: Batches to read; None for all.
        verbose: 0 for no progress bar, 1 for one, `"auto"` for one that
            appears if the work takes longer than two seconds.
        model: What is measured. If it preprocesses its data, these are raw.

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
        steps: int | None = None,
        verbose: str | int = "auto",
        model: Any = None,
    ):
        checks.choice("verbose", verbose, (0, 1, "auto"))
        if batch_size is not None:
            batch_size = checks.integer("batch_size", batch_size, 1)
        if steps is not None:
            steps = checks.integer("steps", steps, 1)
        self._verbose = verbose
        self._preprocess = preprocessing.of_model(model)
        stream = streams.of(x, steps)
        if stream is None:
            stream = _cut((x, y), batch_size, steps)
        elif y is not None or batch_size is not None:
            raise ValueError(
                "A data set brings its own labels and batches. Received "
                "`y` or `batch_size` beside it. Leave them out, and "
                "`batch()` the data set."
            )
        self._source, self._count = stream
        self._read = self._batches()
        self.first = next(self._read, None)
        if self.first is None:
            raise ValueError(
                "There is no example to measure on. Received: x of type "
                f"{type(x).__name__} without any. Give one at least."
            )

    def _batches(self) -> Iterator[tuple]:
        for element in self._source():
            element = keras.utils.unpack_x_y_sample_weight(element)
            if self._preprocess is not None:
                element = keras.utils.unpack_x_y_sample_weight(
                    self._preprocess(*_tensors(element))
                )
            x, y, weight = _tensors(element)
            _check_batched(x)
            if size_of(x):  # Nobody can be measured in an empty one.
                yield x, y, weight

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
        if bar is not None and done != self._count:
            bar.update(done, finalize=True)


def _cut(
    arrays: Any, batch_size: int | None, steps: int | None
) -> streams.Stream:
    """The first batches of arrays."""
    arrays = _tensors(arrays)
    examples = _common_size(arrays)
    size = batch_size or max(1, examples)
    count = -(-examples // size)
    if steps is not None:
        count = min(steps, count)

    def begin():
        for first in range(0, count * size, size):
            if first == 0 and size >= examples:
                yield arrays
            else:
                yield rows(arrays, first, min(first + size, examples))

    return streams.Stream(begin, count)


def _tensors(structure: Any) -> Any:
    return examples_lib.apply(_tensor, structure)


def _tensor(a: Any) -> Any:
    if tf.is_tensor(a):
        return a
    if hasattr(a, "tocoo"):  # One of SciPy's sparse arrays.
        a = a.tocoo()
        indices = np.stack([a.row, a.col], axis=1).astype("int64")
        return tf.sparse.reorder(tf.SparseTensor(indices, a.data, a.shape))
    if hasattr(a, "detach"):  # One of PyTorch's tensors.
        a = a.detach().cpu()
    try:
        return tf.convert_to_tensor(np.asarray(a))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Data are arrays, tensors, data frames, or lists or dicts of them; "
            "a `tf.data.Dataset`, a `keras.utils.PyDataset`, a loader of "
            "PyTorch or Grain, or a generator of batches. Received: "
            f"{type(a).__name__}."
        ) from error


def _common_size(arrays: Any) -> int:
    leaves = examples_lib.tensors(arrays)
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
    if examples_lib.tensors(x)[0].shape.rank == 0:
        raise ValueError(
            "The data set must be batched: its first axis runs over examples. "
            "Received scalars. Call `dataset.batch(...)`."
        )
