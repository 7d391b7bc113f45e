"""Anything a user can change on a model shows in a fingerprint of it."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher._measuring import model_fingerprint
from keras_fisher._measuring.model_fingerprint import fingerprint
from keras_fisher.likelihoods import Categorical

_X = training.X[:6]
_LOGITS = Categorical(from_logits=True)


class _Holder(keras.layers.Layer):
    """A layer of someone else's, that goes by whatever it holds."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def call(self, x):
        return x


class _Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def apply(self, x):
        return self.factor * x


def _closure(factor):
    return lambda x: factor * x


def _with_default(factor):
    def function(x, factor=factor, *, shift=factor):
        return factor * x + shift

    return function


_HELD = {
    "number": lambda k: k,
    "text": str,
    "numpy-number": np.float32,
    "array": lambda k: np.full([3], k),
    "array-dtype": lambda k: np.zeros([3], ["float32", "float64"][k - 1]),
    "tensor": lambda k: tf.constant(float(k)),
    "list": lambda k: [1, [k]],
    "tuple": lambda k: (k, 1),
    "dict": lambda k: {"a": {"b": k}},
    "set": lambda k: {k, 7},
    "dtype": lambda k: [tf.float32, tf.float64][k - 1],
    "closure": _closure,
    "defaults": _with_default,
    "keyword-default": lambda k: (lambda: lambda x, *, by=k: by * x)(),
    "partial": lambda k: functools.partial(max, k),
    "partial-keyword": lambda k: functools.partial(max, key=k),
    "method": lambda k: _Slotted(k).apply,
    "slots": _Slotted,
    "namespace": lambda k: types.SimpleNamespace(factor=k),
    "class": lambda k: [dict, list][k - 1],
    "builtin": lambda k: [max, min][k - 1],
    "initializer": keras.initializers.Constant,
    "regularizer": keras.regularizers.L2,
    "layer": lambda k: types.SimpleNamespace(layer=layers.LeakyReLU(k)),
    "none": lambda k: None if k == 1 else 0,
}


@pytest.mark.parametrize("held", _HELD)
def test_what_a_layer_holds(held):
    make = _HELD[held]
    # One code object, defined once, as in a class of a user.
    layer = _Holder(make(1))
    layer(tf.zeros([1, 2]))
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    layer.held = make(2)
    assert fingerprint(layer) != before


def test_equal_values_in_new_objects_are_the_same():
    layer = _Holder({"a": [1, np.ones(2), _closure(3), float("nan")]})
    before = fingerprint(layer)
    layer.held = {"a": [1, np.ones(2), _closure(3), float("nan")]}
    assert fingerprint(layer) == before


def test_objects_that_hold_each_other_have_an_end():
    a, b = types.SimpleNamespace(), types.SimpleNamespace()
    a.other, b.other = b, a
    before = fingerprint(a)
    assert fingerprint(a) == before
    b.other = b
    assert fingerprint(a) != before


def _policy(model):
    model.layers[0].dtype_policy = keras.DTypePolicy("float64")


def _regularizer(model):
    model.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)


def _call(model):
    model.layers[0].call = lambda x: x


def _low_rank(model):
    model.layers[0].enable_lora(1)


