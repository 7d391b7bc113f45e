"""`FisherPenalty()` in networks of other people, as it is: does it do harm?

Trains networks of `keras.applications` from random weights on scikit-learn's
digits, made into color images, with SGD and with Adam, without a penalty and
with the default one. Prints and writes, of the last ten steps, the mean losses
and their ratio, and the mean Tr(F) with and without. What the table has is not
trained again, so that a script that was stopped goes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import keras
import numpy as np
from sklearn import datasets
from workers import machine
from workers import reports

import keras_fisher

_NETWORKS = flags.DEFINE_list(
    "networks",
    [
        "ResNet50V2",
        "ResNet50",
        "MobileNetV2",
        "EfficientNetB0",
        "DenseNet121",
        "VGG16",
        "MobileNetV3Small",
        "ConvNeXtTiny",
    ],
    "Functions of keras.applications.",
)
_STEPS = flags.DEFINE_integer("steps", 50, "Optimizer steps.", 20)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples a step.", 2)
_SIZE = flags.DEFINE_integer("size", 64, "Height and width of images.", 32)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "benchmarks/results",
    "Where to write the table, from the root of the repository.",
)

_OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-3),
}
_LAST = 10


def images(height: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits in color, with values from -1 to 1, and their labels."""
    found = datasets.load_digits()
    x = keras.ops.image.resize(
        found.images[..., None] / 8 - 1, (height, height)
    )
    return np.repeat(np.asarray(x, "float32"), 3, axis=-1), found.target


def train(name: str, optimizer: str, penalty) -> dict[str, np.ndarray]:
    """Losses and traces of a network, for each step."""
    keras.utils.set_random_seed(0)
    size = _SIZE.value
    network = getattr(keras.applications, name)(
        weights=None,
        input_shape=(size, size, 3),
        classes=10,
        classifier_activation=None,
    )
    model = keras_fisher.FisherModel(network, penalty, trace_every=1, seed=0)
    model.compile(
        _OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = images(size)
    order = np.random.default_rng(0).permutation(len(x))
    count = _STEPS.value * _BATCH_SIZE.value
    chosen = np.resize(order, count)
    model.fit(
        x[chosen],
        y[chosen],
        _BATCH_SIZE.value,
        shuffle=False,
        callbacks=[steps := _Steps()],
        verbose=0,
    )
    return {name: np.array(values) for name, values in steps.found.items()}


class _Steps(keras.callbacks.Callback):
    """Keeps the loss of each step, no running mean, and Tr(F)."""

    def __init__(self):
        super().__init__()
        self.found = {"loss": [], "fisher_trace": []}

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        for name, values in self.found.items():
            values.append(float(logs[name]))


def row(name: str, optimizer: str) -> list[str]:
    """A row of the table."""
    penalty = keras_fisher.FisherPenalty()
    without, with_it = (train(name, optimizer, p) for p in (None, penalty))
    losses, traces = (
        [side[key][-_LAST:].mean() for side in (without, with_it)]
        for key in ("loss", "fisher_trace")
    )
    finite = all(np.isfinite(v).all() for v in with_it.values())
    return [
        name,
        optimizer,
        *(f"{loss:.3g}" for loss in losses),
        f"{losses[1] / losses[0]:.2f}",
        *(f"{trace:.3g}" for trace in traces),
        "all finite" if finite else "NOT finite",
    ]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    columns = [
        *("network", "optimizer", "loss without", "loss with", "ratio"),
        *("Tr(F) without", "Tr(F) with", "values with"),
    ]
    path = reports.output_directory(_OUTPUT_DIR.value) / "stock_networks.md"
    conditions = reports.conditions(machine.versions(["tensorflow", "keras"]))
    size = _SIZE.value
    means = (
        f"means of the last {_LAST} of {_STEPS.value} steps, of "
        f"{_BATCH_SIZE.value} images of {size}x{size} each."
    )
    known = path.read_text("utf-8") if path.exists() else ""
    rows = {}
    if means in known and conditions in known:
        rows = {(r[0], r[1]): r for r in reports.rows_of(known)}
    pairs = [(n, o) for n in _NETWORKS.value for o in _OPTIMIZERS]
    bar = keras.utils.Progbar(len(pairs), unit_name="pair")
    for pair in pairs:
        if pair not in rows:
            rows[pair] = row(*pair)
        bar.add(1)
        text = (
            f"`{reports.command()}`: {means}\n\n"
            f"{reports.markdown(columns, rows.values())}\n\n{conditions}\n"
        )
        path.write_text(text, "utf-8")
    print(f"\n{text}{path}")


if __name__ == "__main__":
    app.run(main)
