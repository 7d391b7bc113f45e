"""Traces of what `fit` takes are those of the same data as arrays."""

from __future__ import annotations

import itertools

import cases
import keras
from keras import layers
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
import tensorflow as tf
import training

import keras_fisher
from keras_fisher._measuring import streams

_X = np.maximum(np.random.default_rng(0).normal(size=(24, 5)), 0)
_X = _X.astype("float32")
_Y = np.arange(24) % 3
_DATA = tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(8)
_LISTS = tf.RaggedTensor.from_row_lengths(
    np.arange(36) % 7, [1, 2] * 12, validate=False
)


class Stored(keras.utils.PyDataset):
    def __init__(self, is_endless=False):
        super().__init__()
        self._is_endless = is_endless

    @property
    def num_batches(self):
        return None if self._is_endless else 3

    def __getitem__(self, i):
        part = slice(8 * (i % 3), 8 * (i % 3) + 8)
        return _X[part], _Y[part]


def _endless():
    return (Stored()[i] for i in itertools.count())


def _empty():
    return tf.data.Dataset.from_tensors((_X[:0], _Y[:0]))


def _network(is_sparse=False):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,), sparse=is_sparse)
    hidden = layers.Dense(4, activation="tanh")(inputs)
    return _compiled(keras.Model(inputs, layers.Dense(3)(hidden)))


def _compiled(model):
    return training.compiled(model, metrics=None, jit_compile=False)


def _measures(model, *data, **kwargs):
    kwargs |= {"seed": 1, "verbose": 0}
    return [
        keras_fisher.fisher_trace(model, *data, **kwargs),
        keras_fisher.fisher_trace(model, *data, estimator="batch", **kwargs),
        keras_fisher.hessian_trace(model, *data, num_probes=9, **kwargs),
    ]


_FORMS = {
    "pandas": lambda: ((pd.DataFrame(_X), pd.Series(_Y)), {"batch_size": 8}),
    "reindexed": lambda: (
        (
            pd.DataFrame(_X, index=range(24, 0, -1)),
            pd.Series(_Y, index=range(24, 0, -1)),
        ),
        {"batch_size": 8},
    ),
    "dataset": lambda: ((_DATA,), {}),
    "stored": lambda: ((Stored(),), {}),
    "endless_stored": lambda: ((Stored(True),), {"steps": 3}),
    "generator": lambda: ((_endless(),), {"steps": 3}),
    "endless_dataset": lambda: ((_DATA.repeat(),), {"steps": 3}),
    "with_empty": lambda: ((_DATA.concatenate(_empty()),), {}),
    "empty_first": lambda: ((_empty().concatenate(_DATA),), {}),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", _FORMS)
def test_forms_of_dense_data(name):
    model = _network()
    expected = _measures(model, _X, _Y, batch_size=8)
    found = []
    for measure in range(3):
        data, kwargs = _FORMS[name]()  # A generator is used up.
        kwargs |= {"seed": 1, "verbose": 0}
        if measure < 2:
            estimator = ("monte_carlo", "batch")[measure]
            trace = keras_fisher.fisher_trace(
                model, *data, estimator=estimator, **kwargs
            )
        else:
            trace = keras_fisher.hessian_trace(
                model, *data, num_probes=9, **kwargs
            )
        found.append(trace)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("of", [tf.sparse.from_dense, sparse.csr_matrix])
def test_sparse_inputs(of):
    model = _network(is_sparse=True)
    expected = _measures(_network(), _X, _Y, batch_size=8)
    found = _measures(model, of(_X), _Y, batch_size=8)
    assert found == pytest.approx(expected, rel=1e-5)
    exact = [
        keras_fisher.fisher_trace(net, x, estimator="exact")
        for net, x in ((model, of(_X)), (_network(), _X))
    ]
    assert exact[0] == pytest.approx(exact[1], rel=1e-5)


def test_fewer_batches_than_there_are():
    model = _network()
    expected = _measures(model, _X[:16], _Y[:16], batch_size=8)
    assert _measures(model, _DATA, steps=2) == pytest.approx(expected, 1e-5)
    assert _measures(model, _X, _Y, batch_size=8, steps=2) == pytest.approx(
        expected, 1e-5
    )


# What is not TensorFlow's.


def _torch_loader():
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    tensors = torch.from_numpy(_X), torch.from_numpy(_Y)
    return data.DataLoader(data.TensorDataset(*tensors), batch_size=8)


def _torch_stream():
    """As `_torch_loader`, of examples that nobody has counted."""
    data = pytest.importorskip("torch.utils.data")

    class Examples(data.IterableDataset):
        def __iter__(self):
            return zip(_X, _Y, strict=True)

    return data.DataLoader(Examples(), batch_size=8)


def _grain_map():
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source([*zip(_X, _Y, strict=True)]).batch(8)


def _grain_loader():
    grain = pytest.importorskip("grain")
    return grain.DataLoader(
        data_source=[*zip(_X, _Y, strict=True)],
        operations=[grain.transforms.Batch(8)],
        sampler=grain.samplers.IndexSampler(
            len(_X),
            shard_options=grain.sharding.NoSharding(),
            num_epochs=1,
        ),
    )


_LOADERS = {
    "torch": (_torch_loader, 3),
    "torch_iterable": (_torch_stream, None),
    "grain_map": (_grain_map, None),
    "grain_iter": (lambda: _grain_map().to_iter_dataset(), None),
    "grain_loader": (_grain_loader, None),
}


@pytest.mark.parametrize("name", _LOADERS)
def test_loaders_of_pytorch_and_grain(name):
    make, count = _LOADERS[name]
    model, loader = _network(), make()
    expected = _measures(model, _X, _Y, batch_size=8)
    assert _measures(model, loader) == pytest.approx(expected, rel=1e-5)
    expected = _measures(model, _X[:16], _Y[:16], batch_size=8)
    assert _measures(model, loader, steps=2) == pytest.approx(expected, 1e-5)
    assert streams.of(loader).count == count
    with pytest.raises(ValueError, match="brings its own labels"):
        keras_fisher.fisher_trace(model, loader, _Y)


@pytest.mark.parametrize("name", _LOADERS)
def test_training_takes_them_as_those_of_tensorflow(name):
    make, _ = _LOADERS[name]
    found = []
    for data in (make(), _DATA):
        model = keras_fisher.FisherModel(_network(), 0.3, seed=0)
        training.compiled(model, metrics=None, jit_compile=False)
        logs = model.fit(data, shuffle=False, epochs=2, verbose=0).history
        assert int(model.optimizer.iterations) == 6
        found.append([*training.weights(model), logs["fisher_trace"]])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    model = _network()
    kwargs = dict(estimator="empirical", verbose=0)
    expected = keras_fisher.fisher_trace(model, _X, _Y, **kwargs)
    x, y = torch.from_numpy(_X).requires_grad_(), torch.from_numpy(_Y)
    found = keras_fisher.fisher_trace(model, x, y, **kwargs)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _grain_map().repeat(),
        lambda: _grain_map().repeat().filter(lambda batch: True),
    ],
)
def test_endless_ones_of_grain_need_steps(make):
    loader = make()
    with pytest.raises(ValueError, match="without `steps`"):
        keras_fisher.fisher_trace(_network(), loader)
    found = keras_fisher.fisher_trace(_network(), loader, steps=3, seed=1)
    expected = keras_fisher.fisher_trace(_network(), _DATA, seed=1)
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_grain_filters_out_is_not_measured():
    loader = _grain_map().filter(lambda batch: batch[0][0, 0] != _X[8, 0])
    left = np.r_[0:8, 16:24]
    model = _network()
    expected = _measures(model, _X[left], _Y[left], batch_size=8)
    assert _measures(model, loader) == pytest.approx(expected, rel=1e-5)


