"""Random runs against loops with the schedule spelled out."""

from __future__ import annotations

import contextlib
import math
import tempfile
from typing import NamedTuple

import fuzzing
from hypothesis import strategies as st
import keras
import numpy as np
import random_networks
from random_networks import Network
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher.layers import FisherRegularization


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
    mode = draw(fuzzing.modes(1, 0) if as_layer else fuzzing.modes(8, 1))
    network = draw(
        random_networks.random_networks(
            for_xla=mode == "xla", single=mode != "xla", most_blocks=2
        )
    )
    # Differences of gradients magnify the rounding errors of single precision.
    methods = network.dtype == "float64" and mode != "xla"
    penalties = fuzzing.random_penalties(
        network, schedule=True, methods=methods
    )
    if as_layer:
        kinds = (FisherPenalty, UniformLabelPenalty)
        penalties = fuzzing.random_penalties(
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
        and draw(fuzzing.EVEN),
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


@fuzzing.few_or_many
def test_fit_equals_a_loop_with_the_schedule_spelled_out(
    is_long, record_property
):
    cases = _runs(as_layer=False)
    fuzzing.try_cases(_check_training, cases, 3, 130, record_property, is_long)


@fuzzing.few_or_many
def test_the_layer_equals_a_loop_with_the_schedule_spelled_out(
    is_long, record_property
):
    cases = _runs(as_layer=True)
    fuzzing.try_cases(_check_training, cases, 3, 60, record_property, is_long)


class _Resumed(NamedTuple):
    run: _Run
    optimizer: str
    after: int  # epochs
    through: str
    mode: str

    @property
    def network(self) -> Network:
        return self.run.network


def _bounded(penalty, bound):
    if penalty is None:
        return None
    config = {**penalty.get_config(), "bound": bound, "warmup_steps": 3}
    return type(penalty).from_config(config)


@st.composite
def _resumptions(draw):
    run = draw(_runs(as_layer=draw(st.integers(0, 3)) == 3))
    bound = draw(st.sampled_from((None, 0.5)))
    return _Resumed(
        run._replace(penalty=_bounded(run.penalty, bound)),
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


@fuzzing.few_or_many
def test_resumed_runs_end_as_if_they_had_never_stopped(
    is_long, record_property
):
    fuzzing.try_cases(
        _check_resumption, _resumptions(), 2, 80, record_property, is_long
    )
