"""A penalty evaluated as a training loop does, and by brute force."""

from __future__ import annotations

import networks
import numpy as np
import tensorflow as tf

from keras_fisher import likelihoods

SEED = 11
CATEGORICAL = likelihoods.Categorical(from_logits=True)
Y = np.arange(networks.BATCH) % networks.CLASSES


def evaluated(penalty, model, x, y=Y, likelihood=CATEGORICAL):
    """Value, traces and gradients, as a training loop gets them."""
    with tf.GradientTape() as tape:
        forward = penalty.forward(model, x, seed=SEED)
        term = penalty(forward, likelihood, y, seed=SEED)
    gradients = tape.gradient(
        term.value,
        [v.value for v in model.trainable_variables],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    traces = tf.zeros([]) if term.traces is None else term.traces
    return term.value, traces, [tf.convert_to_tensor(g) for g in gradients]


def run(mode, penalty, model, x, *, unknown_batch_size=False):
    """`evaluated` from the current state, in one of the three modes."""

    def evaluate(x, y):
        return evaluated(penalty, model, x, y)

    function = evaluate
    y = tf.constant(Y)
    if mode != "eager":
        signature = tf.nest.map_structure(
            lambda t: tf.TensorSpec(
                [None if unknown_batch_size else t.shape[0], *t.shape[1:]],
                t.dtype,
            ),
            [x, y],
        )
        function = tf.function(
            evaluate,
            jit_compile=mode == "xla",
            input_signature=signature,
            autograph=False,
        )
    state = networks.state_of(model)
    results = function(x, y)
    networks.restore(state)
    return results


def relative(actual, expected):
    """The norm of a difference to that of what is expected."""
    actual, expected = (
        np.concatenate([np.ravel(t).astype("float64") for t in values])
        for values in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
