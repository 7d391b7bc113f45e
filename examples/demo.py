"""The paper's effects in minutes, on a laptop: `make demo`.

Trains SimpleCNN on mnist1d, or on what --dataset names, six times from the same
weights: with a small and a large learning rate, each without a penalty and with
the Fisher Penalty; and with 40 % of the labels redrawn, without and with it.
Prints a table and draws Tr(F), the test accuracy and the memorization of the
noisy labels, all of it read back from what TensorBoard shows.
"""

from __future__ import annotations

import math
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import common
import keras
import matplotlib
import pandas as pd
import seaborn

import keras_fisher
from keras_fisher import plotting

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_ALPHA = flags.DEFINE_float(
    "alpha", 1.0, "Strength of the Fisher Penalty.", lower_bound=0.0
)
_DATASET = flags.DEFINE_string(
    "dataset",
    "mnist1d",
    "Data set: mnist1d or digits, which need no download, fashion_mnist, or "
    "another TFDS name. Images take hours with the default number of epochs.",
)
_TRAIN_EXAMPLES = flags.DEFINE_integer(
    "train_examples",
    None,
    "Train on so many examples, the first ones; all if not given.",
    1,
)
_EPOCHS = flags.DEFINE_integer("epochs", 120, "Passes over the data.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all runs.", 0, 2**32 - 1)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "demo", "Directory for the table, figure and TensorBoard."
)

_LEARNING_RATES = (0.01, 0.1)
_NOISY_LEARNING_RATE = 0.03
_LABEL_NOISE = 0.4
_BATCH_SIZE = 128
_TRACE_EVERY = 4
# TrF_i is read where the training accuracy first is as large.
_EARLY_ACCURACY = 0.5


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


def train(
    log_dir: str, learning_rate: float, alpha: float | None, label_noise: float
) -> None:
    """Trains one of the networks, and writes what it shows to `log_dir`."""
    keras.utils.set_random_seed(_SEED.value)
    data = common.load_data(
        _DATASET.value,
        _BATCH_SIZE,
        label_noise=label_noise,
        train_examples=_TRAIN_EXAMPLES.value,
        seed=_SEED.value,
    )
    model = keras_fisher.FisherModel(
        common.build_network("simple_cnn", data.input_shape, data.classes),
        penalty=None if alpha is None else keras_fisher.FisherPenalty(alpha),
        trace_every=_TRACE_EVERY,
        seed=_SEED.value,
    )
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Worth it on CPUs for one-dimensional convolutions alone.
        jit_compile=True if len(data.input_shape) == 2 else "auto",
        steps_per_execution=len(data.train),
    )
    board = keras_fisher.callbacks.FisherTensorBoard(
        log_dir,
        early_phase=keras_fisher.callbacks.EarlyPhase(
            "accuracy", _EARLY_ACCURACY, warn_above=None
        ),
        write_every=_TRACE_EVERY,
        hyperparameters={"label_noise": label_noise},
    )
    model.fit(
        data.train,
        validation_data=data.test,
        epochs=_EPOCHS.value,
        callbacks=[board, EpochBar()],
        shuffle=False,  # the data set does
        verbose=0,
    )


def by_epoch(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of Tr(F) in each epoch, a column for each run.

    One estimate is unbiased and varies by tens of percent, so the largest of
    thousands would say more of the draw than of the network.
    """
    traces = frame[frame["tag"] == "fisher/trace"]
    steps = traces["step"].max() // _EPOCHS.value + 1
    epochs = traces["step"] // steps
    return traces.pivot_table("value", epochs, "run", sort=False)


def table(frame: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each run: what it was, and what came of it."""
    return pd.DataFrame(
        {
            "learning rate": runs["learning_rate"].map("{:g}".format),
            "label noise": runs["label_noise"],
            "penalty": [
                f"FP, alpha={row.alpha:g}" if row.alpha else "none"
                for row in runs.itertuples()
            ],
            "TrF_i": runs.get("early_trace", math.nan),
            "peak Tr(F)": by_epoch(frame).max(),
            "train accuracy": runs["accuracy"],
            "memorized": runs.get("noisy_accuracy", math.nan),
            "test accuracy": runs["val_accuracy"],
        }
    )


def draw(frame: pd.DataFrame, noisy: pd.Series, path: str) -> None:
    """Draws Tr(F), test accuracy and memorization over the steps."""
    is_noisy = frame["run"].map(noisy)
    clean_runs = frame[~is_noisy]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    plotting.trace(clean_runs, smooth=8, ax=left)
    # What comes after the networks have fit all examples is not the matter.
    left.set(title="Fisher explosion", ylim=(1, None))
    accuracy = clean_runs[
        (clean_runs["split"] == "validation")
        & (clean_runs["tag"] == "epoch_accuracy")
    ]
    seaborn.lineplot(
        x=accuracy["step"] + 1,
        y=100 * accuracy["value"],
        hue=accuracy["run"],
        palette="colorblind",
        legend=False,
        ax=middle,
    )
    middle.set(
        title="Generalization",
        xlabel="epoch",
        ylabel="test accuracy (%)",
        ylim=(min(50, 100 * accuracy["value"].min() - 2), 100),
    )
    plotting.memorization(frame[is_noisy], ax=right)
    right.set_title(f"{_LABEL_NOISE:.0%} of the labels redrawn")
    middle.spines[["top", "right"]].set_visible(False)
    middle.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    common.check_finite_flags()
    # Each demo has logs of its own.
    log_dir = os.path.join(
        _OUTPUT_DIR.value, "logs", time.strftime("%Y%m%d-%H%M%S")
    )
    common.check_writable(os.path.join(log_dir, "file"))
    begin = time.perf_counter()
    settings = [
        (learning_rate, alpha, 0.0)
        for learning_rate in _LEARNING_RATES
        for alpha in (None, _ALPHA.value)
    ]
    settings += [
        (_NOISY_LEARNING_RATE, alpha, _LABEL_NOISE)
        for alpha in (None, _ALPHA.value)
    ]
    for learning_rate, alpha, label_noise in settings:
        name = f"lr={learning_rate:g}" + ("-noisy" if label_noise else "")
        name += "" if alpha is None else "-FP"
        print(name)
        train(os.path.join(log_dir, name), learning_rate, alpha, label_noise)
    seconds = time.perf_counter() - begin

    frame = keras_fisher.logs.read(log_dir)
    runs = keras_fisher.logs.runs(log_dir)
    rows = table(frame, runs)
    formats = {
        name: "{:.0f}".format if "Tr" in name else "{:.1%}".format
        for name in rows.select_dtypes("number")
    }
    print()
    print(rows.to_string(index=False, formatters=formats, na_rep="-"))
    rows.to_csv(os.path.join(_OUTPUT_DIR.value, "table.csv"), index=False)
    figure = os.path.join(_OUTPUT_DIR.value, "fisher_explosion.png")
    draw(frame, runs["label_noise"] > 0, figure)
    print(f"\nTraining took {seconds:.0f} s. Figure: {figure}")
    print(f"See the tab FISHER of: tensorboard --logdir={log_dir}")


if __name__ == "__main__":
    app.run(main)