class Optional(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, x):
        given = x["a"] if x["b"] is None else x["a"] + x["b"]
        return self.out(given)


@cases.since_keras("3.13")  # The ones before trip over them themselves.
def test_optional_inputs_that_are_none():
    model = _compiled(Optional())
    model({"a": _X, "b": None})
    found = _measures(model, {"a": _X, "b": None}, _Y, batch_size=8)
    expected = _measures(
        model, {"a": _X, "b": np.zeros_like(_X)}, _Y, batch_size=8
    )
    assert found == pytest.approx(expected, rel=1e-5)
    exact = [
        keras_fisher.fisher_trace(model, {"a": _X, "b": b}, estimator="exact")
        for b in (None, np.zeros_like(_X))
    ]
    assert exact[0] == pytest.approx(exact[1], rel=1e-5)


class Bag(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 4)
        self.out = layers.Dense(3)

    def call(self, x):
        if isinstance(x, tf.RaggedTensor):
            x = x.to_tensor()
        return self.out(tf.reduce_sum(self.embedding(x), axis=1))


def test_ragged_inputs():
    model = _compiled(Bag())
    model(_LISTS)
    # In one batch, whose rows are padded alike.
    dense = _LISTS.to_tensor()
    kwargs = dict(seed=1, estimator="batch")
    assert keras_fisher.fisher_trace(model, _LISTS, **kwargs) == pytest.approx(
        keras_fisher.fisher_trace(model, dense, **kwargs), rel=1e-5
    )
    kwargs = dict(seed=1, num_probes=8)
    assert keras_fisher.hessian_trace(
        model, _LISTS, _Y, **kwargs
    ) == pytest.approx(
        keras_fisher.hessian_trace(model, dense, _Y, **kwargs), rel=1e-5
    )
    # Which it pads to the length of others, so that these matter.
    with pytest.raises(ValueError, match=r'other examples.*estimator="batch"'):
        keras_fisher.fisher_trace(model, _LISTS)


@pytest.mark.parametrize(
    "make", [lambda: _DATA.repeat(), _endless, lambda: Stored(True)]
)
def test_what_has_no_end_needs_steps(make):
    for measure in (keras_fisher.fisher_trace, keras_fisher.hessian_trace):
        with pytest.raises(ValueError, match="without `steps`"):
            measure(_network(), make())


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="Received: object"):
        keras_fisher.fisher_trace(_network(), object())
    with pytest.raises(ValueError, match="`steps` must be"):
        keras_fisher.fisher_trace(_network(), _X, steps=0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("eager", [False, True])
def test_a_fraction_of_sparse_inputs_trains_as_one_of_dense_ones(
    fraction, eager
):
    found = []
    for is_sparse in (False, True):
        penalty = keras_fisher.FisherPenalty(0.3, fraction=fraction)
        model = keras_fisher.FisherModel(_network(is_sparse), penalty, seed=0)
        training.compiled(
            model, metrics=None, run_eagerly=eager, jit_compile=False
        )
        x = tf.sparse.from_dense(_X) if is_sparse else _X
        model.fit(x, _Y, batch_size=8, shuffle=False, verbose=0)
        found.append(training.weights(model))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
