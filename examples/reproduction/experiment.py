"""One training run of an experiment, and the flags that describe it.

The scripts of docs/reproduction.md share this: a `Run` is all that the result
of a training depends on, `train` gives that result, and the flags here are
those that all of the scripts have.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags
import keras
import numpy as np
from sharpness_aware import SharpnessAwareModel
import tensorflow as tf

import keras_fisher

# Data, networks and the flags of a training are those of examples/; the other
# modules here take them from this one.
sys.path.append(str(pathlib.Path(__file__).parents[1]))
import common
import resuming
import settings

# What a run can be trained with beside its loss, each with one strength: α of
# the penalties, ρ of SAM, the decay, the share of uniform labels, and α of
# the Beta distribution of mixup.
# The penalties are the paper's, which no bound holds back, but for one.
PENALTIES = {
    "FP": functools.partial(keras_fisher.FisherPenalty, bound=None),
    "bounded FP": functools.partial(keras_fisher.FisherPenalty, bound=1.0),
    "GP": functools.partial(keras_fisher.penalties.GradientPenalty, bound=None),
    "GP_r": functools.partial(
        keras_fisher.penalties.UniformLabelPenalty, bound=None
    ),
    "GP_x": functools.partial(
        keras_fisher.penalties.InputGradientPenalty, bound=None
    ),
}
METHODS = (
    "none",
    *PENALTIES,
    "SAM",
    "weight decay",
    "label smoothing",
    "mixup",
)

flags.adopt_module_key_flags(settings)
_SEEDS = flags.DEFINE_integer(
    "seeds", 5, "Runs of each kind: with the seeds 0, 1, 2, ...", 1
)
_PROBE_SIZE = flags.DEFINE_integer(
    "probe_size",
    512,
    "Training examples on which Tr(F) is measured after each epoch.",
    1,
)
_MEASURE_EVERY = flags.DEFINE_integer(
    "measure_every", 10, "Measure accuracies every so many epochs.", 1
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "reproduction",
    "Directory for tables, figures and runs. What is there is not run again; "
    "several processes and scripts may work in one.",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the result of a training depends on.

    Attributes:
        method: One of `METHODS`.
        strength: Of the method; 0 for `"none"`.
        start: Optimizer step from which a penalty is added.
        fraction: Share of the batch that a penalty is computed on.
        label_noise: Share of the training labels that are drawn anew.
        holdout: Share of the training set to leave out, and to measure the
            accuracy on instead of the test set. Its labels are as noisy.
        train_examples: Size of the training set, `None` for all of it.
        seed: Of the weights, the order, the noise and the sampling.
    """

    dataset: str
    model: str
    learning_rate: float
    batch_size: int
    epochs: int
    momentum: float
    early_accuracy: float
    probe_size: int
    measure_every: int
    augment: bool = False
    train_examples: int | None = None
    method: str = "none"
    strength: float = 0.0
    start: int = 0
    fraction: float = 1.0
    label_noise: float = 0.0
    holdout: float = 0.0
    seed: int = 0

    def effective(self) -> Run:
        """Equal to those of others that do the same."""
        if self.method in PENALTIES:
            return self
        return dataclasses.replace(self, fraction=1.0)


def from_flags(**values) -> Run:
    """The run that the flags describe, with some fields given."""
    common.check_finite_flags()
    described = dict(
        dataset=settings.DATASET.value,
        model=settings.MODEL.value,
        batch_size=settings.BATCH_SIZE.value,
        epochs=settings.EPOCHS.value,
        momentum=settings.MOMENTUM.value,
        early_accuracy=settings.EARLY_ACCURACY.value,
        probe_size=_PROBE_SIZE.value,
        measure_every=_MEASURE_EVERY.value,
        augment=settings.AUGMENT.value,
        train_examples=settings.TRAIN_EXAMPLES.value,
        fraction=settings.FRACTION.value,
    )
    return Run(**{**described, **values})


def seeds() -> range:
    """The seeds that the flags ask for."""
    return range(_SEEDS.value)


def output_dir() -> str:
    """Where the flags say that results go."""
    return _OUTPUT_DIR.value


def define_numbers(name: str, default: Sequence[float], description: str):
    """Defines a flag for a list of different numbers above 0."""
    holder = flags.DEFINE_list(name, [f"{v:g}" for v in default], description)
    flags.register_validator(
        name,
        lambda texts: are_positive(texts) and len({*texts}) == len(texts),
        f"--{name} must be one or more different numbers above 0, like "
        f"--{name}={','.join(holder.default)}.",
    )
    return holder


