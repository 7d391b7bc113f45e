"""Traces by example of ragged inputs equal loops over single examples."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher

_LENGTHS = [3, 1, 4, 0, 5, 2, 6, 1]  # one example has no token
_TOKENS = tf.RaggedTensor.from_row_lengths(
    np.random.default_rng(0).integers(0, 7, sum(_LENGTHS)), _LENGTHS
)
_NUMBERS = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
_Y = np.arange(8) % 3


class Tokens(keras.Model):
    """Tokens of any number, and numbers, to three logits."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 4)
        self.hidden = layers.Dense(5, activation="tanh")
        self.out = layers.Dense(3)

    def call(self, x):
        tokens = x["tokens"]
        vectors = tokens.with_values(self.embedding(tokens.values))
        summed = tf.ensure_shape(tf.reduce_sum(vectors, axis=1), (None, 4))
        return self.out(tf.concat([self.hidden(summed), x["numbers"]], axis=1))


def _data(begin=0, end=8):
    return {"tokens": _TOKENS[begin:end], "numbers": _NUMBERS[begin:end]}


def _model(**kwargs):
    keras.utils.set_random_seed(2)
    model = training.compiled(
        Tokens(), metrics=None, **{"jit_compile": False, **kwargs}
    )
    model(_data())
    model.embedding.embeddings.assign(model.embedding.embeddings * 20)
    return model


def _expected(model, labels=None):
    """‖g‖² by example, variable and label, from passes of one example each."""
    variables = model.trainable_variables
    norms = np.zeros([8, len(variables), 3])
    probabilities = np.zeros([8, 1, 3])
    for i in range(8):
        with tf.GradientTape(persistent=True) as tape:
            log_p = tf.nn.log_softmax(model(_data(i, i + 1)))[0]
            each = tf.unstack(log_p)
        probabilities[i] = np.exp(log_p)
        for label, value in enumerate(each):
            gradients = tape.gradient(value, variables)
            norms[i, :, label] = [
                np.sum(np.square(tf.convert_to_tensor(g))) for g in gradients
            ]
    if labels is not None:
        return norms[np.arange(8), :, labels]
    return (norms * probabilities).sum(axis=-1)


def _trace(model, *data, **kwargs):
    return keras_fisher.fisher_trace(
        model, *data, **{"verbose": 0, "estimator": "exact", **kwargs}
    )


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("mode", [False, True])
def test_they_equal_loops(estimator, mode):
    model = _model()
    expected = _expected(model, _Y if estimator == "empirical" else None)
    kwargs = dict(estimator=estimator, training=mode)
    found = _trace(model, _data(), _Y, by="example", **kwargs)
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-4)
    found = _trace(model, _data(), _Y, by="variable", **kwargs)
    np.testing.assert_allclose(
        [*found.values()], expected.mean(axis=0), rtol=1e-4
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("num_samples", [1, 6])
def test_drawn_labels(num_samples):
    model = _model()
    options = dict(estimator="monte_carlo", num_samples=num_samples, seed=3)
    of_batch = _trace(model, _data(), by="example", **options)
    in_pieces = _trace(model, _data(), by="example", batch_size=3, **options)
    np.testing.assert_allclose(in_pieces, of_batch, rtol=1e-4)
    by_label = np.stack(
        [_expected(model, [k] * 8).sum(axis=1) for k in range(3)]
    )
    if num_samples == 1:  # Each is that of one of the labels.
        nearest = np.abs(by_label / of_batch - 1).min(axis=0)
        np.testing.assert_array_less(nearest, 1e-4)
    found, exact = _trace(model, _data(), **options), _expected(model)
    assert found == pytest.approx(of_batch.mean(), rel=1e-4)
    distance = abs(found - exact.sum(axis=1).mean())
    assert 0 < distance < 4 * found.standard_error


def test_batches_of_a_data_set_compile_a_few_times():
    model = _model()
    traces = []
    call = model.call

    def counted(x):
        traces.append(tf.executing_eagerly())
        return call(x)

    model.call = counted
    tokens = tf.ragged.stack([_TOKENS[i] for i in [*range(8)] * 4])
    x = {"tokens": tokens, "numbers": np.tile(_NUMBERS, [4, 1])}
    dataset = tf.data.Dataset.from_tensor_slices((x, np.tile(_Y, 4)))
    dataset = dataset.shuffle(32, seed=0).ragged_batch(4)
    found = _trace(model, dataset)
    expected = _expected(model).sum(axis=1).mean()
    assert found == pytest.approx(expected, rel=1e-4)
    assert traces.count(False) <= 4, "two functions, with a batch and one of it"


def test_xla_and_half_precision():
    expected = _expected(_model()).sum(axis=1).mean()
    assert _trace(_model(jit_compile=True), _data()) == pytest.approx(
        expected, rel=1e-4
    )
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert _trace(_model(), _data()) == pytest.approx(expected, rel=0.1)


class Normalized(Tokens):
    def __init__(self):
        super().__init__()
        self.normalization = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.normalization(super().call(x), training=training)


def test_statistics_over_ragged_examples_are_noticed():
    model = training.compiled(Normalized(), metrics=None, jit_compile=False)
    model(_data())
    assert _trace(model, _data()) > 0
    with pytest.raises(ValueError, match="statistics over the batch"):
        _trace(model, _data(), training=True)


class Padded(Tokens):
    def call(self, x):
        vectors = self.embedding(x["tokens"].to_tensor())
        return self.out(tf.reduce_sum(vectors, axis=1))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_padding_changes_has_no_trace_by_example(batch_size):
    model = training.compiled(Padded(), metrics=None, jit_compile=False)
    model(_data())
    # Two of the same length first.
    order = [1, 7, 0, 2, 3, 4, 5, 6]
    x = {
        "tokens": tf.gather(_TOKENS, order),
        "numbers": _NUMBERS[order],
    }
    assert _trace(model, x, steps=1, batch_size=2) > 0
    with pytest.raises(ValueError, match="depend on the other examples"):
        _trace(model, x, batch_size=batch_size)
    assert _trace(model, x, estimator="batch") > 0
