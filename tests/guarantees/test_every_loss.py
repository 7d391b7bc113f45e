"""Every loss of Keras, reduced in every way, trains as in plain Keras.

With α = 0, and a penalty computed at every step: what is done to the loss on
its way to the gradient must not show in the last bit.
"""

from __future__ import annotations

import inspect

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import likelihoods

_REDUCTIONS = (
    *("sum_over_batch_size", "mean", "mean_with_sample_weight"),
    *("sum", "none", None),
)
_SIZE = 24
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(_SIZE, 6)).astype("float32")
_CLASSES = _RANDOM.integers(0, 3, _SIZE)
_ONE_HOT = np.eye(3, dtype="float32")[_CLASSES]
_POSITIVE = _RANDOM.uniform(0.5, 2.0, size=(_SIZE, 3)).astype("float32")
_NUMBERS = _RANDOM.normal(size=(_SIZE, 3)).astype("float32")
_WORDS = _RANDOM.integers(1, 4, (_SIZE, 2))

# Labels, and what the last layer does.
_OF_PROBABILITIES = (_ONE_HOT, "softmax")
_OF_NUMBERS = (_NUMBERS, None)
_OF_POSITIVES = (_POSITIVE, "softplus")
_LOSSES = {
    "BinaryCrossentropy": (_ONE_HOT, "sigmoid"),
    "BinaryFocalCrossentropy": (_ONE_HOT, "sigmoid"),
    "CTC": (_WORDS, "sequence"),
    "CategoricalCrossentropy": _OF_PROBABILITIES,
    "CategoricalFocalCrossentropy": _OF_PROBABILITIES,
    "CategoricalGeneralizedCrossEntropy": (_CLASSES, "softmax"),
    "CategoricalHinge": _OF_PROBABILITIES,
    "Circle": (_CLASSES, "normalized"),
    "CosineSimilarity": _OF_NUMBERS,
    "Dice": _OF_PROBABILITIES,
    "Hinge": (2 * _ONE_HOT - 1, "tanh"),
    "Huber": _OF_NUMBERS,
    "KLDivergence": _OF_PROBABILITIES,
    "LogCosh": _OF_NUMBERS,
    "MeanAbsoluteError": _OF_NUMBERS,
    "MeanAbsolutePercentageError": _OF_POSITIVES,
    "MeanSquaredError": _OF_NUMBERS,
    "MeanSquaredLogarithmicError": _OF_POSITIVES,
    "Poisson": _OF_POSITIVES,
    "SparseCategoricalCrossentropy": (_CLASSES, "softmax"),
    "SquaredHinge": (2 * _ONE_HOT - 1, "tanh"),
    "Tversky": _OF_PROBABILITIES,
}


def _head(kind: str | None) -> list:
    if kind == "sequence":
        return [layers.Dense(16), layers.Reshape((4, 4))]
    if kind == "normalized":
        return [layers.Dense(3), layers.UnitNormalization()]
    return [layers.Dense(3, activation=kind)]


def _network(kind):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.Dropout(0.2, seed=5),
            *_head(kind),
        ]
    )


def _penalized(network, penalty=None, **kwargs):
    kwargs.setdefault("likelihood", likelihoods.Gaussian())
    return FisherModel(
        network, penalty or FisherPenalty(0.0), trace_every=1, **kwargs
    )


def _trained(model, loss, y, mode="graph", optimizer=None, **fit):
    compiling = fit.pop("compiling", {})
    model.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
        loss,
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
        **compiling,
    )
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0} | fit
    return model.fit(_X, y, **fit).history


def _assert_alike(make, loss, y, exactly=True, **kwargs):
    """Trains with and without, and compares weights and logs."""
    plain = make()
    wrapped = _penalized(make(), **kwargs.pop("wrapping", {}))
    logs = [_trained(model, loss(), y, **kwargs) for model in (plain, wrapped)]
    moved = 0.0
    for a, b, start in zip(
        plain.weights, wrapped.model.weights, make().weights
    ):
        compare = (
            np.testing.assert_array_equal
            if exactly
            else lambda a, b, err_msg: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-6, err_msg=err_msg
            )
        )
        compare(b.numpy(), a.numpy(), err_msg=a.path)
        moved = max(moved, np.abs(a.numpy() - start.numpy()).max())
    assert moved > 1e-4, "nothing was trained"
    np.testing.assert_allclose(
        logs[1]["loss"], logs[0]["loss"], rtol=0 if exactly else 1e-5
    )


def _reduced(name, reduction):
    return lambda: getattr(keras.losses, name)(reduction=reduction)


def test_every_loss_of_keras_is_here():
    found = {
        name
        for name, value in vars(keras.losses).items()
        if inspect.isclass(value)
        and issubclass(value, keras.losses.Loss)
        and value is not keras.losses.Loss
    }
    assert found == set(_LOSSES)


