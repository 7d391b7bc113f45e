"""A look at the first real inputs, and at nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import likelihoods
from keras_fisher._derivatives import derivative_check
from keras_fisher._training import first_look
from keras_fisher._training.first_look import FirstLook

_OPTIONS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
_X = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
_Y = np.arange(16) % 3


class Standardized(layers.Layer):
    """By example; of one whose entries are equal it makes NaN."""

    def call(self, x):
        mean = tf.reduce_mean(x, -1, keepdims=True)
        return (x - mean) / tf.math.reduce_std(x, -1, keepdims=True)


class OfEight(layers.Layer):
    """Takes eight examples, no other number."""

    def call(self, x):
        return tf.reshape(x, [8, 5]) * 1.0


class Molecules(layers.Layer):
    """Mean over the atoms of each; the last of all is there."""

    def call(self, x, molecule):
        return tf.math.unsorted_segment_mean(x, molecule, 4) + 0 * x[-1]

    def compute_output_shape(self, x_shape, molecule_shape):
        return (4, x_shape[1])


def _words():
    x = keras.Input((1,), dtype="string")
    index = layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=0)(x)
    hidden = layers.Flatten()(layers.Embedding(2, 4)(index))
    return x, hidden, tf.constant([["a"], ["b"]] * 8)


def _standardized():
    x = keras.Input((5,))
    return x, Standardized()(x), _X


def _of_eight():
    x = keras.Input(batch_shape=(8, 5))
    return x, OfEight()(x), _X


def _network(case):
    inputs, hidden, x = case()
    outputs = layers.Dense(3, activation="softmax")(hidden)
    return keras.Model(inputs, outputs), x


def _fit(model, x, y=_Y, mode="graph", batch_size=8):
    model.compile("sgd", "sparse_categorical_crossentropy", **_OPTIONS[mode])
    return model.fit(x, y, batch_size=batch_size, verbose=0).history


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("case", [_standardized, _of_eight, _words])
@pytest.mark.impossible("XLA knows no strings", case=_words, mode="xla")
def test_nothing_is_fed_that_was_not_given(case, mode):
    network, x = _network(case)
    history = _fit(FisherModel(network, 0.1), x, mode=mode)
    assert history["fisher_trace"][0] > 0

    network, x = _network(case)
    layer = keras_fisher.layers.FisherRegularization(
        network, likelihood=likelihoods.Categorical(from_logits=False)
    )
    if case is not _words:  # Inputs of the layer are watched.
        inputs = keras.Input(batch_shape=network.inputs[0].shape)
        history = _fit(keras.Model(inputs, layer(inputs)), x, mode=mode)
        assert history["fisher_trace"][0] > 0


def test_atoms_are_given_with_their_molecules():
    x = keras.Input((5,)), keras.Input((), dtype="int32")
    hidden = Molecules()(layers.Dense(4)(x[0]), x[1])
    network = keras.Model(x, layers.Dense(3, activation="softmax")(hidden))
    atoms = _X, np.arange(16, dtype="int32") // 4
    data = tf.data.Dataset.from_tensors((atoms, _Y[:4]))
    history = _fit(FisherModel(network, 0.1), data, None, batch_size=None)
    assert history["fisher_trace"][0] > 0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_layer_refuses_values_that_are_no_probabilities(mode):
    layer = keras_fisher.layers.FisherRegularization(
        training.dense_network(5),
        likelihood=likelihoods.Categorical(from_logits=False),
    )
    model = keras.Sequential([keras.Input((5,)), layer])
    before = training.weights(model)
    # A graph of Keras's own tells it as an error of TensorFlow's.
    with pytest.raises((ValueError, tf.errors.OpError), match="probabilities"):
        _fit(model, _X, mode=mode)
    training.assert_equal(training.weights(model), before)


@pytest.mark.parametrize("method", ["hessian", "derivatives", "trace"])
def test_measuring_takes_batches_of_a_fixed_size(method):
    network, x = _network(_of_eight)
    if method == "hessian":
        loss = "sparse_categorical_crossentropy"
        trace = keras_fisher.hessian_trace(
            network, x, _Y, loss=loss, num_probes=2, batch_size=8
        )
        assert np.isfinite(trace)
    elif method == "derivatives":
        report = keras_fisher.check_derivatives(network, x[:8])
        assert report.is_exact
    else:
        likelihood = likelihoods.Categorical(from_logits=False)
        arguments = dict(likelihood=likelihood, batch_size=8)
        with pytest.raises(ValueError, match=r'takes one alone.*"batch"'):
            keras_fisher.fisher_trace(network, x, **arguments)
        trace = keras_fisher.fisher_trace(
            network, x, estimator="batch", **arguments
        )
        assert trace > 0


def test_a_check_falls_back_on_the_whole_batch():
    network, x = _network(_of_eight)
    chosen = [layer for layer in network.layers if isinstance(layer, OfEight)]
    with pytest.raises(tf.errors.InvalidArgumentError):
        derivative_check.check(network, x[:4], chosen)
    assert derivative_check.check(network, x[:8], chosen, examples=4) == []


def _looked(mode, x, number, at, is_needed=True):
    """What a look sees, with steps of some numbers."""
    seen = []
    look = FirstLook(seen.append, lambda: is_needed)

    def step(number):
        with tf.control_dependencies(look.step(number, at, x)):
            return tf.identity(number)

    step = cases.compiled(step, mode)
    for each in number:
        step(tf.constant(each))
    return seen


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_inputs_of_one_step_are_seen_once(mode):
    x = {"a": tf.constant([1.0]), "b": None, "c": tf.sparse.eye(2)}
    (seen,) = _looked(mode, x, [0, 1, 1, 2], at=1)
    assert seen["a"].numpy() == [1.0]
    assert seen["b"] is None
    training.assert_equal([tf.sparse.to_dense(seen["c"])], [np.eye(2)])
    assert _looked(mode, x, [0, 1], at=None) == []
    assert _looked(mode, x, [0, 1], at=1, is_needed=False) == []


# Layers that nobody knows, and outputs that call functions, are looked at.
_ON_ONE_THREAD = """
import keras, numpy as np, tensorflow as tf, keras_fisher
assert not tf.config.functions_run_eagerly()