_CHANGES = {
    "activation": lambda m: setattr(m.layers[0], "activation", tf.nn.relu),
    "dropout-rate": lambda m: setattr(m.layers[3], "rate", 0.9),
    "trainable": lambda m: setattr(m.layers[0], "trainable", False),
    "trainable-variable": lambda m: setattr(
        m.layers[0].bias, "trainable", False
    ),
    "momentum": lambda m: setattr(m.layers[1], "momentum", 0.5),
    "autocast": lambda m: setattr(m.layers[0], "autocast", False),
    "activity-regularizer": lambda m: setattr(
        m.layers[0], "activity_regularizer", keras.regularizers.L1(1.0)
    ),
    "class": lambda m: setattr(m.layers[0], "__class__", layers.Layer),
    "policy": _policy,
    "regularizer": _regularizer,
    "method": _call,
    "variables": _low_rank,
    "layers": lambda m: m.pop(),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_what_a_user_changes(change):
    model = training.compiled(training.network())
    before = fingerprint(model)
    _CHANGES[change](model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("setting", ["floatx", "epsilon", "image_data_format"])
def test_settings_of_keras(setting):
    before, old = fingerprint(), getattr(keras.config, setting)()
    set_to = getattr(keras.config, f"set_{setting}")
    new = {"floatx": "float64", "epsilon": 1e-3}
    set_to(new.get(setting, "channels_first"))
    try:
        assert fingerprint() != before
    finally:
        set_to(old)
    assert fingerprint() == before


def _attention():
    inputs = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


_NETWORKS = {
    "dense": training.network,
    "attention": _attention,
    "recurrent": lambda: keras.Sequential(
        [
            keras.Input((4, 2)),
            layers.LSTM(2, dropout=0.2, recurrent_dropout=0.2),
            layers.Dense(3),
        ]
    ),
    "subclassed": training.Subclassed,
    "fisher": lambda: keras_fisher.FisherModel(training.network(), 0.1),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", cases.some_slow(_NETWORKS, ["recurrent"]))
def test_training_and_measuring_change_nothing_but_values(name):
    model = _NETWORKS[name]()
    inner = getattr(model, "model", model)
    shape = (6,) if name == "subclassed" else inner.input_shape[1:]
    x = np.random.default_rng(0).normal(size=(6, *shape)).astype("float32")
    model(x)
    training.compiled(model)
    before = fingerprint(model)
    keras_fisher.fisher_trace(model, x)
    assert fingerprint(model) == before, "measuring"
    model.fit(x, training.Y[:6], verbose=0)
    model.evaluate(x, training.Y[:6], verbose=0)
    model.predict(x, verbose=0)
    assert fingerprint(model) == before, "training"


def test_it_keeps_nothing_alive():
    model = training.compiled(training.network())
    parent = types.SimpleNamespace(model=model)
    model.layers[0].parent = parent
    kept, again = fingerprint(model), fingerprint(model)
    assert kept == again
    reference = weakref.ref(model)
    del model, parent
    gc.collect()
    assert reference() is None
    # What is gone is equal to nothing.
    assert kept != again


# And so it changes the measurement.


def _fresh_figures(model, measure):
    """The figure, from a copy of the model that was never measured."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return measure(copy)


_EFFECTIVE = {
    "activation": lambda m: setattr(m.layers[0], "activation", tf.nn.tanh),
    "trainable": lambda m: setattr(m.layers[0], "trainable", False),
    "attribute": lambda m: setattr(m.layers[1], "negative_slope", 0.5),
}


@pytest.mark.parametrize("change", _EFFECTIVE)
def test_fisher_trace_is_of_the_model_as_it_is(change):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5),
            layers.LeakyReLU(0.1),
            layers.Dense(3),
        ]
    )

    def measure(model):
        return float(
            keras_fisher.fisher_trace(
                model, _X, estimator="exact", likelihood=_LOGITS
            )
        )

    before = measure(model)
    _EFFECTIVE[change](model)
    after = measure(model)
    assert abs(after / before - 1) > 1e-3, (before, after)
    expected = _fresh_figures(model, measure)
    assert after == pytest.approx(expected, rel=1e-5)


def test_fisher_trace_in_training_mode_is_of_the_rate_as_it_is():
    model = training.network(batch_norm=False)
    traces = []
    for rate in (0.3, 0.99, 0.3):
        model.layers[-2].rate = rate
        model.layers[-2].seed_generator.state.assign([5, 0])
        trace = keras_fisher.fisher_trace(
            model, _X, estimator="exact", likelihood=_LOGITS, training=True
        )
        traces.append(float(trace))
    assert traces[0] == traces[2] != traces[1], traces


def test_hessian_trace_is_of_the_loss_as_it_is():
    model = training.dense_network(inputs=6, seed=0)
    measure = functools.partial(
        keras_fisher.hessian_trace, model, _X, training.Y[:6], seed=1
    )
    training.compiled(model, loss=keras.losses.get("mse"), loss_weights=[1.0])
    y = np.eye(3, dtype="float32")[training.Y[:6]]
    measure = functools.partial(
        keras_fisher.hessian_trace, model, _X, y, seed=1, num_probes=8
    )
    first = measure()
    training.compiled(model, loss="mse", loss_weights=[100.0])
    assert measure() == pytest.approx(100 * first, rel=1e-4)
    huber = keras.losses.Huber(delta=1e3)
    training.compiled(model, loss=huber)
    assert measure() == pytest.approx(first / 2, rel=1e-4)
    model.layers[0].kernel.regularizer = keras.regularizers.L2(0.5)
    weights = model.layers[0].kernel.shape.num_elements()
    assert measure() == pytest.approx(first / 2 + weights, rel=1e-4)


def test_no_name_is_taken_from_the_models_of_the_user():
    model_fingerprint._names_of_keras.cache_clear()
    keras.backend.clear_session()
    model_fingerprint._names_of_keras()
    assert keras.Sequential().name == "sequential"
    inputs, identity = keras.Input((1,)), keras.layers.Identity()
    assert identity.name == "identity"
    assert keras.Model(inputs, identity(inputs)).name == "functional"
    assert keras.layers.Layer().name == "layer"
    assert keras.optimizers.SGD().name.lower() == "sgd"
