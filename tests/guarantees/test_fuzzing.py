"""Random networks, batches, penalties and schedules against brute force.

A few cases run each time, always the same; about a thousand in `test-all`,
others every time. A failure prints the smallest case that fails as plain data,
with which `_check_...` can be called.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st
import keras
import networks
import numpy as np
import pytest
import random_networks
from random_networks import Network
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher._common import random_draws
from keras_fisher._derivatives.independence import examples_are_independent
from keras_fisher.layers import FisherRegularization

_PENALTIES = (
    FisherPenalty,
    GradientPenalty,
    UniformLabelPenalty,
    InputGradientPenalty,
)
_PATTERNS = ("kernel", "bias$", "gamma|beta", "dense", "embedding", ".")
_EVEN = st.booleans()


def _try(check, cases, few, many, record_property, is_long):
    """Runs `check` on a few of the cases, or many; tells their number."""
    count = 0

    @hypothesis.settings(
        max_examples=many if is_long else few,
        derandomize=not is_long,
        print_blob=is_long,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        nonlocal count
        count += 1
        if count % 20 == 0:
            keras.utils.clear_session()  # and collect what is not freed
        if not is_long and hasattr(case, "mode"):
            case = case._replace(mode="eager")  # nothing to compile
        check(case)

    try:
        run()
    finally:
        record_property("random_cases", count)


_few_or_many = pytest.mark.parametrize(
    "is_long",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["few", "many"],
)


# What is drawn.


@st.composite
def _random_penalties(
    draw, network: Network, kinds=_PENALTIES, schedule=False, methods=True
):
    kinds = [
        kind
        for kind in kinds
        if not (kind is InputGradientPenalty and network.is_integer)
        and not (kind is UniformLabelPenalty and network.family == "gaussian")
    ]
    options = {}
    if schedule:
        options["every"] = draw(st.sampled_from((1, 2, 2, 3, 4)))
        options["reuse"] = draw(_EVEN)
        options["start"] = draw(st.sampled_from((0, 0, 1, 2)))
        length = draw(st.sampled_from((None, None, 1, 3)))
        if length is not None:
            options["stop"] = options["start"] + length
    if draw(_EVEN):
        options["fraction"] = draw(st.sampled_from((0.01, 0.3, 0.5, 0.8)))
    if draw(_EVEN):
        options["micro_batch_size"] = draw(st.sampled_from((1, 2, 3, 4)))
    if methods and draw(st.integers(0, 3)) == 3:
        options["method"] = "finite_difference"
    if draw(st.integers(0, 2)) == 2:
        options["exclude"] = [draw(st.sampled_from(_PATTERNS))]
    kind = draw(st.sampled_from(kinds))
    return kind(draw(st.sampled_from((0.5, 0.03, 2.0))), **options)


def _modes(graph: int, xla: int):
    """Eagerly, but in a graph or with XLA this many times out of 40."""
    return st.sampled_from(
        ("eager",) * (40 - graph - xla) + ("graph",) * graph + ("xla",) * xla
    )


# One penalty, on one batch.


class _OneBatch(NamedTuple):
    network: Network
    penalty: keras_fisher.penalties.Penalty
    size: int
    mode: str
    seed: int


@st.composite
def _batches(draw, single=True):
    mode = draw(_modes(16, 1))
    network = draw(
        random_networks.random_networks(single=single, for_xla=mode == "xla")
    )
    return _OneBatch(
        network,
        draw(_random_penalties(network)),
        draw(st.sampled_from((4, 5, 6, 3, 2, 1))),
        mode,
        draw(st.integers(0, 999)),
    )


class _Reference:
    """The penalty of a case by brute force, with the labels held fixed."""

    def __init__(self, case: _OneBatch, model, x, y):
        self._network, self._penalty = case.network, case.penalty
        self._model = model
        size, part = case.size, max(1, round(case.penalty.fraction * case.size))
        seed, rows = random_draws.draw(case.seed), np.arange(size)
        if case.penalty.fraction < 1:
            start = int(random_draws.integers([], size, seed))
            rows = (start + rows[:part]) % size
        if part < size and examples_are_independent(model):
            # The part runs by itself, with the masks of dropout drawn for it.
            x = keras.tree.map_structure(lambda t: tf.gather(t, rows), x)
            y, rows = tf.gather(y, rows), np.arange(len(rows))
        self._x, self._rows = x, rows
        self._labels = self._drawn(seed, y)
        step = case.penalty.micro_batch_size or part
        self._groups = [
            range(begin, min(begin + step, part))
            for begin in range(0, part, step)
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


@_few_or_many
def test_value_and_traces_equal_backward_passes_of_single_examples(
    is_long, record_property
):
    _try(_check_value, _batches(), 10, 400, record_property, is_long)


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


@_few_or_many
def test_gradient_equals_a_directional_difference(is_long, record_property):
    cases = _batches(single=False)
    _try(_check_gradient, cases, 6, 270, record_property, is_long)


# A few steps of training.


class _Run(NamedTuple):
    network: Network
    penalty: keras_fisher.penalties.Penalty | None
    trace_every: int | None
    as_layer: bool  # `FisherRegularization` rather than `FisherModel`
    examples: int
    size: int  # of a batch
    epochs: int
    steps_per_execution: int
    momentum: float
    accumulated: int | None
    weighted: bool
    mode: str
    seed: int


@st.composite
def _runs(draw, as_layer: bool):
    # The layer's step with a schedule takes a minute to trace.
    mode = draw(_modes(1, 0) if as_layer else _modes(8, 1))
    network = draw(
        random_networks.random_networks(
            for_xla=mode == "xla", single=mode != "xla", most_blocks=2
        )
    )
    # Differences of gradients magnify the rounding errors of single precision.
    methods = network.dtype == "float64" and mode != "xla"
    penalties = _random_penalties(network, schedule=True, methods=methods)
    if as_layer:
        kinds = (FisherPenalty, UniformLabelPenalty)
        penalties = _random_penalties(
            network, kinds, schedule=True, methods=methods
        )
    elif draw(st.integers(0, 5)) == 5:
        penalties = st.none()
    return _Run(
        network=network,
        penalty=draw(penalties),
        trace_every=None
        if as_layer
        else draw(st.sampled_from((1, 2, 3, None))),
        as_layer=as_layer,
        examples=draw(st.sampled_from((3, 4, 5, 6, 2, 1))),
        size=draw(st.sampled_from((2, 3, 4, 1))),
        epochs=draw(st.integers(1, 2)),
        steps_per_execution=draw(st.integers(1, 3)),
        momentum=draw(st.sampled_from((0.0, 0.9))),
        accumulated=None
        if as_layer
        else draw(st.sampled_from((None, None, 2))),
        # Keras does not multiply weights of examples with losses of many axes.
        weighted=(network.end != "keep" or len(network.shape) == 1)
        and draw(_EVEN),
        mode=mode,
        seed=draw(st.integers(0, 999)),
    )


def _data(run: _Run):
    model = random_networks.build(run.network)
    x, y = random_networks.batch(run.network, model, run.examples, run.seed)
    data = (x, y)
    if run.weighted:
        data += (tf.linspace(tf.constant(0.5, run.network.dtype), 2.0, len(y)),)
    return tf.data.Dataset.from_tensor_slices(data).batch(run.size)


@contextlib.contextmanager
def _losses_of(run: _Run):
    """Keras adds up losses in one precision, of layers and its own, alone."""
    keras.config.set_floatx(run.network.dtype if run.as_layer else "float32")
    try:
        yield
    finally:
        keras.config.set_floatx("float32")


def _optimizer(run: _Run):
    return keras.optimizers.SGD(
        0.02,
        momentum=run.momentum,
        gradient_accumulation_steps=run.accumulated,
    )


def _around(run: _Run, network, seed, **options):
    """The network with the penalty of a run, compiled."""
    likelihood = random_networks.likelihood_of(run.network)
    if run.as_layer:
        inputs = network.input
        layer = FisherRegularization(
            network, run.penalty, likelihood=likelihood, seed=seed
        )
        model = keras.Model(inputs, layer(inputs))
    else:
        model = FisherModel(
            network,
            run.penalty,
            likelihood=likelihood,
            trace_every=run.trace_every,
            seed=seed,
        )
    model.compile(
        options.pop("optimizer", None) or _optimizer(run),
        random_networks.loss_of(run.network),
        run_eagerly=run.mode == "eager",
        jit_compile=run.mode == "xla",
        steps_per_execution=run.steps_per_execution,
    )
    return model


class _Recorded(keras.callbacks.Callback):
    """What is measured, a row for each step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        found = self.model.measurements
        self.rows += zip(
            found.step, found.batch_size, found.penalty, found.trace_by_variable
        )


