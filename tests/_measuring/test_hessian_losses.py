"""Which loss hessian_trace is of, how it is reduced and weighted."""

from __future__ import annotations

import cases
import hessians
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher

_LOSS, _Y = hessians.LOSS, hessians.Y


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "loss, y",
    [
        ("mse", np.ones([networks.BATCH, networks.CLASSES])),
        (
            keras.losses.MeanSquaredError(dtype="float64"),
            np.ones([networks.BATCH, 3]),
        ),
        (lambda y, p: tf.reduce_mean((p - y) ** 2, -1), np.ones([6, 3])),
        (_LOSS, _Y),
    ],
    ids=["name", "instance", "function", "sparse"],
)
def test_any_loss(loss, y):
    model, x = networks.build("dense")

    def value():
        mean = (
            loss
            if loss != "mse"
            else keras.losses.MeanSquaredError(dtype="float64")
        )
        return tf.reduce_mean(mean(y, model(x)))

    matrix = hessians.whole(model, value)
    trace = keras_fisher.hessian_trace(
        model, x, y, loss=loss, num_probes=4, tolerance=None, seed=5
    )
    forms = hessians.quadratic_forms(model, matrix, seed=5, count=4)
    assert trace == pytest.approx(forms.mean(), rel=1e-6)


def test_a_loss_is_for_one_output():
    x = keras.Input((4,))
    model = keras.Model(x, [layers.Dense(1)(x), layers.Dense(1)(x)])
    with pytest.raises(ValueError, match=r"several outputs.*pass no `loss`"):
        keras_fisher.hessian_trace(
            model, np.ones([3, 4]), np.ones([3, 1]), loss="mse"
        )


def test_a_function_of_one_output_does_not_mix_examples():
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), layers.Dense(1)]
    )
    x, y = np.random.default_rng(0).normal(size=(5, 2)), np.arange(5.0)
    trace = keras_fisher.hessian_trace(
        model, x, y, loss="mse", num_probes=2000, tolerance=None, seed=0
    )
    # 2 (mean of x xᵀ, 1), whatever the labels.
    expected = 2 * (np.mean(np.sum(x**2, axis=1)) + 1)
    assert abs(trace - expected) < 4 * trace.standard_error


def test_the_compiled_loss_with_its_regularization_and_no_penalty():
    base = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5)),
        ]
    )
    x, y = np.zeros([4, 2], "float32"), np.arange(4) % 3
    base.layers[0].bias.assign([100.0, 0.0, 0.0])  # no curvature but L2's
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base.compile("sgd", loss)
    model = keras_fisher.FisherModel(base, penalty=1.0)
    model.compile("sgd", loss)
    for compiled in (base, model):
        trace = keras_fisher.hessian_trace(compiled, x, y, num_probes=8)
        assert trace == pytest.approx(2 * 0.5 * 6, rel=1e-6)


def _function(y, p):
    return keras.ops.sparse_categorical_crossentropy(y, p, from_logits=True)


@pytest.mark.parametrize("loss", [None, _LOSS, _function])
def test_sample_weights_of_a_data_set(loss):
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS if loss is None else "mse")
    weight = np.array([0.0, 1.0, 2.0, 3.0, 0.5, 1.0])
    matrix = hessians.whole(
        model, lambda: _LOSS(_Y, model(x), sample_weight=weight)
    )
    dataset = tf.data.Dataset.from_tensors((x, _Y, weight))
    trace = keras_fisher.hessian_trace(
        model, dataset, loss=loss, num_probes=4, tolerance=None, seed=5
    )
    forms = hessians.quadratic_forms(model, matrix, seed=5, count=4)
    assert trace == pytest.approx(forms.mean(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none", None])
@pytest.mark.parametrize("batch_size", [2, None])
def test_a_loss_is_the_mean_over_examples_however_it_is_reduced(
    reduction, batch_size
):
    mean, other = (
        keras_fisher.hessian_trace(
            # Anew, since a model keeps what was compiled for it.
            *networks.build("dense"),
            _Y,
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, dtype="float64", reduction=r
            ),
            batch_size=batch_size,
            num_probes=4,
            seed=0,
        )
        for r in ("sum_over_batch_size", reduction)
    )
    assert float(other) == pytest.approx(float(mean), rel=1e-9)


def test_the_reduction_of_a_loss_stays_as_it_was():
    model, x = networks.build("dense")
    loss = keras.losses.MeanSquaredError(reduction="sum")
    y = np.zeros([networks.BATCH, networks.CLASSES])
    keras_fisher.hessian_trace(model, x, y, loss=loss, num_probes=1)
    assert loss.reduction == "sum"


def test_losses_that_layers_add_count():
    """Of an activity regularizer λ Σ a² / B, with a = w x and no other loss."""
    keras.config.set_dtype_policy("float64")
    x = np.array([[1.0], [3.0]])
    layer = keras.layers.Dense(
        1, use_bias=False, activity_regularizer=keras.regularizers.L2(0.5)
    )
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile("sgd")
    found = keras_fisher.hessian_trace(model, x, num_probes=2, seed=0)
    # Older versions do not divide by B.
    size = len(x) if cases.has_keras("3.14") else 1
    np.testing.assert_allclose(float(found), 2 * 0.5 * np.sum(x**2) / size)


@pytest.mark.parametrize("loss", [None, _LOSS, _function])
def test_labels_with_noise_flags_are_those_that_were_given(loss):
    model, x = networks.build("dense")
    model.compile(loss=_LOSS)
    flags = {
        "label": _Y,
        "is_noisy": np.zeros(len(_Y), bool),
        "true_label": (_Y + 1) % networks.CLASSES,
    }
    found, expected = (
        keras_fisher.hessian_trace(model, x, y, loss=loss, num_probes=4, seed=0)
        for y in (flags, _Y)
    )
    assert found == expected


def test_each_loss_has_a_figure_of_its_own():
    """Of one model, which keeps what was compiled for it."""
    model, x = networks.build("dense")
    y = np.ones([networks.BATCH, networks.CLASSES])
    once, hundred = (
        keras_fisher.hessian_trace(
            model,
            x,
            y,
            loss=lambda y, p, c=c: c * tf.reduce_mean((p - y) ** 2, -1),
            num_probes=4,
            seed=0,
        )
        for c in (1.0, 100.0)
    )
    assert float(hundred) == pytest.approx(100 * once, rel=1e-9)