class Exponential(keras.layers.Layer):
    @tf.function
    def call(self, x):
        return tf.exp(x)

for penalty in None, 0.1:
    network = [keras.Input((4,)), keras.layers.Dense(2), Exponential()]
    model = keras_fisher.FisherModel(keras.Sequential(network), penalty)
    model.compile("sgd", "poisson", jit_compile=False)
    model.fit(np.zeros((8, 4)), np.ones((8, 2)), verbose=0)
assert not tf.config.functions_run_eagerly()
"""


def test_one_thread_is_enough():
    """As on a machine of one processor."""
    result = subprocess.run(
        [sys.executable, "-c", _ON_ONE_THREAD],
        env=os.environ | {"TF_NUM_INTEROP_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "value, expected", [("3", 3), ("", 5), ("0", 5), ("many", 5)]
)
def test_threads_are_those_of_the_environment_or_the_processors(
    value, expected, monkeypatch
):
    monkeypatch.setattr(first_look, "_processors", lambda: 5)
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", value)
    assert first_look._threads() == expected


def test_looks_leave_functions_a_thread(monkeypatch):
    monkeypatch.setattr(first_look, "_threads", lambda: 2)
    found = []
    with first_look._LOOKS:
        found.append(tf.config.functions_run_eagerly())
        with first_look._LOOKS:
            found.append(tf.config.functions_run_eagerly())
        # The other one may have begun a function that is not done yet.
        found.append(tf.config.functions_run_eagerly())
    found.append(tf.config.functions_run_eagerly())
    assert found == [False, True, True, False]


def test_errors_of_a_graph_are_raised_once():
    def refuse(x):
        raise ValueError("refused")

    look = FirstLook(refuse, lambda: True)
    look.raise_error()
    for _ in range(2):  # Who goes on is told again.
        with pytest.raises(tf.errors.OpError, match="refused"):
            tf.function(lambda: look.step(tf.constant(0), 0, tf.zeros([])))()
        with pytest.raises(ValueError, match="refused"):
            look.raise_error()
        look.raise_error()


def test_errors_that_were_raised_at_once_are_not_kept():
    def refuse(x):
        raise ValueError("refused")

    look = FirstLook(refuse, lambda: True)
    with pytest.raises(ValueError, match="refused"):
        look.look(tf.zeros([]))
    look.raise_error()
