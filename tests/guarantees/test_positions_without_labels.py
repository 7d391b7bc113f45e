"""Positions that have no label are no part of their example."""

from __future__ import annotations

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher._common import random_draws
from keras_fisher.layers import FisherRegularization
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian

_BATCH, _TOKENS, _CLASSES = 6, 4, 3
_SEED = 7
_SPARSE = keras.losses.SparseCategoricalCrossentropy
_RANDOM = np.random.default_rng(4)
_X = _RANDOM.normal(size=(_BATCH, _TOKENS, 2))
_Y = _RANDOM.integers(0, _CLASSES, (_BATCH, _TOKENS))
_HIDDEN = _RANDOM.random((_BATCH, _TOKENS)) < 0.4
_HIDDEN[2] = True  # of an example nothing is left


def _labels(ignore_class):
    """With the ignored one at hidden places, and nowhere else."""
    y = np.where(ignore_class == _Y, 1, _Y)
    return np.where(_HIDDEN, ignore_class, y)


def _network(masking=False):
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((_TOKENS, 2)),
            *([layers.Masking(0.0)] if masking else []),
            layers.Dense(4, activation="tanh"),
            layers.Dense(_CLASSES),
        ]
    )


def _gradients(model, labels, positions):
    """∇_θ Σ -log p(ŷ) over the positions of one example."""
    with tf.GradientTape() as tape:
        logits = model(_X)
        losses = [
            -tf.nn.log_softmax(logits[index])[int(labels[index])]
            for index in positions
        ]
        loss = tf.add_n([*losses, 0.0 * tf.reduce_sum(logits)])
    return tape.gradient(loss, model.trainable_variables)


def _seen(i):
    return [(i, t) for t in range(_TOKENS) if not _HIDDEN[i, t]]


def _norm_of_mean(model, labels):
    """‖(1/B) Σ_i g_i‖² by a loop that leaves hidden positions out."""
    gradients = [_gradients(model, labels, _seen(i)) for i in range(_BATCH)]
    return sum(
        float(tf.reduce_sum((sum(g) / _BATCH) ** 2)) for g in zip(*gradients)
    )


def _norms(model, labels):
    """‖g_i‖² by the same loop."""
    return np.array(
        [
            sum(
                float(tf.reduce_sum(g**2))
                for g in _gradients(model, labels, _seen(i))
            )
            for i in range(_BATCH)
        ]
    )


def _exact_norms(model):
    """E ‖g_i‖² by the same loop, over positions and classes."""
    logits = model(_X)
    p = tf.nn.softmax(logits).numpy()
    expected = np.zeros(_BATCH)
    for i in range(_BATCH):
        for index in _seen(i):
            for c in range(_CLASSES):
                # The scores of positions are independent, with mean 0.
                g = _gradients(model, np.full(_Y.shape, c), [index])
                norm = sum(float(tf.reduce_sum(each**2)) for each in g)
                expected[i] += p[(*index, c)] * norm
    return expected


_PENALTIES = {
    "gradient": GradientPenalty(0.3, bound=None),
    "fisher": FisherPenalty(0.3, bound=None),
    "uniform": UniformLabelPenalty(0.3, bound=None),
    "difference": FisherPenalty(0.3, bound=None, method="finite_difference"),
}


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("ignore_class", [-1, 0])
@pytest.mark.parametrize("name", _PENALTIES)
def test_penalties_leave_them_out(name, ignore_class, mode):
    model, penalty = _network(), _PENALTIES[name]
    likelihood, y = (
        Categorical(ignore_class=ignore_class),
        _labels(ignore_class),
    )

    def value(x, y):
        forward = penalty.forward(model, x, seed=_SEED)
        return penalty(forward, likelihood, y, seed=_SEED).value

    found = cases.compiled(value, mode)(tf.constant(_X), tf.constant(y))
    used = penalty.labels(likelihood, model(_X), y, _SEED)
    expected = 0.3 * _norm_of_mean(model, np.asarray(used))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_fraction_of_the_batch_leaves_out_its_own():
    model, y = _network(), _labels(-1)
    penalty = GradientPenalty(0.3, fraction=0.5, bound=None)
    forward = penalty.forward(model, tf.constant(_X), seed=_SEED)
    found = penalty(forward, Categorical(ignore_class=-1), y).value
    first, size = int(forward.subset.first), int(forward.subset.size)
    gradients = [
        _gradients(model, y, _seen((first + k) % _BATCH)) for k in range(size)
    ]
    norm = sum(float(tf.reduce_sum(sum(g) ** 2)) for g in zip(*gradients))
    np.testing.assert_allclose(found, 0.3 * norm / size / _BATCH, rtol=1e-9)


def _estimates(from_dataset, form):
    """A model, and a function that estimates its trace on data with gaps."""
    model, y = _network(), _labels(-1)
    y = y[..., None] if form == "column" else y
    data = (_X, y)
    if from_dataset:
        data = (tf.data.Dataset.from_tensor_slices(data).batch(4),)
    likelihood = Categorical(ignore_class=-1)

    def trace(estimator, **kwargs):
        return keras_fisher.fisher_trace(
            model, *data, estimator=estimator, likelihood=likelihood, **kwargs
        )

    return model, trace


