"""The paper's effect in minutes, on a laptop: `make demo`.

Trains SimpleCNN on mnist1d four times from the same weights: with a small and
a large learning rate, each without a penalty and with the Fisher Penalty.
Prints a table, and draws Tr(F) and the test accuracy over the steps.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import common
import keras
import matplotlib
import pandas as pd

import keras_fisher

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_ALPHA = flags.DEFINE_float(
    "alpha", 0.3, "Strength of the Fisher Penalty.", lower_bound=0.0
)
_EPOCHS = flags.DEFINE_integer("epochs", 120, "Passes over the data.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all four runs.", 0)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "demo", "Directory for the table, figure and TensorBoard."
)

_LEARNING_RATES = (0.01, 0.1)
_BATCH_SIZE = 128
_COLORS = {0.01: "tab:red", 0.1: "tab:blue"}


class EpochBar(keras.callbacks.Callback):
    """One progress bar for the whole run."""

    def on_train_begin(self, logs=None):
        self._bar = keras.utils.Progbar(
            self.params["epochs"],
            unit_name="epoch",
            stateful_metrics=["fisher_trace", "accuracy", "val_accuracy"],
        )

    def on_epoch_end(self, epoch, logs=None):
        shown = ("fisher_trace", "accuracy", "val_accuracy")
        self._bar.update(epoch + 1, [(name, logs[name]) for name in shown])


def train(learning_rate: float, alpha: float | None) -> dict:
    """Trains one of the four networks.

    Returns:
        The row of the table, with the curves under `"trace"` and
        `"test_accuracy"` (pandas series by step).
    """
    keras.utils.set_random_seed(_SEED.value)
    data, test, classes = common.load_data(
        "mnist1d", _BATCH_SIZE, seed=_SEED.value
    )
    model = keras_fisher.FisherModel(
        common.build_network("simple_cnn", (40, 1), classes),
        penalty=None if alpha is None else keras_fisher.FisherPenalty(alpha),
        trace_every=4,
        seed=_SEED.value,
    )
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Worth it on CPUs for one-dimensional convolutions.
        jit_compile=True,
        steps_per_execution=len(data),
    )
    name = f"lr={learning_rate}, {'FP' if alpha is not None else 'no penalty'}"
    print(name)
    fisher = common.FisherHistory()
    board = keras_fisher.callbacks.FisherTensorBoard(
        os.path.join(_OUTPUT_DIR.value, "logs", name.replace(", ", "-"))
    )
    begin = time.perf_counter()
    history = model.fit(
        data,
        validation_data=test,
        epochs=_EPOCHS.value,
        callbacks=[fisher, board, EpochBar()],
        shuffle=False,  # the data set does
        verbose=0,
    ).history
    seconds = time.perf_counter() - begin
    trace = fisher.by_epoch(len(data))
    accuracy = pd.Series(history["val_accuracy"], index=trace.index)
    return {
        "learning rate": learning_rate,
        "penalty": "none" if alpha is None else f"FP, alpha={alpha:g}",
        "peak Tr(F)": trace.max(),
        "train accuracy": history["accuracy"][-1],
        "test accuracy": history["val_accuracy"][-1],
        "seconds": seconds,
        "trace": trace,
        "test_accuracy": accuracy,
    }


def draw(runs: list[dict], path: str) -> None:
    """Draws Tr(F) and the test accuracy of all runs over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for run in runs:
        style = {
            "color": _COLORS[run["learning rate"]],
            "linestyle": "--" if run["penalty"] == "none" else "-",
            "label": f"learning rate {run['learning rate']:g}, "
            + ("no penalty" if run["penalty"] == "none" else "Fisher Penalty"),
        }
        left.plot(run["trace"].index, run["trace"], **style)
        right.plot(
            run["test_accuracy"].index, 100 * run["test_accuracy"], **style
        )
    left.set(
        title="Trace of the Fisher information",
        xlabel="step",
        ylabel="Tr(F), mean over an epoch",
        yscale="log",
    )
    right.set(
        title="Generalization",
        xlabel="step",
        ylabel="test accuracy, %",
        ylim=(50, 100),
    )
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    os.makedirs(_OUTPUT_DIR.value, exist_ok=True)
    runs = [
        train(learning_rate, alpha)
        for learning_rate in _LEARNING_RATES
        for alpha in (None, _ALPHA.value)
    ]
    table = pd.DataFrame(runs).drop(columns=["trace", "test_accuracy"])
    formats = {
        "peak Tr(F)": "{:.0f}".format,
        "train accuracy": "{:.1%}".format,
        "test accuracy": "{:.1%}".format,
        "seconds": "{:.0f}".format,
    }
    print()
    print(table.to_string(index=False, formatters=formats))
    table.to_csv(os.path.join(_OUTPUT_DIR.value, "table.csv"), index=False)
    figure = os.path.join(_OUTPUT_DIR.value, "fisher_explosion.png")
    draw(runs, figure)
    print(f"\nFigure: {figure}")
    print(f"TensorBoard: tensorboard --logdir={_OUTPUT_DIR.value}/logs")


if __name__ == "__main__":
    app.run(main)
