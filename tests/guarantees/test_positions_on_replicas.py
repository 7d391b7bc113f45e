"""Positions without a label, of which replicas have unequal numbers."""

from __future__ import annotations

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher.likelihoods import Categorical

_BATCH, _TOKENS, _CLASSES = 8, 4, 3
_EPOCHS, _ALPHA, _RATE, _IGNORED = 3, 0.3, 0.2, -1
_RANDOM = np.random.default_rng(5)
_X = _RANDOM.normal(size=(_BATCH, _TOKENS, 2))
_Y = _RANDOM.integers(0, _CLASSES, (_BATCH, _TOKENS))
# From the first example, which has all labels, to the last, which has one.
_HIDDEN = _RANDOM.permuted(
    np.arange(_TOKENS) < np.linspace(0, 3, _BATCH).round()[:, None], axis=1
)


class _Likeliest(Categorical):
    """Draws what the outputs say: replicas draw as one batch would."""

    def sample(self, outputs, seed):
        return tf.argmax(outputs, axis=-1, output_type=tf.int32)


_PENALTIES = {
    "labels": lambda **kwargs: GradientPenalty(_ALPHA, bound=None, **kwargs),
    "drawn": lambda **kwargs: FisherPenalty(_ALPHA, bound=None, **kwargs),
    "measured": None,
}


def _labels():
    return np.where(_HIDDEN, _IGNORED, _Y)


def _network():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((_TOKENS, 2)),
            keras.layers.Dense(4, activation="tanh", dtype="float64"),
            keras.layers.Dense(_CLASSES, dtype="float64"),
        ]
    )


def _flat(network):
    return np.concatenate([np.ravel(w) for w in network.get_weights()]).tolist()


def run(name, count=_BATCH, jit_compile=False):
    """Steps on one batch again and again.

    Args:
        name: One of `_PENALTIES`.
        count: Number of examples in the batch, which replicas share.
        jit_compile: As in `compile`.

    Returns:
        The weights, as one list, and the logs.
    """
    keras.config.set_floatx("float64")
    try:
        network, penalty = _network(), _PENALTIES[name]
        model = FisherModel(
            network,
            None if penalty is None else penalty(),
            trace_every=1 if penalty is None else None,
            likelihood=_Likeliest(from_logits=True, ignore_class=_IGNORED),
        )
        training.compiled(
            model,
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=_IGNORED
            ),
            keras.optimizers.SGD(_RATE),
            metrics=None,
            jit_compile=jit_compile,
        )
        data = tf.data.Dataset.from_tensors((_X[:count], _labels()[:count]))
        logs = model.fit(data, epochs=_EPOCHS, verbose=0).history
    finally:
        keras.config.set_floatx("float32")
    return {"weights": _flat(network), **logs}


def _losses(logits, labels):
    """-log p of labels by position, 0 where one is hidden."""
    visible = labels != _IGNORED
    log_p = tf.nn.log_softmax(logits)
    found = tf.gather(log_p, np.where(visible, labels, 0), batch_dims=2)
    return -tf.where(visible, found, tf.zeros_like(found))


def _by_hand(name, replicas, count=_BATCH):
    """The same from its parts: those of the batch, and of their positions."""
    network, logs = _network(), {}
    variables = network.trainable_variables
    size = -(-count // replicas)
    for _ in range(_EPOCHS):
        trace = value = mean = 0.0
        sums = [0.0] * len(variables)
        for begin in range(0, count, size):
            labels = _labels()[begin : min(begin + size, count)]
            x, share = _X[begin:][: len(labels)], len(labels) / count
            with tf.GradientTape() as tape:
                with tf.GradientTape() as inner:
                    logits = network(x)
                    used = labels
                    if name != "labels":
                        likeliest = np.argmax(logits, axis=-1)
                        used = np.where(labels < 0, _IGNORED, likeliest)
                    likelihood = tf.reduce_sum(_losses(logits, used))
                    likelihood /= len(labels)
                gradients = inner.gradient(likelihood, variables)
                norm = sum(tf.reduce_sum(g**2) for g in gradients)
                # α T / B of all, where T is the mean of b ‖ĝ‖² by examples.
                part = _ALPHA * norm * share**2
                # Keras's loss is the mean over the labels of a replica.
                losses = tf.reduce_sum(_losses(logits, labels))
                loss = losses / np.sum(labels >= 0)
                total = loss / replicas
                total += 0.0 if name == "measured" else part
            trace += float(norm) * len(labels) * share
            value += float(part)
            mean += float(loss) * share  # as Keras counts it
            gradients = tape.gradient(total, variables)
            sums = [a + b for a, b in zip(sums, gradients)]
        for variable, gradient in zip(variables, sums):
            variable.assign_sub(_RATE * gradient)
        found = {"loss": mean, "fisher_trace": trace, "fisher_penalty": value}
        for key, each in found.items():
            logs.setdefault(key, []).append(each)
    return {"weights": _flat(network), **logs}


def _assert_same(actual, expected, what):
    keys = {"weights", "loss", "fisher_trace", "fisher_penalty"} & {*actual}
    assert len(keys) >= 3, keys
    for key in keys:
        # Keras scales the loss by shares of labels in single precision.
        np.testing.assert_allclose(
            actual[key],
            expected[key],
            rtol=0,
            atol=1e-7 * np.max(np.abs(expected[key])),
            err_msg=f"{key}: {what}",
        )


def test_parts_have_unequal_numbers_of_labels():
    for size in (2, 4):
        parts = (_labels() >= 0).reshape(-1, size * _TOKENS).sum(axis=1)
        assert len(set(parts)) == len(parts) and parts.min() > 0, parts


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", _PENALTIES)
def test_one_replica_does_what_is_done_by_hand(name, jit_compile):
    found = run(name, jit_compile=jit_compile)
    _assert_same(found, _by_hand(name, 1), name)


_CASES = [(name, count) for name in _PENALTIES for count in (_BATCH, 7)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "cases"),
    [
        (2, [("labels", _BATCH), ("drawn", 7)]),
        pytest.param(2, _CASES, marks=pytest.mark.slow),
        pytest.param(4, _CASES, marks=pytest.mark.slow),
    ],
)
def test_replicas_leave_them_out_as_one_with_the_same_examples(replicas, cases):
    calls = [("run", *case) for case in cases]
    [results] = clusters.results(
        "test_positions_on_replicas", "replicas", replicas, *calls
    )
    for (name, count), found in zip(cases, results, strict=True):
        expected = _by_hand(name, replicas, count)
        _assert_same(found, expected, f"{name}, {count} on {replicas}")
