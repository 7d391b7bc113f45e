"""Who takes differences over kinks is told so."""

from __future__ import annotations

import warnings

import cases
import evaluation
import keras
from keras import layers
import pytest
import tensorflow as tf

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import layers as fisher_layers

_WITH = {
    "ReLU": ("Relu", layers.ReLU),
    "leaky": ("LeakyRelu", layers.LeakyReLU),
    "six": ("Relu6", lambda: layers.Activation("relu6")),
    "selu": ("Selu", lambda: layers.Activation("selu")),
    "pooling": ("MaxPool", layers.MaxPooling2D),
    "maximum": (
        "Maximum",
        lambda: layers.Lambda(lambda x: keras.ops.maximum(x, 0.1 * x)),
    ),
    "clipped": (
        "Maximum, Minimum",
        lambda: layers.Lambda(lambda x: keras.ops.clip(x, -1, 1)),
    ),
    "a loop": (
        "Abs",
        lambda: layers.Lambda(lambda x: tf.map_fn(tf.abs, x)),
    ),
}
_WITHOUT = {
    "tanh": lambda: layers.Activation("tanh"),
    "gelu": lambda: layers.Activation("gelu"),
    "softmax": lambda: layers.Softmax(axis=(1, 2)),
    "statistics": layers.BatchNormalization,
    "by example": layers.LayerNormalization,
    "pooling": lambda: layers.AveragePooling2D(2),
    "far away": lambda: layers.Lambda(lambda x: keras.ops.clip(x, -1e5, 1e5)),
    "unit norm": layers.UnitNormalization,
    "dropout": lambda: layers.Dropout(0.5),
    "beside": lambda: layers.ActivityRegularization(l1=0.1),
    "sums": lambda: layers.Lambda(
        lambda x: x - keras.ops.logsumexp(x, axis=-1, keepdims=True)
    ),
}


def _network(make, dtype="float32"):
    keras.config.set_dtype_policy(dtype)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, padding="same"),
            make(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    return model, keras.random.uniform((4, 4, 4, 2), seed=0, dtype=dtype)


def _told(mode, make, dtype="float32", method="finite_difference") -> list:
    model, x = _network(make, dtype)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        evaluation.run(mode, FisherPenalty(0.3, method=method), model, x)
    # A function may be traced twice; Python shows what is told again once.
    messages = {str(each.message) for each in found}
    return [each for each in messages if "kinks" in each]


@pytest.mark.few(4)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", _WITH)
def test_kinks_are_named(name, mode):
    operation, make = _WITH[name]
    (said,) = _told(mode, make)
    assert f"those of {operation}." in said
    assert "float32" in said


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", _WITHOUT)
def test_smooth_models_are_left_alone(name, mode):
    assert not _told(mode, _WITHOUT[name])


def test_all_are_named_once():
    def make():
        return keras.Sequential(
            [layers.MaxPooling2D(2), layers.ReLU(), layers.ReLU()]
        )

    (said,) = _told("graph", make)
    assert "those of MaxPool, Relu." in said


@pytest.mark.parametrize(
    ("dtype", "method"),
    [("float64", "finite_difference"), ("float32", "exact")],
)
def test_what_is_right_with_kinks_is_left_alone(dtype, method):
    assert not _told("graph", layers.ReLU, dtype, method)


@pytest.mark.parametrize("is_layer", [False, True])
def test_fit_tells_it(is_layer):
    penalty = FisherPenalty(0.3, method="finite_difference")
    network, x = _network(layers.ReLU)
    if is_layer:
        regularized = fisher_layers.FisherRegularization(
            network, penalty, likelihood="categorical"
        )
        model = keras.Sequential([keras.Input(x.shape[1:]), regularized])
    else:
        model = FisherModel(network, penalty)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    with pytest.warns(UserWarning, match="kinks, those of Relu"):
        model.fit(x, tf.zeros([4], tf.int32), verbose=0)