def define_integers(
    name: str,
    default: Sequence[int] | None,
    description: str,
    at_least: int = 1,
):
    """Defines a flag for a list of different integers."""
    texts = None if default is None else [*map(str, default)]
    holder = flags.DEFINE_list(name, texts, description)

    def is_valid(texts):
        return texts is default is None or (
            bool(texts)
            and all(t.isdecimal() and int(t) >= at_least for t in texts)
            and len({*texts}) == len(texts)
        )

    flags.register_validator(
        name,
        is_valid,
        f"--{name} must be one or more different integers of at least "
        f"{at_least}, like --{name}=32,128.",
    )
    return holder


def are_positive(texts: Sequence[str]) -> bool:
    """Whether texts are one or more finite numbers above 0."""
    try:
        return bool(texts) and all(0 < float(t) < math.inf for t in texts)
    except ValueError:
        return False


def load_data(run: Run) -> common.Data:
    """What a run trains on, and is tested on."""
    return common.load_data(
        run.dataset,
        run.batch_size,
        holdout=run.holdout,
        label_noise=run.label_noise,
        train_examples=run.train_examples,
        augment=run.augment,
        seed=run.seed,
    )


def train(run: Run, path: str, jit: bool | str = "auto") -> dict:
    """Trains a network, and saves it.

    Goes on where a process that has died was at it.

    Args:
        run: What to train.
        path: Where the trained network goes, a `.keras` file. Backups are in
            `backup_directory(path)`, until somebody deletes them.
        jit: Whether XLA compiles, as `jit_compile` of Keras.

    Returns:
        The result: what was measured at the end, and `history`, a dictionary
        for each epoch. Shares and traces, as numbers that JSON can hold.
    """
    begin = time.perf_counter()
    keras.utils.set_random_seed(run.seed)
    data = load_data(run)
    network = common.build_network(run.model, data.input_shape, data.classes)
    trainer = _trainer(run, network)
    _compile(trainer, run, jit, steps_per_execution=len(data.train))
    watch = Watch(network, data, run, jit)
    callbacks = [watch, keras.callbacks.TerminateOnNaN()]
    early = None
    if isinstance(trainer, keras_fisher.FisherModel):
        early = keras_fisher.callbacks.EarlyPhase(
            "accuracy", run.early_accuracy, warn_above=None
        )
        callbacks.append(early)
    backup = resuming.Backup(backup_directory(path), watch.rows, early, begin)
    callbacks.append(backup)  # The last, so that no backup is ahead.
    trainer.fit(
        _batches(common.by_step(data, trainer), run, data.classes),
        epochs=run.epochs,
        callbacks=callbacks,
        shuffle=False,  # the data set does
        verbose=0,
    )
    with common.replacing(path) as temporary:
        network.save(temporary)
    return {
        **summary(watch.rows, early),
        "seconds": backup.seconds,
        "versions": _versions(),
        "history": watch.rows,
    }


def summary(
    rows: Sequence[dict], early: keras_fisher.callbacks.EarlyPhase | None
) -> dict[str, float]:
    """What tables have of a run: its last epoch, its best, its peak, TrF_i."""
    traces = [row["trace"] for row in rows if math.isfinite(row["trace"])]
    tests = [row["test_accuracy"] for row in rows if "test_accuracy" in row]
    return {
        **rows[-1],
        "early_trace": math.nan if early is None else early.early_trace,
        "peak_trace": max(traces, default=math.nan),
        "best_test_accuracy": max(tests),
    }


def backup_directory(path: str) -> str:
    """Where backups of a run are whose network goes to a path."""
    return f"{os.path.splitext(path)[0]}-backup"