class _Loop:
    """Training by hand, with the schedule spelled out."""

    def __init__(self, run: _Run, model):
        self._run, self._model = run, model
        self._likelihood = random_networks.likelihood_of(run.network)
        self._loss = random_networks.loss_of(run.network)
        self._seed = keras.random.SeedGenerator(run.seed)
        self._optimizer = _optimizer(run)
        self._optimizer.build(model.trainable_variables)
        self._stored = [0.0 for _ in model.trainable_variables]
        self._micro_step = 0
        self.trace, self.value = math.nan, 0.0
        self.rows, self.losses = [], []

    def epoch(self, data) -> None:
        loss, count = 0.0, 0
        for x, y, *weight in data:
            size = y.shape[0]
            loss += size * self._step(x, y, *weight)
            count += size
        self.losses.append(loss / count)

    def _step(self, x, y, weight=None) -> float:
        run, model, penalty = self._run, self._model, self._run.penalty
        accumulated = run.accumulated or 1
        number = self._micro_step // accumulated
        self._micro_step += 1
        is_fresh = is_reused = False
        if penalty is not None:
            stop = math.inf if penalty.stop is None else penalty.stop
            is_active = penalty.start <= number < stop
            is_turn = (number - penalty.start) % penalty.every == 0
            is_fresh = is_active and is_turn
            is_reused = is_active and not is_turn and penalty.reuse
        in_passing = is_fresh and isinstance(penalty, FisherPenalty)
        by_itself = (
            run.trace_every is not None and number % run.trace_every == 0
        )
        value, traces = math.nan, None
        with tf.GradientTape(persistent=True) as tape:
            if is_fresh or run.as_layer:
                forward = penalty.forward(model, x, seed=self._seed)
            else:
                forward = FisherPenalty().forward(model, x)
            loss = self._loss(y, forward.outputs, weight)
            if is_fresh:
                term = penalty(forward, self._likelihood, y, seed=self._seed)
                # Of all batches that make up a step, each has its share.
                share = term.value
                if not isinstance(penalty, InputGradientPenalty):
                    share /= accumulated
                value, traces = share, term.traces
        if by_itself and not in_passing:
            probe = FisherPenalty()(forward, self._likelihood, seed=self._seed)
            traces = probe.traces
        variables = [v.value for v in model.trainable_variables]
        gradients = self._dense(tape.gradient(loss, variables))
        if is_fresh:
            self.value = float(value)
            self._stored = self._dense(
                tape.gradient(
                    share,
                    variables,
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
            )
        if is_fresh or is_reused:
            gradients = [g + p for g, p in zip(gradients, self._stored)]
        self._optimizer.apply(gradients, model.trainable_variables)
        if by_itself or in_passing:
            self.trace = float(np.sum(traces))
        if by_itself or is_fresh:
            nothing = np.full(len(variables), math.nan)
            traces = nothing if traces is None else np.array(traces)
            self.rows.append((number, y.shape[0], float(value), traces))
        is_in_loss = run.as_layer and (is_fresh or is_reused)
        return float(loss) + (self.value if is_in_loss else 0.0)

    def _dense(self, gradients):
        return [tf.convert_to_tensor(g) for g in gradients]


def _check_training(run: _Run):
    with _losses_of(run):
        _compare_training(run)


def _compare_training(run: _Run):
    network = random_networks.build(run.network)
    data = _data(run)
    # Another one with the same names of variables, for `exclude`.
    reference = random_networks.build(run.network)
    model = _around(run, network, run.seed)
    recorded = _Recorded()
    logs = model.fit(
        data,
        epochs=run.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[] if run.as_layer else [recorded],
    ).history

    loop = _Loop(run, reference)
    if run.network.dtype == "float32":
        options = dict(rtol=2e-3, atol=1e-4)
    elif run.mode != "xla" and getattr(run.penalty, "method", "") != (
        "finite_difference"
    ):
        options = dict(rtol=1e-7, atol=1e-9)
    else:
        options = dict(rtol=1e-4, atol=1e-5)
    for epoch in range(run.epochs):
        loop.epoch(data)
        for name, value in [
            ("fisher_trace", loop.trace),
            ("fisher_penalty", loop.value),
        ]:
            if name in logs:
                np.testing.assert_allclose(
                    logs[name][epoch], value, **options, err_msg=name
                )
    # Keras averages in single precision.
    np.testing.assert_allclose(logs["loss"], loop.losses, rtol=1e-3, atol=1e-5)
    for variable, expected in zip(network.weights, reference.weights):
        np.testing.assert_allclose(
            variable.numpy(), expected.numpy(), **options, err_msg=variable.path
        )
    if run.as_layer:
        assert ("fisher_trace" in logs) and ("fisher_penalty" not in logs)
        return
    # Of the batches that make up a step, one at least is told of.
    rows = iter(loop.rows)
    if run.accumulated:
        assert {row[0] for row in recorded.rows} == {r[0] for r in loop.rows}
    else:
        numbers = [row[0] for row in loop.rows]
        assert [row[0] for row in recorded.rows] == numbers
    for found in recorded.rows:
        assert any(_is_close(found, row, options) for row in rows), (
            found,
            loop.rows,
        )


def _is_close(found, expected, options) -> bool:
    """Whether two rows have the same step, batch size, penalty and traces."""
    return all(
        np.allclose(a, b, equal_nan=True, **options)
        for a, b in zip(found, expected, strict=True)
    )


@_few_or_many
def test_fit_equals_a_loop_with_the_schedule_spelled_out(
    is_long, record_property
):
    cases = _runs(as_layer=False)
    _try(_check_training, cases, 3, 130, record_property, is_long)


@_few_or_many
def test_the_layer_equals_a_loop_with_the_schedule_spelled_out(
    is_long, record_property
):
    cases = _runs(as_layer=True)
    _try(_check_training, cases, 3, 60, record_property, is_long)


# Tr(F) on data.


class _Trace(NamedTuple):
    network: Network
    estimator: str
    by: str
    num_samples: int
    training: bool
    examples: int
    sizes: tuple[int, int]  # of batches, two ways to split
    as_dataset: bool
    seed: int


@st.composite
def _traces(draw):
    network = draw(random_networks.random_networks(most_blocks=2))
    estimator = draw(
        st.sampled_from(("monte_carlo", "exact", "empirical", "batch"))
    )
    by = ["total", "layer", "variable", "example"]
    # Statistics over the batch are a matter of `"batch"` alone, and there is
    # nothing to compare with where masks are drawn.
    may_train = estimator == "batch" and not (
        network.has("dropout") or network.has("nested")
    )
    return _Trace(
        network,
        estimator,
        draw(st.sampled_from(by[:3] if estimator == "batch" else by)),
        draw(st.integers(1, 3)),
        may_train and draw(_EVEN),
        draw(st.integers(1, 5)),
        (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        draw(_EVEN),
        draw(st.integers(0, 999)),
    )


def _squares_of_examples(case: _Trace, model, x, y, size) -> np.ndarray:
    """Of shape `(draws, rows, variables)`, one backward pass for each entry."""
    if case.estimator == "exact":
        return _enumerated(case, model, x)[None]
    # With batch statistics, if asked for.
    state = networks.state_of(model)
    step = size if case.training else case.examples
    outputs = tf.concat(
        [
            model(
                keras.tree.map_structure(lambda t, i=i: t[i : i + step], x),
                training=case.training,
            )
            for i in range(0, case.examples, step)
        ],
        axis=0,
    )
    networks.restore(state)
    likelihood = random_networks.likelihood_of(case.network)
    draws = 1 if case.estimator == "empirical" else case.num_samples
    squares = []
    for k in range(draws):
        labels = y
        if case.estimator != "empirical":
            # The labels of an example have a place of their own in the draw.
            seed = tf.constant([case.seed, k], tf.int64)
            labels = likelihood.sample(
                outputs, random_draws.from_example(seed, 0)
            )
        if case.estimator == "batch":
            squares.append(_squares_of_batches(case, model, x, labels, size))
            continue
        gradients = random_networks.gradients_of_examples(
            case.network, model, x, labels, training=False
        )
        squares.append(
            [[np.sum(np.square(g)) for g in each] for each in gradients]
        )
    return np.array(squares)


def _squares_of_batches(case, model, x, labels, size):
    """The shares of the batches in the mean of B ‖ĝ‖²."""
    rows = []
    for begin in range(0, case.examples, size):
        part, given = keras.tree.map_structure(
            lambda t, i=begin: t[i : i + size], (x, labels)
        )
        gradients = random_networks.gradients_of_examples(
            case.network, model, part, given, training=case.training
        )
        count = len(gradients)
        rows.append(
            [
                count * np.sum(np.square(sum(each) / count)) * count
                for each in zip(*gradients)
            ]
        )
    return rows


def _enumerated(case, model, x) -> np.ndarray:
    """Σ over parts and their answers of p ‖∇ log p‖²."""
    network = case.network
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x, training=False)
        mask = getattr(outputs, "_keras_mask", None)
        if network.family == "categorical":
            answers = [
                tf.fill(outputs.shape[:-1], tf.constant(c, tf.int64))
                for c in range(network.outputs)
            ]
        elif network.family == "bernoulli":
            answers = [tf.zeros_like(outputs), tf.ones_like(outputs)]
        else:
            # (y - f)² / 2σ² at y = f + σ has the gradient 1/σ, whose square
            # is the variance of the score.
            stddev = random_networks.likelihood_of(network).stddev
            answers = [tf.stop_gradient(outputs) + stddev]
        losses = [
            tf.unstack(
                tf.reshape(
                    random_networks.negative_log_likelihoods(
                        network, answer, outputs, mask
                    ),
                    [-1],
                )
            )
            for answer in answers
        ]
    parts = len(losses[0]) // case.examples
    squares = np.zeros([case.examples, len(model.trainable_variables)])
    for of_answer in losses:
        for i, loss in enumerate(of_answer):
            gradients = tape.gradient(
                loss,
                [v.value for v in model.trainable_variables],
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            p = 1.0 if network.family == "gaussian" else np.exp(-loss)
            # What is masked has no probability, and a gradient of zero.
            squares[i // parts] += [
                p * np.sum(np.square(tf.convert_to_tensor(g), dtype="float64"))
                for g in gradients
            ]
    return squares


def _check_trace(case: _Trace):
    model = random_networks.build(case.network)
    x, y = random_networks.batch(case.network, model, case.examples, case.seed)
    single = case.network.dtype == "float32"
    options = (
        dict(rtol=2e-3, atol=1e-5) if single else dict(rtol=1e-8, atol=1e-11)
    )
    for size in case.sizes:
        data, batch_size = (x, y), size
        if case.as_dataset:
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
            data, batch_size = (data,), None
        found = keras_fisher.fisher_trace(
            model,
            *data,
            estimator=case.estimator,
            num_samples=case.num_samples,
            by=case.by,
            likelihood=random_networks.likelihood_of(case.network),
            batch_size=batch_size,
            training=case.training,
            seed=case.seed,
            verbose=0,
        )
        squares = _squares_of_examples(case, model, x, y, size)
        _compare(case, model, found, squares, options)


def _compare(case, model, found, squares, options):
    means = squares.mean(axis=0)
    if case.by == "example":
        np.testing.assert_allclose(found, means.sum(axis=1), **options)
        return
    by_variable = means.sum(axis=0) / case.examples
    if case.by == "total":
        total = by_variable.sum()
        np.testing.assert_allclose(found, total, **options)
        error = found.standard_error
        if len(squares) > 1:
            variances = squares.sum(axis=2).var(axis=0, ddof=1)
            expected = np.sqrt(variances.sum() / len(squares)) / case.examples
            np.testing.assert_allclose(error, expected, **options)
        elif case.estimator in ("exact", "empirical"):
            assert error == 0, error
        return
    expected = {}
    for variable, value in zip(model.trainable_variables, by_variable):
        name = variable.path
        if case.by == "layer":
            name = name.rpartition("/")[0]
        expected[name] = expected.get(name, 0.0) + value
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **options, err_msg=name)


@_few_or_many
def test_traces_equal_loops_and_sums_over_all_labels_in_any_batches(
    is_long, record_property
):
    _try(_check_trace, _traces(), 2, 80, record_property, is_long)


# Resumed runs.


class _Resumed(NamedTuple):
    run: _Run
    optimizer: str
    after: int  # epochs
    through: str
    mode: str

    @property
    def network(self) -> Network:
        return self.run.network


@st.composite
def _resumptions(draw):
    run = draw(_runs(as_layer=draw(st.integers(0, 3)) == 3))
    return _Resumed(
        run,
        draw(st.sampled_from(("sgd", "adam", "rmsprop"))),
        draw(st.integers(1, 2)),
        draw(st.sampled_from(("file", "weights"))),
        "graph" if run.mode == "graph" else "eager",
    )


def _check_resumption(case: _Resumed):
    with _losses_of(case.run):
        _compare_resumption(case)


def _compare_resumption(case: _Resumed):
    run = case.run._replace(mode=case.mode)

    def made(seed=run.seed):
        optimizer = keras.optimizers.get(case.optimizer)
        optimizer.gradient_accumulation_steps = run.accumulated
        network = random_networks.build(run.network)
        return _around(run, network, seed, optimizer=optimizer)

    def fit(model, first, last):
        return model.fit(
            data, initial_epoch=first, epochs=last, shuffle=False, verbose=0
        ).history

    whole = made()
    data = _data(run)
    epochs = run.epochs + case.after
    expected = fit(whole, 0, epochs)
    half = made()
    logs = fit(half, 0, run.epochs)
    with tempfile.TemporaryDirectory() as directory:
        if case.through == "file":
            half.save(f"{directory}/model.keras")
            again = keras.models.load_model(f"{directory}/model.keras")
        else:
            half.save_weights(f"{directory}/half.weights.h5")
            again = made(run.seed + 1)
            for variable in again.trainable_variables:
                variable.assign(tf.zeros_like(variable))
            again.optimizer.build(again.trainable_variables)
            again.load_weights(f"{directory}/half.weights.h5")
    more = fit(again, run.epochs, epochs)
    assert list(more) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(
            logs[name] + more[name], values, err_msg=name
        )
    for a, b in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@_few_or_many
def test_resumed_runs_end_as_if_they_had_never_stopped(
    is_long, record_property
):
    _try(_check_resumption, _resumptions(), 2, 80, record_property, is_long)
