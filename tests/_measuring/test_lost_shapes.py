"""Tr(F) where graphs do not know how large their tensors are."""

from __future__ import annotations

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher.likelihoods import Categorical

_LOGITS = Categorical(from_logits=True)
_WORDS = tf.constant([["a b c"], ["b d e f b"], ["f"], ["c a d"]])
_TOKENS = np.random.default_rng(0).integers(0, 9, (4, 6))
_POINTS = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")


def _of_tokens(*after, classes=11, **embedding):
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, **embedding),
            *after,
            layers.Dense(classes),
        ]
    ), _TOKENS


class _Routed(keras.layers.Layer):
    """One of two dense layers, by the sign of the first input."""

    def build(self, shape):
        self.experts = [layers.Dense(5), layers.Dense(5)]
        for expert in self.experts:
            expert.build(shape)

    def call(self, x):
        which = tf.cast(x[:, 0] > 0, tf.int32)
        rows = tf.dynamic_partition(tf.range(tf.shape(x)[0]), which, 2)
        parts = tf.dynamic_partition(x, which, 2)
        return tf.dynamic_stitch(
            rows, [expert(part) for expert, part in zip(self.experts, parts)]
        )


def _text():
    vocabulary = layers.TextVectorization(9, output_sequence_length=5)
    vocabulary.adapt(["a b c d e f"])
    return keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            vocabulary,
            layers.Embedding(9, 4),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    ), _WORDS


_NETWORKS = {
    "lstm": lambda: _of_tokens(layers.LSTM(4)),
    "gru": lambda: _of_tokens(layers.GRU(4)),
    "unrolled": lambda: _of_tokens(layers.LSTM(4, unroll=True)),
    "masked": lambda: _of_tokens(layers.GRU(4), mask_zero=True),
    "both-ways": lambda: _of_tokens(layers.Bidirectional(layers.LSTM(3))),
    "cells": lambda: _of_tokens(layers.RNN(layers.LSTMCell(3))),
    "permuted": lambda: _of_tokens(layers.Permute((2, 1)), layers.Flatten()),
    "distributed": lambda: _of_tokens(
        layers.TimeDistributed(layers.Dense(2)), layers.Flatten()
    ),
    "tagger": lambda: _of_tokens(
        layers.LSTM(4, return_sequences=True), classes=3
    ),
    "text": _text,
    "routed": lambda: (
        keras.Sequential([keras.Input((4,)), _Routed(), layers.Dense(3)]),
        _POINTS,
    ),
}


def _by_example(model, x) -> np.ndarray:
    """E‖g_i‖², each label's gradient from a batch of one example."""
    norms = []
    for i in range(len(x)):
        with tf.GradientTape(persistent=True) as tape:
            scores = tf.nn.log_softmax(model(x[i : i + 1], training=False))
            scores = tf.reshape(scores, [-1, scores.shape[-1]])
            each = [tf.unstack(position) for position in tf.unstack(scores)]
        norms.append(0.0)
        for position in each:
            for score in position:
                gradients = tape.gradient(score, model.trainable_variables)
                norm = sum(
                    float(tf.reduce_sum(tf.square(tf.convert_to_tensor(g))))
                    for g in gradients
                    if g is not None
                )
                norms[-1] += float(tf.exp(score)) * norm
    return np.array(norms)


# The quickest of them, and the others.
@pytest.mark.parametrize(
    "name",
    ["permuted", *cases.slow(n for n in _NETWORKS if n != "permuted")],
)
def test_the_trace_is_that_of_single_examples(name):
    keras.utils.set_random_seed(0)
    model, x = _NETWORKS[name]()
    for variable in model.trainable_variables:
        variable.assign(2 * variable)
    found = keras_fisher.fisher_trace(
        model, x, estimator="exact", by="example", likelihood=_LOGITS
    )
    np.testing.assert_allclose(found, _by_example(model, x), rtol=2e-4)


@pytest.mark.parametrize(
    "name", ["permuted", *cases.slow(["text", "distributed"])]
)
def test_more_draws_than_stand_together(name):
    model, x = _NETWORKS[name]()
    trace = keras_fisher.fisher_trace(
        model, x, likelihood=_LOGITS, num_samples=12, seed=3
    )
    exact = keras_fisher.fisher_trace(
        model, x, likelihood=_LOGITS, estimator="exact"
    )
    assert abs(trace - exact) < 5 * trace.standard_error, (trace, exact)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["monte_carlo", "batch"])
@pytest.mark.parametrize("name", _NETWORKS)
def test_many_draws_in_a_loop(name, estimator):
    keras.utils.set_random_seed(0)
    model, x = _NETWORKS[name]()
    # Text has no kernels there.
    for jit_compile in (
        (False, True) if name not in ("text", "routed") else (0,)
    ):
        model.compile(jit_compile=jit_compile)
        trace, exact = (
            keras_fisher.fisher_trace(
                model, x, likelihood=_LOGITS, seed=3, **kwargs
            )
            for kwargs in (
                {"estimator": estimator, "num_samples": 40},
                {"estimator": "exact"},
            )
        )
        assert abs(trace - exact) < 4 * trace.standard_error, (trace, exact)
