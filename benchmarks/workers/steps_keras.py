"""One side of `steps.py` in Keras, which runs this in a process of its own.

Reads one command a line, and answers each with a line of JSON: `first`, the
seconds of a `fit` of one step, the first; `run <steps>`, the seconds of a step
in an epoch of so many in `fit`; `peak`, the most memory of this process before
the model was made and until now, in MB; `operations`, multiplications of a
step.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import arithmetic
import data
import keras
import machine
import networks
import sides
import tensorflow as tf

import keras_fisher


class _Clock(keras.callbacks.Callback):
    """Seconds of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self._begin


class Side:
    """A model under training.

    Args:
        network: Name of the network.
        side: Name of the side.
        jit: Whether to compile with XLA.
        per_execution: Steps in one call of the train function.
    """

    def __init__(self, network: str, side: str, jit: bool, per_execution: int):
        self._network = networks.find(network)
        self._side = sides.arguments(side, self._network.batch_size)
        self._jit, self._per_execution = jit, per_execution
        self._batch = tuple(map(tf.constant, self._network.batch()))
        self._before = machine.peak()
        self._model = self._compiled()

    def _compiled(self) -> keras.Model:
        keras.utils.set_random_seed(0)
        model = self._network.build()
        if self._side is not None:
            model = keras_fisher.FisherModel(model, seed=0, **self._side)
        model.compile(
            keras.optimizers.SGD(0.001, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=self._jit,
            steps_per_execution=self._per_execution,
        )
        return model

    def _fit(self, steps: int) -> float:
        # Made once, so that only the step takes time.
        batches = tf.data.Dataset.from_tensors(self._batch).cache()
        batches = data.untuned(batches.repeat(steps))
        clock = _Clock()
        self._model.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
        return clock.seconds

    def answer(self, command: str) -> Any:
        """What to answer a command."""
        verb, _, argument = command.partition(" ")
        if verb == "first":
            begin = time.perf_counter()
            self._fit(1)
            return time.perf_counter() - begin
        if verb == "run":
            steps = int(argument)
            return self._fit(steps) / steps
        if verb == "peak":
            return [self._before, machine.peak()]
        if verb == "operations":
            return arithmetic.operations_of_step(self._compiled(), self._batch)
        raise ValueError(f"Unknown command: {command}")


def main(network: str, side: str, jit: str, per_execution: str) -> None:
    made = Side(network, side, jit == "jit", int(per_execution))
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            reply = made.answer(line.strip())
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
