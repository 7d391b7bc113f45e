"""What cheaper penalties cost in test accuracy, at equal epochs and time.

Trains SimpleCNN on mnist1d with the Fisher Penalty on the whole batch at every
step, on a random eighth of it, and every 10 steps, from several seeds. Prints
and writes the test accuracy after all epochs, and at the time when the fastest
of the penalized sides has made all of its epochs.
"""

from __future__ import annotations

import functools
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app
from absl import flags
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from workers import data
from workers import machine
from workers import reports

import keras_fisher
from keras_fisher import FisherPenalty

_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", 2)
_EPOCHS = flags.DEFINE_integer("epochs", 120, "Passes over the data.", 1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.03, "Of SGD.", 0.0)
_ALPHA = flags.DEFINE_float("alpha", 0.3, "Of the penalty at each step.", 0.0)
_REUSED_ALPHA = flags.DEFINE_float(
    "reused_alpha",
    0.1,
    "Of the penalty whose gradient is reused; it wants a smaller one.",
    0.0,
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "benchmarks/results",
    "Where to write the table, from the root of the repository.",
)

_BATCH_SIZE = 128
_NONE = "none"


def penalties() -> dict[str, FisherPenalty | None]:
    """The sides."""
    alpha, reused = _ALPHA.value, _REUSED_ALPHA.value
    unbounded = functools.partial(FisherPenalty, bound=None)
    return {
        _NONE: None,
        "every 1": unbounded(alpha),
        "every 1, fraction 1/8": unbounded(alpha, fraction=1 / 8),
        "every 10, reused": unbounded(reused, every=10),
        "every 10, not reused": unbounded(alpha, every=10, reuse=False),
    }


class _Clock(keras.callbacks.Callback):
    """Seconds of training, without evaluation, and accuracies."""

    def __init__(self, test):
        super().__init__()
        self._test = test
        self.seconds, self.accuracies = [0.0], []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        passed = time.perf_counter() - self._begin
        # The first epoch compiles.
        passed = 0.0 if epoch == 0 else passed
        self.seconds.append(self.seconds[-1] + passed)
        _, accuracy = self.model.evaluate(*self._test, 1000, verbose=0)
        self.accuracies.append(accuracy)


def curve(penalty: FisherPenalty | None, seed: int) -> pd.DataFrame:
    """Seconds and test accuracy after each epoch."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, test = (
        next(iter(keras_fisher.datasets.load("mnist1d", split).batch(10_000)))
        for split in ("train", "test")
    )
    model = keras_fisher.FisherModel(
        keras_fisher.applications.SimpleCNN((40, 1), 10),
        penalty,
        trace_every=None,
        seed=seed,
    )
    model.compile(
        keras.optimizers.SGD(_LEARNING_RATE.value, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
        # All but the last batch, which is smaller.
        steps_per_execution=len(train[0]) // _BATCH_SIZE,
    )
    clock = _Clock(test)
    # Full batches, so that nothing is compiled again.
    batches = (
        tf.data.Dataset.from_tensor_slices(train)
        .shuffle(len(train[0]), seed=seed)
        .batch(_BATCH_SIZE, drop_remainder=True)
    )
    model.fit(
        data.untuned(batches),
        epochs=_EPOCHS.value,
        callbacks=[clock],
        shuffle=False,
        verbose=0,
    )
    return pd.DataFrame(
        {
            "epoch": np.arange(1, _EPOCHS.value + 1),
            "seconds": clock.seconds[1:],
            "accuracy": clock.accuracies,
        }
    )


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """A row for each side."""
    totals = curves.groupby(["side", "seed"])["seconds"].max()
    medians = totals.groupby("side").median()
    shortest = medians.drop(_NONE).min()
    rows = []
    for side, runs in curves.groupby("side", sort=False):
        last = runs.groupby("seed")["accuracy"].last()
        in_time = runs[runs["seconds"] <= shortest]
        timed = in_time.groupby("seed")["accuracy"].last()
        rows.append(
            {
                "penalty": side,
                "accuracy %": 100 * last.mean(),
                "±": 100 * last.sem(),
                "seconds": medians[side],
                f"accuracy % after {shortest:.0f} s": 100 * timed.mean(),
                "± ": 100 * timed.sem(),
            }
        )
    return pd.DataFrame(rows)


def report(shown: pd.DataFrame) -> str:
    """The table, and what it was found with."""
    cells = [
        [side, *(f"{figure:.1f}" for figure in figures)]
        for side, *figures in shown.values
    ]
    return "\n".join(
        [
            "# Test accuracy with cheaper penalties",
            "",
            f"Written by `{reports.command()}`: SimpleCNN on mnist1d, "
            f"{_EPOCHS.value} epochs, momentum SGD with learning rate "
            f"{_LEARNING_RATE.value}, {_SEEDS.value} seeds, α = {_ALPHA.value} "
            f"({_REUSED_ALPHA.value} where the gradient is reused); means with "
            "standard errors, median seconds after the first epoch.",
            "",
            reports.markdown(shown.columns, cells),
            "",
            reports.conditions(machine.versions(["tensorflow", "keras"])),
            "",
        ]
    )


def main(argv: list[str]) -> None:
    del argv
    parts = []
    for seed in range(_SEEDS.value):
        for side, penalty in penalties().items():
            part = curve(penalty, seed)
            parts.append(part.assign(side=side, seed=seed))
            print(f"seed {seed}, {side}: {part['accuracy'].iloc[-1]:.3f}")
    text = report(summary(pd.concat(parts)))
    print(text)
    output = reports.output_directory(_OUTPUT_DIR.value)
    (output / "accuracy.md").write_text(text)


if __name__ == "__main__":
    app.run(main)