@pytest.mark.parametrize("form", ["tokens", *cases.slow(["column"])])
@pytest.mark.parametrize("from_dataset", [True, *cases.slow([False])])
def test_traces_leave_them_out(from_dataset, form):
    model, trace = _estimates(from_dataset, form)
    expected = _exact_norms(model)
    np.testing.assert_allclose(
        trace("exact", by="example"), expected, rtol=1e-9
    )
    np.testing.assert_allclose(
        trace("empirical", by="example"), _norms(model, _labels(-1)), rtol=1e-9
    )
    for estimator in ("monte_carlo", "batch"):
        found = trace(estimator, num_samples=300, seed=1)
        assert abs(found - expected.mean()) < 4 * found.standard_error


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tokens", "column"])
@pytest.mark.parametrize("from_dataset", [True, False])
def test_errors_of_one_draw_are_of_pairs_that_count(from_dataset, form):
    _, trace = _estimates(from_dataset, form)
    draws = [trace("monte_carlo", seed=k) for k in range(30)]
    errors = [draw.standard_error for draw in draws]
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) / np.std(draws) < 1.6


def test_traces_without_labels_are_of_all_positions():
    model = _network()
    loss = Categorical(ignore_class=-1), Categorical()
    first, second = (
        keras_fisher.fisher_trace(model, _X, estimator="exact", likelihood=each)
        for each in loss
    )
    assert first == second


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("from_dataset", [False, True])
@pytest.mark.parametrize("ignore_class", [-1, 0])
def test_training_leaves_them_out(ignore_class, from_dataset, jit_compile):
    y = _labels(ignore_class)
    loss = _SPARSE(from_logits=True, ignore_class=ignore_class)
    data = dict(x=_X, y=y, batch_size=_BATCH)
    if from_dataset:
        data = dict(x=tf.data.Dataset.from_tensors((_X, y)))
    plain = _network()
    plain.compile("sgd", loss)
    expected = plain.fit(**data, shuffle=False, verbose=0).history

    model = FisherModel(_network(), trace_every=1, seed=_SEED)
    model.compile("sgd", loss, jit_compile=jit_compile)
    outputs = model.model(_X)
    reference = _network()
    logs = model.fit(**data, shuffle=False, verbose=0).history
    seed = random_draws.draw(keras.random.SeedGenerator(_SEED))
    labels = model.likelihood.sample(outputs, seed).numpy()
    np.testing.assert_allclose(
        logs["fisher_trace"][0],
        _BATCH * _norm_of_mean(reference, labels),
        rtol=1e-5,
    )
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-6)
    for a, b in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-6)


class _WithoutPadding(keras.losses.Loss):
    """As people write it, to leave class 0 out."""

    def call(self, y_true, y_pred):
        losses = _SPARSE(from_logits=True, reduction=None)(y_true, y_pred)
        mask = keras.ops.cast(y_true > 0, losses.dtype)
        return keras.ops.sum(losses * mask) / keras.ops.sum(mask)


def test_padding_that_only_the_loss_hides_is_left_out():
    y = _labels(0)
    model = FisherModel(
        _network(),
        GradientPenalty(0.3, bound=None),
        likelihood=Categorical(ignore_class=0),
    )
    model.compile("sgd", _WithoutPadding())
    expected = 0.3 * _norm_of_mean(_network(), y)
    logs = model.fit(_X, y, batch_size=_BATCH, verbose=0).history
    np.testing.assert_allclose(logs["fisher_penalty"], expected, rtol=1e-5)


class _KnownNumbers(Gaussian):
    """Of which some are missing."""

    reads_labels = True

    def has_label(self, y, outputs):
        return ~tf.math.is_nan(y)


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_likelihood_of_ones_own_says_where_there_is_a_label(mode):
    model, likelihood = _network(), _KnownNumbers()
    y = np.where(_HIDDEN[..., None], np.nan, _RANDOM.normal(size=(1, 1, 3)))
    penalty = GradientPenalty(1.0)

    def value(x, y):
        forward = penalty.forward(model, x)
        return penalty(forward, likelihood, y).value

    with tf.GradientTape() as tape:
        errors = tf.where(np.isnan(y), 0.0, model(_X) - np.nan_to_num(y))
        loss = tf.reduce_sum(errors**2) / 2 / _BATCH
    gradients = tape.gradient(loss, model.trainable_variables)
    found = cases.compiled(value, mode)(tf.constant(_X), tf.constant(y))
    expected = sum(float(tf.reduce_sum(g**2)) for g in gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_keras_mask_hides_as_well():
    """Where the mask and the labels hide different positions."""
    model = _network(masking=True)
    x, y = _X.copy(), np.where(_HIDDEN, -1, _Y)
    x[:, 0] = 0.0
    y[:, 0] = _Y[:, 0]
    likelihood = Categorical(ignore_class=-1)
    found = keras_fisher.fisher_trace(
        model, x, y, estimator="exact", likelihood=likelihood
    )
    y[:, 0] = -1
    expected = keras_fisher.fisher_trace(
        _network(), x, y, estimator="exact", likelihood=likelihood
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_layer_that_sees_no_labels_refuses():
    with pytest.raises(ValueError, match="does not see the labels"):
        FisherRegularization(
            _network(), likelihood=Categorical(ignore_class=-1)
        )
