"""Probabilities that are taken for logits are refused, logits never."""

from __future__ import annotations

import pathlib

import cases
import clusters
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import likelihoods
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Joint
from keras_fisher.likelihoods import output_checks

_RANDOM = np.random.default_rng(6)
_X = _RANDOM.normal(size=(16, 4)).astype("float32")
_Y = _RANDOM.integers(0, 3, size=16)


def _sequential(*body):
    return keras.Sequential([keras.Input((4,)), *body])


def _functional(function, *body):
    inputs = keras.Input((4,))
    return keras.Model(inputs, function(_sequential(*body)(inputs)))


def _by_hand(z):
    exponentials = keras.ops.exp(z)
    return exponentials / keras.ops.sum(exponentials, axis=-1, keepdims=True)


_SOFTMAX = {
    "dense": lambda: _sequential(layers.Dense(3, activation="softmax")),
    "activation": lambda: _sequential(
        layers.Dense(3), layers.Activation("softmax", dtype="float32")
    ),
    "layer": lambda: _sequential(layers.Dense(3), layers.Softmax()),
    "operation": lambda: _functional(keras.ops.softmax, layers.Dense(3)),
    "nested": lambda: _sequential(
        _sequential(layers.Dense(3, activation="softmax"))
    ),
    "passed_on": lambda: _functional(
        lambda z: layers.Reshape((1, 3))(layers.Dropout(0.5)(z)),
        layers.Dense(3, activation="softmax"),
    ),
    "tokens": lambda: _sequential(
        layers.Reshape((2, 2)), layers.Dense(3, activation="softmax")
    ),
}


def _assert_refused(call, likelihood="Categorical"):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    for part in ("expects logits", "probabilities", f"{likelihood}(from_log"):
        assert part in message, message


def _stock(layer, **kwargs):
    model = _sequential(layer)
    model.compile("sgd", "sparse_categorical_crossentropy", **kwargs)
    return model


def _fit(model, y=_Y):
    return model.fit(_X, y, batch_size=8, verbose=0)


def _wrapped(network, likelihood="categorical", **kwargs):
    model = keras_fisher.FisherModel(network, 0.1, likelihood=likelihood)
    model.compile("sgd", "sparse_categorical_crossentropy", **kwargs)
    return model