@pytest.mark.few(2)
@pytest.mark.parametrize("reduction", _REDUCTIONS)
@pytest.mark.parametrize("name", _LOSSES)
def test_every_loss_in_every_reduction(name, reduction):
    y, kind = _LOSSES[name]
    _assert_alike(lambda: _network(kind), _reduced(name, reduction), y)


_FEW = ["SparseCategoricalCrossentropy", "MeanSquaredError"]


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("reduction", _REDUCTIONS)
@pytest.mark.parametrize("name", [*_FEW, "Dice"])
def test_eagerly_and_under_xla(name, reduction, mode):
    y, kind = _LOSSES[name]
    # XLA fuses what it finds in one function, and rounds it otherwise.
    _assert_alike(
        lambda: _network(kind),
        _reduced(name, reduction),
        y,
        exactly=mode == "eager",
        mode=mode,
    )


_OPTIONS = {
    "sample weights": {"sample_weight": np.arange(_SIZE) % 3 + 0.5},
    "class weights": {"class_weight": {0: 1.0, 1: 0.2, 2: 3.0}},
    "several steps": {"compiling": {"steps_per_execution": 2}},
    "accumulated": {"accumulated": True},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("option", _OPTIONS)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
def test_what_fit_and_compile_take(reduction, option):
    name = "SparseCategoricalCrossentropy"
    y, kind = _LOSSES[name]
    kwargs = dict(_OPTIONS[option])
    if kwargs.pop("accumulated", False):
        kwargs["optimizer"] = keras.optimizers.SGD(
            0.05, gradient_accumulation_steps=2
        )
    for mode in ("graph", "eager"):
        if "optimizer" in kwargs:
            kwargs["optimizer"] = kwargs["optimizer"].from_config(
                kwargs["optimizer"].get_config()
            )
        _assert_alike_with(kwargs, kind, _reduced(name, reduction), y, mode)


def _assert_alike_with(kwargs, kind, loss, y, mode):
    if "optimizer" not in kwargs:
        _assert_alike(lambda: _network(kind), loss, y, mode=mode, **kwargs)
        return
    models = [_network(kind), _penalized(_network(kind))]
    for model in models:
        optimizer = kwargs["optimizer"]
        config = optimizer.get_config()
        _trained(
            model, loss(), y, mode=mode, optimizer=type(optimizer)(**config)
        )
    training.assert_equal(
        training.weights(models[1].model), training.weights(models[0])
    )


def _two_outputs():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(
        inputs,
        {
            "kind": layers.Dense(3, name="kind")(x),
            "size": layers.Dense(1, name="size")(x),
        },
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("reduction", _REDUCTIONS)
def test_several_outputs(reduction, mode):
    def loss():
        return {
            "kind": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction=reduction
            ),
            "size": keras.losses.MeanSquaredError(reduction=reduction),
        }

    _assert_alike(
        _two_outputs,
        loss,
        {"kind": _CLASSES, "size": _NUMBERS[:, :1]},
        mode=mode,
        wrapping={"likelihood": "auto"},
        compiling={"loss_weights": {"kind": 0.7, "size": 2.0}},
    )


@pytest.mark.parametrize("mode", ["graph", "eager", "xla"])
@pytest.mark.parametrize("reduction", ["sum", "none", "sum_over_batch_size"])
def test_a_penalty_is_added_to_the_gradient_of_the_sum(reduction, mode):
    """W - η (∇ Σ ℓ + α ∇ P), by plain tapes in double precision."""
    keras.config.set_dtype_policy("float64")
    loss = keras.losses.MeanSquaredError(reduction=reduction, dtype="float64")
    make = lambda: training.dense_network(6, (4,), seed=2)  # noqa: E731
    alpha, y = 0.3, _NUMBERS[:8]
    network = make()
    model = FisherModel(network, _Given(alpha, bound=None), trace_every=None)
    model.compile(
        # A rate that single precision holds exactly.
        keras.optimizers.SGD(0.125),
        loss,
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
    )
    model.fit(_X[:8], y, batch_size=8, verbose=0)
    by_hand = make()
    x = tf.constant(_X[:8], "float64")
    variables = by_hand.trainable_variables
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            outputs = by_hand(x)
            # -log p of the Gaussian, up to a constant.
            squares = tf.reduce_sum(tf.square(outputs - y), axis=1)
            nll = 0.5 * tf.reduce_mean(squares)
        gradient = inner.gradient(nll, variables)
        penalty = tf.add_n([tf.reduce_sum(g**2) for g in gradient])
        total = tf.reduce_sum(loss(y, outputs)) + alpha * penalty
    for variable, g, new in zip(
        variables, outer.gradient(total, variables), network.weights
    ):
        np.testing.assert_allclose(
            new.numpy(), variable.numpy() - 0.125 * g.numpy(), rtol=1e-9
        )


class _Given(FisherPenalty):
    """With the labels of the data, so that nothing is drawn."""

    needs_labels = True

    def labels(self, likelihood, outputs, y, seed):
        return y
