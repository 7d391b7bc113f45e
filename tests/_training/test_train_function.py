"""Which steps are made, and what callbacks learn of them."""

from __future__ import annotations

import foreign
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.datasets import add_label_noise


@pytest.mark.parametrize(
    "jit, steps",
    [
        (True, 7),
        *(
            pytest.param(jit, steps, marks=pytest.mark.slow)
            for jit, steps in [
                *[(False, 1), (False, 3), (False, 7)],
                *[(True, 1), (True, 3)],
            ]
        ),
    ],
)
def test_every_measured_step_reaches_callbacks_with_its_number(steps, jit):
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            measured = self.model.measurements
            seen.extend(zip(measured.step, measured.trace_by_variable.sum(1)))

    def run(steps, jit):
        seen.clear()
        model = FisherModel(
            training.network(dropout=False),
            FisherPenalty(0.1, every=5),
            trace_every=2,
            seed=3,
        )
        training.compiled(model, steps_per_execution=steps, jit_compile=jit)
        history = training.fit(model, callbacks=[Record()]).history
        np.testing.assert_allclose(seen[-1][1], history["fisher_trace"][-1])
        return list(seen)

    measured, expected = run(steps, jit), run(1, False)
    numbers = [0, 2, 4, 5, 6, 8, 10, 12]
    assert [n for n, _ in measured] == [n for n, _ in expected] == numbers
    np.testing.assert_allclose(
        [t for _, t in measured], [t for _, t in expected], rtol=1e-3
    )


class Sum(keras.layers.Layer):
    """Of what is there."""

    def call(self, x, y=None):
        return x if y is None else x + y


@pytest.mark.parametrize("steps", [1, 2])
def test_inputs_that_are_not_there_are_none(steps):
    """Data sets have `Optional` for them, for which Keras's steps get None."""

    def run(**kwargs):
        keras.utils.set_random_seed(1)
        x, y = keras.Input((4,), name="x"), keras.Input((4,), optional=True)
        network = keras.Model([x, y], keras.layers.Dense(3)(Sum()(x, y)))
        model = FisherModel(network, **kwargs) if kwargs else network
        training.compiled(model, steps_per_execution=steps)
        data = np.random.default_rng(0).normal(size=(16, 4)), np.arange(16) % 3
        nothing = tf.experimental.Optional.empty(None)
        batches = tf.data.Dataset.from_tensor_slices(data).batch(4)
        batches = batches.map(lambda x, y: ((x, nothing), y))
        model.fit(batches, verbose=0)
        found = model.evaluate([data[0], None], data[1], verbose=0)
        return network.get_weights(), found

    weights, expected = run()
    measured, found = run(trace_every=1)
    training.assert_equal(measured, weights)
    assert found == expected


def test_measurements_name_every_variable():
    model = FisherModel(training.network(), 0.1, trace_every=1)
    assert model.measurements.step.shape == (0,)
    training.fit(training.compiled(model))
    measured = model.measurements
    assert measured.trace_by_variable.shape == (1, 6)
    assert measured.penalty.shape == (1,)
    np.testing.assert_allclose(
        measured.penalty, 0.1 * measured.trace_by_variable.sum(1) / 2
    )  # the last batch has two examples


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_that_measure_nothing_are_not_waited_for(steps):
    """Their tensors are never looked at."""
    penalty = FisherPenalty(0.1, every=6, start=6)
    model = FisherModel(training.network(), penalty, trace_every=None)
    training.compiled(model, steps_per_execution=steps)
    looked_at = []

    class Tensors(dict):
        def items(self):
            looked_at.append(True)
            return super().items()

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            call = self.model.train_function._last_call
            call.tensors = Tensors(call.tensors)
            found = self.model.measurements
            assert len(found) == 6
            numbers.extend(found.step)

    numbers = []
    training.fit(model, callbacks=[Look()])  # 14 steps in two epochs
    assert numbers == [6, 12]
    # Once for each of them, and once where the epoch ended earlier than the
    # host could know.
    assert len(looked_at) <= 2 + (steps > 1)


