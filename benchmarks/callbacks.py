"""What watching costs: `FisherTensorBoard` against Keras's own callback.

The same network trains on mnist1d in whole fits that take turns: without a
callback, with `keras.callbacks.TensorBoard`, and with `FisherTensorBoard`.
All measure Tr(F) alike; what differs is what is written. Prints the median
time of a fit and its ratio to Keras's callback, with the quartiles of the
ratio over rounds.
"""

from __future__ import annotations

import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

import keras_fisher

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each side.", 3)
_EPOCHS = flags.DEFINE_integer("epochs", 40, "Epochs in a turn.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Examples a step.", 1)
_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Steps in one call of the train function.", 1
)
_PENALTY = flags.DEFINE_boolean(
    "penalty", False, "Whether to penalize, and so to measure, at every step."
)

_KERAS = "keras.callbacks.TensorBoard"
_SIDES = {
    "no callback": None,
    _KERAS: keras.callbacks.TensorBoard,
    "FisherTensorBoard": keras_fisher.callbacks.FisherTensorBoard,
}


def compiled() -> keras.Model:
    """The network, the same for all sides."""
    keras.utils.set_random_seed(0)
    model = keras_fisher.FisherModel(
        keras_fisher.applications.SimpleCNN((40, 1), classes=10),
        penalty=0.1 if _PENALTY.value else None,
        trace_every=10,
        seed=0,
    )
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
        steps_per_execution=_PER_EXECUTION.value,
    )
    return model


def fit(model: keras.Model, data: tf.data.Dataset, callback) -> float:
    """Seconds for one fit, in a log directory of its own."""
    model.optimizer.iterations.assign(0)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [] if callback is None else [callback(directory)]
        begin = time.perf_counter()
        model.fit(data, epochs=_EPOCHS.value, callbacks=callbacks, verbose=0)
        return time.perf_counter() - begin


def main(argv: list[str]) -> None:
    del argv
    data = keras_fisher.datasets.load("mnist1d", "train").cache()
    data = data.batch(_BATCH_SIZE.value, drop_remainder=True)
    models = {name: compiled() for name in _SIDES}
    times = {name: [] for name in _SIDES}
    for name, model in models.items():
        fit(model, data.take(1), _SIDES[name])  # compiles, and imports
    for _ in range(_ROUNDS.value):
        for name, model in models.items():
            times[name].append(fit(model, data, _SIDES[name]))
    print(f"{'':28}  s/fit  ratio  (quartiles)")
    for name in _SIDES:
        ratios = np.divide(times[name], times[_KERAS])
        low, ratio, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{name:28}{np.median(times[name]):7.2f}{ratio:7.3f}"
            f"  ({low:.3f}, {high:.3f})"
        )


if __name__ == "__main__":
    app.run(main)