_COMPILE = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", _SOFTMAX)
def test_softmax_is_no_logit_where_it_is_measured(name, policy):
    keras.config.set_dtype_policy(policy)
    model = _SOFTMAX[name]()
    _assert_refused(
        lambda: keras_fisher.fisher_trace(model, _X, likelihood="categorical")
    )
    trace = keras_fisher.fisher_trace(
        model, _X, likelihood=Categorical(from_logits=False)
    )
    assert trace > 0


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", ["dense", "layer", "nested"])
def test_softmax_is_no_logit_where_it_is_trained(name, policy, mode):
    keras.config.set_dtype_policy(policy)
    network = _SOFTMAX[name]()
    before = network.get_weights()
    _assert_refused(lambda: _fit(_wrapped(network, **_COMPILE[mode])))
    layer = keras_fisher.layers.FisherRegularization(network)
    _assert_refused(lambda: _fit(_stock(layer, **_COMPILE[mode])))
    for a, b in zip(before, network.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
def test_probabilities_are_trained_as_such(mode):
    network = _SOFTMAX["dense"]()
    logs = _fit(_wrapped(network, "auto", **_COMPILE[mode])).history
    assert logs["fisher_trace"][0] > 0
    layer = keras_fisher.layers.FisherRegularization(
        network, likelihood=Categorical(from_logits=False)
    )
    assert _fit(_stock(layer, **_COMPILE[mode])).history["fisher_trace"][0] > 0


@pytest.mark.parametrize("mode", cases.MODES)
def test_sigmoid_is_no_logit(mode):
    network = _sequential(layers.Dense(3, activation="sigmoid"))
    for call in (
        lambda: keras_fisher.fisher_trace(network, _X, likelihood="bernoulli"),
        lambda: _fit(_wrapped(network, "bernoulli", **_COMPILE[mode])),
        lambda: _fit(
            _stock(
                keras_fisher.layers.FisherRegularization(
                    network, likelihood="bernoulli"
                ),
                **_COMPILE[mode],
            )
        ),
    ):
        _assert_refused(call, "Bernoulli")
    assert (
        keras_fisher.fisher_trace(
            network, _X, likelihood=Bernoulli(from_logits=False)
        )
        > 0
    )


def test_softmax_of_ones_own_is_known_by_its_values():
    model = _functional(_by_hand, layers.Dense(3))
    _assert_refused(
        lambda: keras_fisher.fisher_trace(model, _X, likelihood="categorical")
    )


def test_of_several_outputs_each_is_looked_at():
    inputs = keras.Input((4,))
    heads = [
        layers.Dense(3)(inputs),
        layers.Dense(2, activation="sigmoid")(inputs),
    ]
    model = keras.Model(inputs, heads)
    _assert_refused(
        lambda: keras_fisher.fisher_trace(
            model, _X, likelihood=Joint([Categorical(), Bernoulli()])
        ),
        "Bernoulli",
    )
    for right in (Bernoulli(from_logits=False), None):
        likelihood = Joint([Categorical(), right])
        assert keras_fisher.fisher_trace(model, _X, likelihood=likelihood) > 0


class _Table(layers.Layer):
    """Logits that are the same for every example."""

    def __init__(self, logits):
        super().__init__()
        self.table = self.add_weight(shape=np.shape(logits))
        self.table.assign(logits)

    def call(self, x):
        return self.table + 0 * x[:, :1]


_LOGITS = {
    "random": lambda: _sequential(layers.Dense(3)),
    "positive": lambda: _sequential(layers.Dense(3, activation="relu")),
    "zeros": lambda: _sequential(layers.Dense(3, kernel_initializer="zeros")),
    "one_hot": lambda: _sequential(_Table([1.0, 0.0, 0.0])),
    "even": lambda: _sequential(_Table([0.5, 0.5])),
    "between": lambda: _sequential(
        layers.Dense(3, activation="softmax"), layers.Dense(3)
    ),
    "scaled": lambda: _functional(
        lambda z: 5.0 * z, layers.Dense(3, activation="softmax")
    ),
    "divided": lambda: _functional(lambda z: z / 0.1, layers.Dense(3)),
    "other_axis": lambda: _functional(
        lambda z: layers.Reshape((2, 3))(z),
        layers.Dense(6, activation="softmax"),
    ),
    "over_tokens": lambda: _functional(
        lambda z: layers.Softmax(axis=1)(layers.Reshape((2, 3))(z)),
        layers.Dense(6),
    ),
    "one_class": lambda: _functional(
        lambda z: z / keras.ops.sum(z, axis=-1, keepdims=True), layers.Dense(1)
    ),
    "bounded": lambda: _sequential(layers.Dense(3, activation="sigmoid")),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", _LOGITS)
def test_logits_are_never_refused(name):
    keras_fisher.fisher_trace(_LOGITS[name](), _X, likelihood="categorical")
    model = _LOGITS[name]()
    y = np.zeros((16, *model.output_shape[1:-1]), int)
    layer = keras_fisher.layers.FisherRegularization(model)
    stock = _sequential(layer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    stock.compile("sgd", loss)
    _fit(stock, y)


def test_the_layer_is_looked_into_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        output_checks, "check", lambda *args: calls.append(args)
    )
    layer = keras_fisher.layers.FisherRegularization(_LOGITS["random"]())
    for _ in range(3):
        layer(_X, training=True)
    assert len(calls) == 1


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("mixes", [False, True])
def test_a_graph_tells_its_operations_and_no_other_is_traced(
    mode, fraction, mixes, monkeypatch
):
    def fail(*args):
        raise AssertionError("traced for that only")

    monkeypatch.setattr(output_checks, "_last_operations", fail)
    # Nor are values looked at, which might tell the same.
    monkeypatch.setattr(Categorical, "check", lambda *args: None)
    body = [layers.BatchNormalization()] if mixes else []
    penalty = keras_fisher.FisherPenalty(fraction=fraction, every=3)
    for activation, is_refused in (("softmax", True), (None, False)):
        head = layers.Dense(3, activation=activation)
        model = _wrapped(_sequential(*body, head), **_COMPILE[mode])
        model.penalty = penalty
        if is_refused:
            _assert_refused(lambda model=model: _fit(model))
        else:
            assert _fit(model).history["fisher_trace"][0] > 0


def message_of_softmax():
    Categorical.check = lambda *args: None  # of values
    model = _wrapped(_SOFTMAX["dense"]())
    try:
        _fit(model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_replicas_tell_their_operations():
    module = pathlib.Path(__file__).stem
    [[message]] = clusters.results(
        module, "replicas", 2, ("message_of_softmax",)
    )
    assert "expects logits" in message, message


def test_of_steps_without_a_graph_the_first_is_traced(monkeypatch):
    calls, trace = [], output_checks._last_operations

    def counted(*args):
        calls.append(args)
        return trace(*args)

    monkeypatch.setattr(output_checks, "_last_operations", counted)
    model = _wrapped(_LOGITS["random"](), run_eagerly=True)
    model.fit(_X, _Y, batch_size=4, epochs=2, verbose=0)
    assert len(calls) == 1


def test_nothing_is_traced_for_likelihoods_that_take_any_operation(
    monkeypatch,
):
    monkeypatch.setattr(output_checks, "_last_operations", None)
    for likelihood in ("gaussian", Categorical(False), Bernoulli(False)):
        output_checks.check(likelihoods.get(likelihood), None, _X)


def test_a_model_that_only_runs_eagerly_is_not_looked_into():
    class Eager(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            z = self.dense(x)
            if isinstance(z, tf.Tensor) and z.numpy().max() > 1e9:
                raise AssertionError
            return z

    network = Eager()
    network(_X)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras_fisher.FisherModel(network, 0.1)
    model.compile("sgd", loss, run_eagerly=True)
    assert _fit(model).history["fisher_trace"][0] > 0


def test_inputs_of_any_length_are_looked_at():
    inputs = keras.Input((None, 4))
    network = keras.Model(inputs, layers.Dense(3, activation="softmax")(inputs))
    model = keras_fisher.FisherModel(network, 0.1, likelihood="categorical")
    model.compile("sgd", "sparse_categorical_crossentropy")
    data = tf.data.Dataset.from_generator(
        lambda: iter([(_X[:8, None], _Y[:8, None])]),
        output_signature=(
            tf.TensorSpec([None, None, 4]),
            tf.TensorSpec([None, None], tf.int64),
        ),
    )
    _assert_refused(lambda: model.fit(data, verbose=0))
