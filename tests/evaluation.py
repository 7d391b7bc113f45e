"""A penalty evaluated as a training loop does, and by brute force."""

from __future__ import annotations

import networks
import numpy as np
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher._common import random_draws

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


def labels_of(model, x, rows=None):
    """The labels that `FisherPenalty` draws with `SEED`."""
    state = networks.state_of(model)
    outputs = model(x, training=True)
    networks.restore(state)
    if rows is not None:
        outputs = tf.gather(outputs, rows)
    return CATEGORICAL.sample(outputs, random_draws.draw(SEED))


def check_slope(function, model, gradients):
    """The derivative along a direction, against differences in float64."""
    direction = [
        np.random.default_rng(1).normal(size=v.shape)
        for v in model.trainable_variables
    ]
    slope = networks.directional_difference(
        function, model.trainable_variables, direction
    )
    along = sum(np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, slope, rtol=1e-6)


def check_against_brute_force(penalty, name, mode, groups=None, tolerance=1e-6):
    """Value and directional derivatives in float64."""
    model, x = networks.build(name, "float64")
    all_rows = [np.arange(networks.BATCH)]
    groups = all_rows if groups is None else groups
    rows = None if groups is all_rows else np.concatenate(groups)
    value, traces, gradients = run(mode, penalty, model, x)
    labels = labels_of(model, x, rows)

    def expected():
        trace = networks.brute_force_trace(
            model, x, CATEGORICAL, labels, groups
        )
        return penalty.alpha * trace / networks.BATCH

    reference = expected()
    np.testing.assert_allclose(value, reference, rtol=1e-9)
    np.testing.assert_allclose(
        penalty.alpha * np.sum(traces) / networks.BATCH, reference, rtol=1e-9
    )
    random = np.random.default_rng(0)
    for _ in range(2):
        direction = [
            random.normal(size=v.shape) for v in model.trainable_variables
        ]
        slope = networks.directional_difference(
            expected, model.trainable_variables, direction
        )
        along = sum(
            np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction)
        )
        scale = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
        scale *= np.sqrt(sum(np.sum(np.square(d)) for d in direction))
        error = abs(along - slope) / max(abs(slope), 0.01 * scale)
        assert error < tolerance, (along, slope, error)
