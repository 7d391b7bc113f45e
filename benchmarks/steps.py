"""Step time through `fit`, side by side with `keras.Model.fit`.

All sides train the same network on the same data in this one process, taking
turns, so that what else the machine does falls on all of them alike. Prints
the median time of a step and its ratio to plain Keras, with the quartiles of
the ratio over rounds.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherPenalty

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each side.", 3)
_STEPS = flags.DEFINE_integer("steps", 310, "Steps in a turn.", 1)
_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 31, "Steps in one call of the train function.", 1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Examples a step.", 1)
_JIT = flags.DEFINE_boolean("jit", True, "Whether to compile with XLA.")
_SHAPE = flags.DEFINE_list(
    "shape", ["40", "1"], "Input shape of SimpleCNN, as 40,1 or 32,32,3."
)
_ONLY = flags.DEFINE_list(
    "only", [], "Names of the sides to run; all if empty."
)

_SIDES = {
    "keras.Model": None,
    "no penalty no trace": dict(trace_every=None),
    "trace every 10": dict(),
    "trace every 50": dict(trace_every=50),
    "FP every 1": dict(penalty=FisherPenalty(0.1)),
    "FP every 10": dict(penalty=FisherPenalty(0.1, every=10)),
    "FP every 10 not reused": dict(
        penalty=FisherPenalty(0.1, every=10, reuse=False)
    ),
    "FP fraction 1/8": dict(penalty=FisherPenalty(0.1, fraction=1 / 8)),
    "FP finite difference": dict(
        penalty=FisherPenalty(0.1, method="finite_difference")
    ),
    "GP": dict(penalty="gradient", trace_every=None),
}


def compiled(arguments: dict | None) -> keras.Model:
    """One side: a network with fixed initial weights, ready to fit."""
    keras.utils.set_random_seed(0)
    shape = tuple(int(size) for size in _SHAPE.value)
    model = keras_fisher.applications.SimpleCNN(shape, classes=10)
    if arguments is not None:
        model = keras_fisher.FisherModel(model, seed=0, **arguments)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=_JIT.value,
        steps_per_execution=_PER_EXECUTION.value,
    )
    return model


def dataset() -> tf.data.Dataset:
    """Random batches, made once, so that only the step takes time."""
    random = np.random.default_rng(0)
    shape = tuple(int(size) for size in _SHAPE.value)
    x = random.normal(size=(_BATCH_SIZE.value, *shape)).astype("float32")
    y = random.integers(0, 10, size=_BATCH_SIZE.value)
    return tf.data.Dataset.from_tensors((x, y)).cache().repeat(_STEPS.value)


def main(argv: list[str]) -> None:
    del argv
    names = _ONLY.value or list(_SIDES)
    models = {name: compiled(_SIDES[name]) for name in ["keras.Model", *names]}
    data = dataset()
    first, times = {}, {name: [] for name in models}
    for name, model in models.items():
        begin = time.perf_counter()
        model.fit(data.take(_PER_EXECUTION.value), verbose=0)
        first[name] = time.perf_counter() - begin
    for _ in range(_ROUNDS.value):
        for name, model in models.items():
            begin = time.perf_counter()
            model.fit(data, verbose=0)
            times[name].append((time.perf_counter() - begin) / _STEPS.value)

    plain = np.array(times["keras.Model"])
    print(f"{'':26}  ms/step  ratio  (quartiles)    first call, s")
    for name in models:
        low, ratio, high = np.percentile(times[name] / plain, [25, 50, 75])
        print(
            f"{name:26}{1e3 * np.median(times[name]):9.3f}{ratio:7.2f}"
            f"  ({low:.2f}, {high:.2f}){first[name]:14.1f}"
        )


if __name__ == "__main__":
    app.run(main)