def test_observed_steps_are_those_that_a_run_has_measured():
    penalty = FisherPenalty(0.1, every=3, start=2, stop=9)
    model = training.compiled(
        FisherModel(training.network(), penalty, trace_every=5)
    )
    assert np.flatnonzero(model._schedule.observed(np.arange(14))).tolist() == [
        *(0, 2, 5, 8, 10),
    ]
    nothing = FisherModel(training.network(), trace_every=None)
    assert not nothing._schedule.observed(np.arange(14)).any()
    assert nothing.measurements.step.shape == (0,)


def test_measurements_go_on_where_a_callback_sets_the_step():
    numbers = []

    class Rewind(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            numbers.extend(self.model.measurements.step)

        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.iterations.assign(3)

    model = training.compiled(FisherModel(training.network(), trace_every=4))
    training.fit(model, callbacks=[Rewind()])
    assert numbers == [0, 4, 4, 8]


def test_the_size_of_the_batch_is_measured():
    sizes = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            sizes.extend(self.model.measurements.batch_size)

    model = FisherModel(training.network(), trace_every=3)
    training.fit(
        training.compiled(model, steps_per_execution=2), 1, callbacks=[Record()]
    )
    assert sizes == [8, 8, 2]


class _CountingPenalty(FisherPenalty):
    """Counts how often it is traced."""

    def __init__(self):
        super().__init__(0.1)
        self.count = 0

    def labels(self, *args, **kwargs):
        self.count += 1
        return super().labels(*args, **kwargs)


@pytest.mark.few(1)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_traced_once(jit, masked):
    # TensorFlow would trace it twice if it created variables.
    penalty = _CountingPenalty()
    model = training.compiled(
        FisherModel(training.network(), penalty), jit_compile=jit
    )
    data = tf.data.Dataset.from_tensor_slices((training.X, training.Y))
    if masked:
        data = add_label_noise(data, 0.4, num_classes=3, seed=0)
    model.fit(data.batch(10), epochs=2, verbose=0)
    assert penalty.count == 1


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_step_that_accumulates_gradients_is_measured_once(
    steps_per_execution,
):
    """Also one that waits for its second batch from an epoch to the next."""
    seen, early = [], EarlyPhase()

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.extend(self.model.measurements.step.tolist())

    model = FisherModel(training.network(), 0.1, trace_every=1)
    training.compiled(
        model,
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        steps_per_execution=steps_per_execution,
    )
    training.fit(model, epochs=2, callbacks=[Steps(), early])
    assert seen == early.steps == [*range(7)]  # of seven batches an epoch


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", "xla", "eager"])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_step_is_counted_where_data_of_unknown_length_end(mode, steps):
    """Else the steps at which a penalty is fresh might never come."""
    x, y = tf.random.normal([12, 4]), tf.zeros([12], tf.int32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    data = data.filter(lambda x, y: True)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = FisherModel(network, FisherPenalty(0.1, every=4, start=3))
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
        steps_per_execution=steps,
    )
    logs = model.fit(data, epochs=3, verbose=0).history
    assert int(model.optimizer.iterations) == 9
    first, second, third = logs["fisher_penalty"]
    assert first == 0 and second > 0 and third not in (0, second)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_are_compiled_by_xla_if_the_model_is(jit_compile):
    """XLA refuses what runs outside of it; TensorFlow does not."""
    outside = foreign.Applied(foreign.outside_of_xla)
    network = keras.Sequential(
        [keras.Input((4,)), outside, keras.layers.Dense(3)]
    )
    model = FisherModel(network, 0.1)
    model.compile(loss="mse", jit_compile=jit_compile)
    batch = np.ones([2, 4], "float32"), np.ones([2, 3], "float32")
    if jit_compile:
        with pytest.raises(tf.errors.InvalidArgumentError, match="XLA_"):
            model.fit(*batch, verbose=0)
    else:
        model.fit(*batch, verbose=0)
