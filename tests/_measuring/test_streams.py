"""What brings its own batches is read as often as asked, and not for ever."""

from __future__ import annotations

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher._measuring import streams


def _dataset(numbers):
    """Batches of one example, as many as nobody knows."""
    return tf.data.Dataset.from_generator(
        numbers, output_signature=tf.TensorSpec([], tf.float32)
    ).map(lambda number: (tf.reshape(number, (1, 1)), tf.zeros(1, tf.int64)))


def _network():
    return training.compiled(
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(3)])
    )


def test_arrays_are_none():
    for x in ([1.0], np.ones(3), {"a": np.ones(3)}, tf.ones(3), range(3)):
        assert streams.of(x) is None


@pytest.mark.parametrize(
    "make, count",
    [
        (lambda: tf.data.Dataset.range(3), 3),
        (lambda: tf.data.Dataset.range(3).filter(lambda x: True), None),
        (lambda: tf.data.Dataset.range(3).repeat(), 5),
        (lambda: iter(range(3)), 3),
        (itertools.count, 5),
    ],
)
def test_each_beginning_reads_the_same(make, count):
    for steps in (2, 5):
        stream = streams.of(make(), steps)
        first, second = [*stream.begin()], [*stream.begin()]
        assert first == second
        assert [int(x) for x in first[:2]] == [0, 1]
        assert len(first) == (2 if steps == 2 else count or 3)
        assert stream.count == (steps if count is None else len(first))


_MEASURES = pytest.mark.parametrize(
    "measure", [keras_fisher.fisher_trace, keras_fisher.hessian_trace]
)


@_MEASURES
def test_what_does_not_end_is_told_of(measure, monkeypatch):
    monkeypatch.setattr(streams, "_SUSPICIOUS", 20)
    dataset = _dataset(itertools.count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which ends what else would not
        with pytest.raises(UserWarning, match=r"20 batches.*`steps=`"):
            measure(_network(), dataset, verbose=0)
        measure(_network(), dataset, steps=25, verbose=0)


@_MEASURES
@pytest.mark.parametrize("verbose", [0, 1])
def test_what_ends_late_is_told_of_once_and_measured(
    measure, verbose, monkeypatch
):
    monkeypatch.setattr(streams, "_SUSPICIOUS", 20)
    model = _network()
    numbers = np.arange(25, dtype="float32")
    kwargs = {"seed": 1, "verbose": verbose}
    if measure is keras_fisher.hessian_trace:
        kwargs |= {"num_probes": 20, "tolerance": None}  # of three passes
    with pytest.warns(UserWarning, match="20 batches") as told:
        found = measure(model, _dataset(lambda: iter(numbers)), **kwargs)
    assert [warning.filename for warning in told] == [__file__]
    labels = np.zeros(25, "int64")
    expected = measure(model, numbers[:, None], labels, batch_size=1, **kwargs)
    assert found == pytest.approx(expected, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(model, _dataset(lambda: range(20)), **kwargs)
