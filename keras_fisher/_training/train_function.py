"""The function that `fit` calls: steps, each by its plan, on the next batches.

And what the steps have measured, as callbacks read it.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._training import optimizers
from keras_fisher._training import replicas
from keras_fisher._training.first_look import FirstLook
from keras_fisher._training.measurements import NOTHING_MEASURED
from keras_fisher._training.measurements import Measurements
from keras_fisher._training.schedule import Plan
from keras_fisher._training.schedule import Schedule


class _Call:
    """One call of the train function, as the host knows it.

    Attributes:
        steps: All optimizer steps it may have made. Where there were fewer
            (the last ones of an epoch, or steps that loss scaling has skipped)
            the host is ahead, looks too early, and learns the true number.
        tensors: What was measured, not waited for.
        measurements: The same, once a callback has asked for it.
    """

    def __init__(self, steps: np.ndarray, tensors: dict[str, tf.Tensor]):
        self.steps = steps
        self.tensors = tensors
        self.measurements: Measurements | None = None


class TrainFunction:
    """Makes steps on the next batches of an iterator, as Keras's own does.

    There is one function for each plan, and another that picks one a step. Only
    the former are compiled by XLA: on CPUs, convolutions inside a conditional
    of a compiled function are an order of magnitude slower.

    Args:
        model: What is trained; says whether to compile, how many steps a call
            makes, and on which devices.
        schedule: The plans of the steps.
        step: Function of the batch of a replica, its `Division` (or None) and
            a plan. Makes a step; returns the logs and what was measured.
        begin: Function of the iterator, called as an epoch begins.
        first_look: Looks at the inputs of the first step.
        penalty_look: Looks at those of the first step with a fresh penalty; or
            None.
        measured: What is told as long as it has not been called.
    """

    def __init__(
        self,
        model: keras.Model,
        schedule: Schedule,
        step: Callable[
            [Any, replicas.Division | None, Plan], tuple[dict, dict]
        ],
        begin: Callable[[Any], None],
        first_look: FirstLook,
        penalty_look: FirstLook | None = None,
        measured: Measurements = NOTHING_MEASURED,
    ):
        self._model = model
        self._schedule = schedule
        self._step = step
        self._begin = begin
        self._first_look = first_look
        self._penalty_look = penalty_look
        self._measured_before = measured
        self._first_step = 0
        self._first_fresh_step: int | None = None
        self._count = model.steps_per_execution
        self._one_step = self._in_graph(
            self._on_all_replicas(
                {plan: self._compiled(plan) for plan in schedule.plans}
            )
        )
        self._many_steps = self._in_graph(
            _repeated(self._one_step, self._count)
        )
        self._last_call: _Call | None = None
        self._last_step = -1  # that measurements were told of
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the step: what was loaded before may have another one."""
        self._next_step: int | None = None

    def __call__(self, iterator) -> dict:
        """Makes the steps of one call; returns the logs of the last one."""
        if self._next_step is None:
            self._next_step = optimizers.step_of(self._model)
            if not optimizers.is_amid_step(self._model.optimizer):
                self._last_step = -1
            self._first_step = self._next_step
            self._first_fresh_step = self._schedule.next_fresh(self._next_step)
            self._begin(iterator)
        try:
            logs, measured = self._steps(iterator)
        except tf.errors.OpError:
            for look in (self._first_look, self._penalty_look):
                if look is not None:
                    look.raise_error()
            raise
        steps = np.arange(self._count) + self._next_step
        self._last_call = _Call(steps, measured)
        self._next_step += len(steps)
        penalty = self._model.penalty
        if penalty is not None and penalty.alpha_moves:
            logs = {**logs, "fisher_alpha": measured["alpha"][-1]}
        return logs

    def _steps(self, iterator) -> tuple[dict, dict]:
        if isinstance(
            iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)
        ):
            return self._many_steps(iterator)
        results = [
            self._one_step(_with_tensors(data))
            for _, data in zip(range(self._count), iterator)
        ]
        return results[-1][0], _stacked([measured for _, measured in results])

    def _in_graph(self, function):
        if self._model.run_eagerly:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)

    def _compiled(self, plan: Plan):
        """The step of one replica by a plan."""

        def step(data, division):
            return self._step(data, division, plan)

        if not self._model.jit_compile:
            return _after_its_batch(step)
        # XLA begins when all arguments are there.
        return tf.function(
            step, jit_compile=True, reduce_retracing=True, autograph=False
        )

    def _on_all_replicas(self, steps: dict[Plan, Callable]):
        """A step that picks its plan, its logs reduced over replicas."""
        strategy = self._model.distribute_strategy
        optimizer = self._model.optimizer

        def reduced(how, values):
            return keras.tree.map_structure(
                lambda value: strategy.reduce(how, value, axis=None), values
            )

        @_after_its_batch
        def one_step(data):
            data = _without_optionals(data)
            number = tf.cast(
                tf.convert_to_tensor(optimizer.iterations), tf.int64
            )
            division, copies = None, 1
            if strategy.num_replicas_in_sync > 1:
                # Here: no replica may ask the others in a conditional.
                sizes = strategy.run(_size_of, args=(data,))
                copies = replicas.copies(strategy, data)
                examples = reduced("SUM", sizes) // copies
                division = replicas.Division(examples, copies)

            def run(plan):
                logs, measured = strategy.run(
                    steps[plan], args=(data, division)
                )
                size = reduced("SUM", measured.pop("batch_size")) // copies
                logs, measured = reduced("MEAN", (logs, measured))
                return logs, {
                    **measured,
                    "batch_size": size,
                    "measured": tf.constant(plan.observes),
                }

            with tf.control_dependencies(self._watched(number, data)):
                logs, measured = self._schedule.choose(run, number)
            return logs, {"step": number, **measured}

        return one_step

    def _watched(self, number: tf.Tensor, data: Any) -> list:
        """What a step has to wait for, so that its inputs are looked at."""
        strategy = self._model.distribute_strategy
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        one = keras.tree.map_structure(
            lambda value: strategy.experimental_local_results(value)[0], x
        )
        looked = self._first_look.step(number, self._first_step, one)
        if self._penalty_look is not None:
            looked += self._penalty_look.step(
                number, self._first_fresh_step, one
            )
        return looked

    @property
    def measurements(self) -> Measurements:
        """What the last call has measured; waits for it if there is any."""
        call = self._last_call
        if call is None:
            return self._measured_before
        if call.measurements is None:
            call.measurements = self._measurements_of(call)
        return call.measurements

    def _measurements_of(self, call: _Call) -> Measurements:
        if not self._schedule.observed(call.steps).any():
            return NOTHING_MEASURED
        values = {k: np.asarray(v) for k, v in call.tensors.items()}
        self._next_step = int(values["step"][-1]) + 1
        # Of the batches whose gradients one step accumulates, the first.
        is_new = np.diff(values["step"], prepend=self._last_step) > 0
        self._last_step = int(values["step"][-1])
        kept = values.pop("measured") & is_new
        return Measurements.of({k: v[kept] for k, v in values.items()})