class Watch(keras.callbacks.Callback):
    """Measures a network in training from outside, whatever trains it.

    Attributes:
        rows: A dictionary for each epoch: `trace`, Tr(F) of the first examples
            by the gradient of each for one sampled label (under label noise
            also `clean_trace` and `noisy_trace`), and at some epochs and the
            last one `test_accuracy` and `train_accuracy` (under label noise
            also `clean_accuracy`, `noisy_accuracy`, `recovered_accuracy`).
    """

    def __init__(self, network: keras.Model, data, run: Run, jit: bool | str):
        super().__init__()
        self.rows = []
        self._network, self._data, self._run = network, data, run
        self._evaluator = keras_fisher.FisherModel(network, trace_every=None)
        self._evaluator.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=jit,
            steps_per_execution=len(data.examples),
        )
        self._probes = _probes(data, run.probe_size)

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1}
        for name, x in self._probes.items():
            trace = keras_fisher.fisher_trace(
                self._network, x, likelihood="categorical", seed=self._run.seed
            )
            row[name] = float(trace)
        self.rows.append(row)
        if (epoch + 1) % self._run.measure_every == 0:
            self._measure_accuracies()

    def on_train_end(self, logs=None):
        if "test_accuracy" not in self.rows[-1]:
            self._measure_accuracies()

    def _measure_accuracies(self):
        row = self.rows[-1]
        row["test_accuracy"] = self._evaluate(self._data.test)["accuracy"]
        results = self._evaluate(self._data.examples)
        row["train_accuracy"] = results.pop("accuracy")
        row["train_loss"] = results.pop("loss")
        row.update(results)  # of clean and noisy examples

    def _evaluate(self, dataset) -> dict:
        results = self._evaluator.evaluate(dataset, return_dict=True, verbose=0)
        return {
            name: float(value)
            for name, value in results.items()
            if name == "loss" or name.endswith("accuracy")
        }


def _trainer(run: Run, network: keras.Model) -> keras.Model:
    if run.method == "SAM":
        return SharpnessAwareModel(network, run.strength)
    return keras_fisher.FisherModel(
        network, penalty(run), trace_every=4, seed=run.seed
    )


def penalty(run: Run) -> keras_fisher.penalties.Penalty | None:
    """The penalty that a run is trained with."""
    if run.method not in PENALTIES:
        return None
    return PENALTIES[run.method](
        run.strength, start=run.start, fraction=run.fraction
    )


def _has_soft_labels(run: Run) -> bool:
    """Whether labels are distributions over classes: mixed or smoothed."""
    return run.method in ("label smoothing", "mixup")


def _compile(trainer: keras.Model, run: Run, jit: bool | str, **kwargs) -> None:
    decay = run.strength if run.method == "weight decay" else None
    smoothing = run.strength if run.method == "label smoothing" else 0.0
    trainer.compile(
        keras.optimizers.SGD(
            run.learning_rate, momentum=run.momentum, weight_decay=decay
        ),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=smoothing
        )
        if _has_soft_labels(run)
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
        **kwargs,
    )


def _batches(batches: tf.data.Dataset, run: Run, classes: int):
    """The batches to train on, with labels as the method takes them."""
    batches = batches.map(_given_label)
    if _has_soft_labels(run):
        batches = batches.map(lambda x, y: (x, tf.one_hot(y, classes)))
    if run.method == "mixup":
        batches = _mixed(batches, run.strength, run.seed)
    return batches.prefetch(tf.data.AUTOTUNE)


def _given_label(x, y):
    """Takes the label to train on from what `add_label_noise` gives."""
    return x, y["label"] if isinstance(y, dict) else y


def _mixed(batches: tf.data.Dataset, alpha: float, seed: int):
    """Mixup of signals or images with one-hot labels, by Keras's layer."""
    layer = keras.layers.MixUp(alpha, data_format="channels_last", seed=seed)

    def mix(x, y):
        # The layer is for images: signals are one pixel high.
        images = x[:, tf.newaxis] if x.shape.rank == 3 else x
        mixed = layer({"images": images, "labels": y})
        images = tf.reshape(mixed["images"], tf.shape(x))
        return tf.ensure_shape(images, x.shape), mixed["labels"]

    return batches.map(mix)


def _probes(data, size: int) -> dict[str, np.ndarray]:
    """The examples that Tr(F) is measured on, by the name of the trace."""
    count = 8 * size if data.has_noise else size
    elements = [*data.examples.unbatch().take(count).as_numpy_iterator()]
    probes = {"trace": [x for x, _ in elements]}
    if data.has_noise:
        for name, wanted in ("clean_trace", False), ("noisy_trace", True):
            probes[name] = [x for x, y in elements if y["is_noisy"] == wanted]
    return {
        name: np.stack(examples[:size])
        for name, examples in probes.items()
        if examples
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "keras_fisher": keras_fisher.__version__,
    }
