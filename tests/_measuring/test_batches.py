"""Batches come from arrays and data sets, once, in order, with a bar."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._measuring import batches as batches_lib
from keras_fisher._measuring.batches import Batches


def _contents(batches):
    return [x.numpy().tolist() for x, _, _ in batches]


def test_arrays_are_cut_in_order():
    batches = Batches(np.arange(5), np.arange(5) * 2, batch_size=2)
    assert _contents(batches) == [[0, 1], [2, 3], [4]]
    assert [y.numpy().tolist() for _, y, _ in batches] == [[0, 2], [4, 6], [8]]
    whole = Batches({"a": np.arange(5), "b": np.ones([5, 1])})
    assert batches_lib.size_of(whole.first[0]) == 5
    assert whole.first[1] is None


def test_data_sets_are_read_once_for_each_iteration():
    reads = []

    def generate():
        reads.append(None)
        yield from range(5)

    dataset = tf.data.Dataset.from_generator(
        generate, output_signature=tf.TensorSpec([], tf.int32)
    ).batch(2)
    batches = Batches(dataset, verbose=0)
    assert batches.first[0].numpy().tolist() == [0, 1]
    assert _contents(batches) == [[0, 1], [2, 3], [4]]
    assert len(reads) == 1
    assert _contents(batches) == [[0, 1], [2, 3], [4]]
    assert len(reads) == 2


def test_data_sets_bring_labels_and_weights():
    columns = (np.arange(3), np.arange(3) + 1, np.ones(3))
    for count in (1, 2, 3):
        dataset = tf.data.Dataset.from_tensor_slices(columns[:count]).batch(3)
        found = Batches(dataset).first
        assert [f is None for f in found] == [i >= count for i in range(3)]


def test_sparse_arrays_of_scipy_are_sparse_tensors():
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.float32([[0, 1, 2], [0, 0, 0], [3, 0, 4]])
    # Of the columns first, as SciPy keeps them.
    ((x, *_),) = Batches(sparse.csc_array(dense))
    assert isinstance(x, tf.SparseTensor)
    np.testing.assert_array_equal(tf.sparse.to_dense(x), dense)
    np.testing.assert_array_equal(x.indices, [[0, 1], [0, 2], [2, 0], [2, 2]])


class _OfPyTorch:
    """As its tensors are: to be copied from a device, and from their graph."""

    def __init__(self, array, state=()):
        self._array, self._state = array, state

    def detach(self):
        return _OfPyTorch(self._array, (*self._state, "detached"))

    def cpu(self):
        return _OfPyTorch(self._array, (*self._state, "on the host"))

    def __array__(self, dtype=None, copy=None):
        assert self._state == ("detached", "on the host")
        return self._array


def test_tensors_of_pytorch_are_copied_to_the_host():
    ((x, *_),) = Batches(_OfPyTorch(np.arange(3.0)))
    np.testing.assert_array_equal(x, np.arange(3.0))


@pytest.mark.parametrize("known", [True, False])
def test_a_bar_counts_batches(known, capsys):
    dataset = tf.data.Dataset.range(6).batch(2)
    if not known:
        dataset = dataset.filter(lambda x: True)
    assert len(_contents(Batches(dataset, verbose=1))) == 3
    assert ("3/3" if known else "3/Unknown") in capsys.readouterr().out
    _contents(Batches(dataset, verbose="auto"))
    assert capsys.readouterr().out == ""
    # Where there are fewer than were asked for, the bar ends as well.
    assert len(_contents(Batches(dataset, steps=5, verbose=1))) == 3
    assert capsys.readouterr().out.endswith("\n")


def test_long_work_shows_a_bar_by_itself(capsys, monkeypatch):
    monkeypatch.setattr(batches_lib, "_SECONDS_WITHOUT_BAR", 0.0)
    _contents(Batches(np.arange(6), batch_size=2))
    assert "3/3" in capsys.readouterr().out
    # A single batch has nothing to show.
    _contents(Batches(np.arange(6)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=np.zeros([0, 3])), "no example"),
        (dict(x=tf.data.Dataset.range(0).batch(2)), "no example"),
        (dict(x=np.zeros(3), y=np.zeros(4)), "same number of examples"),
        (dict(x=np.zeros(())), "a scalar"),
        (dict(x=tf.data.Dataset.range(3)), "must be batched"),
        (
            dict(x=tf.data.Dataset.range(3).batch(2), y=np.zeros(3)),
            "brings its own labels",
        ),
        (
            dict(x=tf.data.Dataset.range(3).batch(2), batch_size=2),
            "brings its own labels",
        ),
    ],
)
def test_bad_data(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(**arguments)
