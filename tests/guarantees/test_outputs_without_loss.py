"""Outputs that have no loss are no part of the likelihood."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import GradientPenalty
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Joint

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(12, 4))
_Y = _RANDOM.integers(0, 3, 12)


class TwoHeads(keras.Model):
    def __init__(self, structure):
        super().__init__()
        self.structure = structure
        self.hidden = layers.Dense(5, activation="tanh")
        self.heads = [layers.Dense(3), layers.Dense(2)]

    def call(self, x):
        hidden = self.hidden(x)
        outputs = [head(hidden) for head in self.heads]
        if self.structure == "list":
            return outputs
        return dict(zip("ab", outputs))


def _network(kind, structure):
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    if kind == "subclassed":
        return TwoHeads(structure)
    x = keras.Input((4,))
    h = layers.Dense(5, activation="tanh")(x)
    outputs = [layers.Dense(3, name="a")(h), layers.Dense(2, name="b")(h)]
    if structure == "dict":
        outputs = dict(zip("ab", outputs))
    return keras.Model(x, outputs)


_CASES = {
    "name": ("dict", {"a": training.LOSS}, {"a": _Y}),
    "name_none": ("dict", {"a": training.LOSS, "b": None}, {"a": _Y}),
    "name_all": ("dict", {"a": training.LOSS}, {"a": _Y, "b": _Y}),
    "alone": ("list", [training.LOSS, None], _Y),
    "list": ("list", [training.LOSS, None], [_Y]),
    "list_all": ("list", [training.LOSS, None], [_Y, _Y]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("data", ["arrays", "dataset"])
@pytest.mark.parametrize("kind", ["functional", "subclassed"])
@pytest.mark.parametrize("name", _CASES)
def test_models_train_as_plain_keras_does(name, kind, data):
    structure, loss, y = _CASES[name]
    given = dict(x=_X, y=y, batch_size=6, shuffle=False)
    if data == "dataset":
        y = tuple(y) if isinstance(y, list) else y
        given = dict(x=tf.data.Dataset.from_tensor_slices((_X, y)).batch(6))
    plain = training.compiled(_network(kind, structure), loss, metrics=None)
    plain.fit(**given, verbose=0)
    model = FisherModel(
        _network(kind, structure),
        GradientPenalty(0.0, bound=None),
        trace_every=1,
    )
    training.compiled(model, loss, metrics=None).fit(**given, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", _CASES)
def test_penalties_and_traces_are_those_of_the_labelled_output(name):
    structure, loss, y = _CASES[name]
    model, other = (_network("functional", structure) for _ in range(2))
    heads = dict(zip(other.output_names, keras.tree.flatten(other.output)))
    alone = keras.Model(other.input, heads["a"])
    penalty = GradientPenalty(0.3, exclude="^b/", bound=None)
    found = FisherModel(model, penalty, trace_every=None)
    expected = FisherModel(alone, penalty, trace_every=None)
    logs = [
        training.compiled(each, each_loss, metrics=None)
        .fit(_X, labels, batch_size=12, verbose=0)
        .history["fisher_penalty"][0]
        for each, each_loss, labels in (
            (found, loss, y),
            (expected, training.LOSS, _Y),
        )
    ]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-6)
    traces = [
        keras_fisher.fisher_trace(each, _X, labels, estimator=estimator)
        for estimator in ("exact", "empirical")
        for each, labels in ((found, y), (expected, _Y))
    ]
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-9)
    np.testing.assert_allclose(traces[2], traces[3], rtol=1e-9)


def test_noise_flags_are_of_the_output_that_has_a_loss():
    model = FisherModel(_network("functional", "list"))
    training.compiled(model, [training.LOSS, None], metrics=None)
    model.optimizer.learning_rate = 0.0
    is_noisy = np.arange(12) % 3 == 0
    logs = model.fit(_X, {"label": _Y, "is_noisy": is_noisy}, verbose=0).history
    right = model.predict(_X, verbose=0)[0].argmax(axis=-1) == _Y
    for name, group in (("clean", ~is_noisy), ("noisy", is_noisy)):
        np.testing.assert_allclose(
            logs[f"{name}_accuracy"][0], right[group].mean(), rtol=1e-6
        )


@pytest.mark.parametrize(
    "y", [[_Y, _Y, _Y], {"c": _Y}, []], ids=["long", "name", "none"]
)
def test_labels_that_do_not_fit_are_named(y):
    likelihood = Joint({"a": Categorical(), "b": None})
    outputs = {"a": tf.zeros([12, 3]), "b": tf.zeros([12, 2])}
    with pytest.raises(ValueError, match=r"\['b'\] may be left out of labels"):
        likelihood.negative_log_likelihood(y, outputs)
