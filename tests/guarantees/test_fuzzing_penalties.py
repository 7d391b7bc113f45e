"""Random networks, penalties and batches against loops over examples."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import fuzzing
from hypothesis import strategies as st
import keras
import networks
import numpy as np
import random_networks
from random_networks import Network
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher._common import random_draws


class _OneBatch(NamedTuple):
    network: Network
    penalty: keras_fisher.penalties.Penalty
    size: int
    mode: str
    seed: int


@st.composite
def _batches(draw, single=True):
    mode = draw(fuzzing.modes(16, 1))
    network = draw(
        random_networks.random_networks(single=single, for_xla=mode == "xla")
    )
    return _OneBatch(
        network,
        draw(fuzzing.random_penalties(network)),
        draw(st.sampled_from((4, 5, 6, 3, 2, 1))),
        mode,
        draw(st.integers(0, 999)),
    )


class _Reference:
    """The penalty of a case by brute force, with the labels held fixed."""

    def __init__(self, case: _OneBatch, model, x, y):
        self._network, self._penalty = case.network, case.penalty
        self._model = model
        size = case.size
        chosen = max(1, round(case.penalty.fraction * size))
        seed, rows = random_draws.draw(case.seed), np.arange(size)
        if case.penalty.fraction < 1:
            start = int(
                random_draws.integers(
                    [], size, random_draws.draw(case.seed, stream=1)
                )
            )
            rows = (start + rows[:chosen]) % size
        if chosen < size and case.network.treats_examples_alone:
            # The subset runs by itself, with the masks of dropout drawn for it.
            x = keras.tree.map_structure(lambda t: tf.gather(t, rows), x)
            y, rows = tf.gather(y, rows), np.arange(len(rows))
        self._x, self._rows = x, rows
        self._labels = self._drawn(seed, y)
        step = case.penalty.micro_batch_size or chosen
        self._groups = [
            range(begin, min(begin + step, chosen))
            for begin in range(0, chosen, step)
        ]
        self._size = size

    def _drawn(self, seed, y):
        state = networks.state_of(self._model)
        outputs = tf.gather(self._model(self._x, training=True), self._rows)
        networks.restore(state)
        likelihood = random_networks.likelihood_of(self._network)
        if isinstance(self._penalty, FisherPenalty):
            return likelihood.sample(outputs, seed)
        if isinstance(self._penalty, UniformLabelPenalty):
            return likelihood.uniform(outputs, seed)
        return tf.gather(y, self._rows)

    def traces(self) -> np.ndarray:
        """(1/b') Σ_m ‖Σ_{i in m} g_i‖² of each variable, or input."""
        gradients = random_networks.gradients_of_examples(
            self._network,
            self._model,
            self._x,
            self._labels,
            self._rows,
            training=True,
            by_inputs=isinstance(self._penalty, InputGradientPenalty),
        )
        squares = 0.0
        for group in self._groups:
            sums = [sum(each) for each in zip(*(gradients[i] for i in group))]
            squares += np.array([np.sum(np.square(g)) for g in sums])
        return squares / len(self._rows)

    def value(self) -> float:
        penalty, traces = self._penalty, self.traces()
        if isinstance(penalty, InputGradientPenalty):
            return penalty.alpha * np.sum(traces)
        chosen = [
            not any(re.search(p, v.path) for p in penalty.exclude)
            for v in self._model.trainable_variables
        ]
        return penalty.alpha * np.sum(traces[chosen]) / self._size


def _evaluated(case: _OneBatch, model, x, y):
    """Value, traces and gradients of the penalty, and nothing changed."""
    likelihood = random_networks.likelihood_of(case.network)

    def evaluate(x, y):
        with tf.GradientTape() as tape:
            forward = case.penalty.forward(model, x, seed=case.seed)
            term = case.penalty(forward, likelihood, y, seed=case.seed)
        gradients = tape.gradient(
            term.value,
            [v.value for v in model.trainable_variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        traces = tf.zeros([0]) if term.traces is None else term.traces
        return term.value, traces, gradients, forward.outputs

    if case.mode != "eager":
        evaluate = tf.function(
            evaluate, jit_compile=case.mode == "xla", autograph=False
        )
    state = networks.state_of(model)
    result = evaluate(x, y)
    networks.restore(state)
    return result


def _made(case):
    model = random_networks.build(case.network)
    x, y = random_networks.batch(case.network, model, case.size, case.seed)
    return model, x, y


def _check_value(case: _OneBatch):
    model, x, y = _made(case)
    value, traces, _, outputs = _evaluated(case, model, x, y)
    reference = _Reference(case, model, x, y)
    single = case.network.dtype == "float32"
    expected = reference.traces()
    options = dict(
        rtol=2e-3 if single else 1e-8,
        atol=(1e-5 if single else 1e-12) * (1e-3 + np.sum(expected)),
    )
    np.testing.assert_allclose(
        value, reference.value(), **options, err_msg="value"
    )
    if isinstance(case.penalty, FisherPenalty):
        np.testing.assert_allclose(
            traces, expected, **options, err_msg="traces"
        )
    else:
        assert traces.shape == [0], "says nothing of Tr(F)"
    if not (case.network.has("dropout") or case.network.has("nested")):
        np.testing.assert_allclose(
            outputs,
            model(x, training=True),
            rtol=1e-4 if single else 1e-9,
            atol=1e-4 if single else 1e-9,
            err_msg="outputs, in the order of the batch",
        )


@fuzzing.few_or_many
def test_value_and_traces_equal_backward_passes_of_single_examples(
    is_long, record_property
):
    fuzzing.try_cases(
        _check_value, _batches(), 10, 400, record_property, is_long
    )


def _check_gradient(case: _OneBatch):
    model, x, y = _made(case)
    value, _, gradients, _ = _evaluated(case, model, x, y)
    reference = _Reference(case, model, x, y)
    random = np.random.default_rng(case.seed)
    direction = [random.normal(size=v.shape) for v in model.trainable_variables]
    slope = networks.directional_difference(
        reference.value, model.trainable_variables, direction
    )
    along = sum(np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction))
    scale = max(
        abs(slope),
        0.01 * _norm(gradients) * _norm(direction),
        1e-4 * float(value),
        1e-12,
    )
    error = abs(along - slope) / scale
    is_exact = case.penalty.method == "exact"
    assert error < (1e-5 if is_exact else 1e-3), (float(along), slope, error)


def _norm(arrays) -> float:
    return math.sqrt(sum(np.sum(np.square(a)) for a in arrays))


@fuzzing.few_or_many
def test_gradient_equals_a_directional_difference(is_long, record_property):
    cases = _batches(single=False)
    fuzzing.try_cases(_check_gradient, cases, 6, 270, record_property, is_long)