def _size_of(data) -> tf.Tensor:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    return replicas.local_size(x)


def _without_optionals(data):
    return keras.tree.map_structure(
        lambda x: None if isinstance(x, tf.experimental.Optional) else x, data
    )


def _with_tensors(data):
    """As a graph has it: `train_on_batch` hands on the arrays that it got."""
    return keras.tree.map_structure(
        lambda x: tf.convert_to_tensor(x) if isinstance(x, np.ndarray) else x,
        data,
    )


def _stacked(measurements: list[dict]) -> dict:
    return {
        key: tf.stack([m[key] for m in measurements]) for key in measurements[0]
    }


def _after_its_batch(function):
    """Decorates what is called with a batch: it does nothing if there is none.

    What does not depend on the batch, as counting steps and drawing seeds,
    would run beside the iterator that finds the data at an end. Replicas do not
    heed what the function that runs them waits for, so they wait themselves.
    """

    @functools.wraps(function)
    def after(*arguments):
        leaves = tf.nest.flatten(arguments, expand_composites=True)
        there = [leaf for leaf in leaves if tf.is_tensor(leaf)]
        with tf.control_dependencies([tf.group(there)]):
            return function(*arguments)

    return after


def _repeated(one_step, count: int):
    """Up to `count` steps on the next batches of an iterator.

    Returns:
        Function of an iterator that returns the logs of the last step and the
        measurements of all. It raises `tf.errors.OutOfRangeError` if there is
        no batch left to begin with.
    """

    def steps(iterator):
        logs, measured = one_step(iterator.get_next())
        if count == 1:
            return logs, _stacked([measured])
        arrays = {
            key: tf.TensorArray(
                value.dtype, count, element_shape=value.shape
            ).write(0, value)
            for key, value in measured.items()
        }

        def body(i, _, logs, arrays):
            batch = iterator.get_next_as_optional()

            def go_on():
                return True, *one_step(batch.get_value())

            def end():
                nothing = {
                    key: tf.zeros(value.shape, value.dtype)
                    for key, value in measured.items()
                }
                return False, logs, nothing

            more, logs, found = tf.cond(batch.has_value(), go_on, end)
            arrays = {k: a.write(i, found[k]) for k, a in arrays.items()}
            return i + tf.cast(more, tf.int32), more, logs, arrays

        i, _, logs, arrays = tf.while_loop(
            lambda i, more, *_: more & (i < count),
            body,
            (tf.constant(1), tf.constant(True), logs, arrays),
        )
        return logs, {k: a.gather(tf.range(i)) for k, a in arrays.items()}

    return steps
