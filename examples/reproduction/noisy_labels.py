"""Whether the gradients of single examples tell noisy labels.

Trains on labels of which a share is drawn anew, without a penalty and with the
bounded Fisher Penalty, and ranks the training examples at several moments:

- `loss`: by the loss on the given label. Ranking by the probability of that
  label, as confident learning does, is the same.
- `margin`: by how much another class is more probable than the given label.
- `given trace`: by the squared norm of the gradient of that loss, the share of
  the example in the empirical Tr(F).
- `sampled trace`: by the same for a label that the network draws, the share in
  Tr(F) itself, which does not see the given label.
- `confident learning`, with `--cleanlab`: what cleanlab's `find_label_issues`
  flags before the rest, both by the loss.

A rank is worth what the area under its ROC curve is: the probability that an
example with a wrong label comes before one with the right one. 0.5 is chance.

python examples/reproduction/noisy_labels.py --dataset=fashion_mnist \
        --train_examples=10000 --moments=1,2,4,8
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os

from absl import app
from absl import flags
import experiment
from experiment import Run
from experiment import common
from experiment import settings
import keras
import numpy as np
import pandas as pd
import report
import seaborn
from sklearn import metrics
import sweep

import keras_fisher

_NAME = "noisy_labels"
_LABEL_NOISE = flags.DEFINE_float(
    "label_noise", 0.4, "Share of the training labels to draw anew.", 0.01, 0.99
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 0.03, "Learning rate of SGD.", 1e-12
)
_ALPHA = flags.DEFINE_float(
    "alpha", 1.0, "α of the bounded Fisher Penalty.", 1e-12
)
_MOMENTS = experiment.define_integers(
    "moments",
    (1, 2, 4, 8),
    "Epochs after which examples are ranked; training ends with the last one, "
    "whatever --epochs says.",
)
_CLEANLAB = flags.DEFINE_boolean(
    "cleanlab",
    False,
    "Rank by confident learning, too; needs the package cleanlab.",
)
flags.register_validator(
    "cleanlab",
    lambda wanted: not wanted or importlib.util.find_spec("cleanlab"),
    "--cleanlab needs the package cleanlab: `pip install cleanlab`.",
)
flags.adopt_module_key_flags(experiment)

_BATCH_SIZE = 500


def planned() -> list[Run]:
    """The runs that the flags ask for."""
    return [
        experiment.from_flags(
            learning_rate=_LEARNING_RATE.value,
            label_noise=_LABEL_NOISE.value,
            epochs=max(map(int, _MOMENTS.value)),
            seed=seed,
            **method,
        )
        for seed in experiment.seeds()
        for method in (
            {},
            dict(method="bounded FP", strength=_ALPHA.value),
        )
    ]


def scores(
    network: keras.Model, x: np.ndarray, label: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """What examples are ranked by: large where a label looks wrong.

    Args:
        network: With logits as outputs.
        x: Examples, the first axis theirs.
        label: The given labels, integers of shape `(N,)`.
        seed: Of the sampled labels.

    Returns:
        Arrays of shape `(N,)`, by name.
    """
    logits = network.predict(x, batch_size=_BATCH_SIZE, verbose=0)
    logits = logits.astype(np.float64)
    given = np.take_along_axis(logits, label[:, np.newaxis], axis=1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, label[:, np.newaxis], -np.inf, axis=1)
    trace = functools.partial(
        keras_fisher.fisher_trace,
        network,
        x,
        by="example",
        likelihood="categorical",
        batch_size=_BATCH_SIZE,
        verbose=0,
    )
    loss = np.logaddexp.reduce(logits, axis=1) - given
    found = {
        "loss": loss,
        "margin": _softmax_gap(logits, others.max(axis=1), given),
        "given trace": np.asarray(trace(label, estimator="empirical")),
        "sampled trace": np.asarray(trace(seed=seed)),
    }
    if _CLEANLAB.value:
        flagged = _label_issues(logits, label)
        found["confident learning"] = loss + flagged * (1 + loss.max())
    return found


def _label_issues(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Whether cleanlab takes the labels for wrong."""
    from cleanlab import filter as confident_learning

    total = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return confident_learning.find_label_issues(
        label, np.exp(logits - total), n_jobs=1
    )


def _softmax_gap(
    logits: np.ndarray, larger: np.ndarray, smaller: np.ndarray
) -> np.ndarray:
    """Returns the difference of two probabilities, given their logits."""
    total = np.logaddexp.reduce(logits, axis=1)
    return np.exp(larger - total) - np.exp(smaller - total)


class Ranking(keras.callbacks.Callback):
    """Ranks the training examples at some moments.

    Attributes:
        rows: A dictionary for each moment and score: `epoch`, `score`, `area`,
            and `precision`, the share of wrong labels among as many first
            examples as there are wrong labels.
    """

    def __init__(self, network: keras.Model, data, run: Run, moments: set[int]):
        super().__init__()
        self.rows = []
        self._network, self._seed, self._moments = network, run.seed, moments
        elements = [*data.examples.unbatch().as_numpy_iterator()]
        self._x = np.stack([x for x, _ in elements])
        self._label = np.array([y["label"] for _, y in elements])
        self._is_noisy = np.array([y["is_noisy"] for _, y in elements])

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 not in self._moments:
            return
        found = scores(self._network, self._x, self._label, self._seed)
        count = self._is_noisy.sum()
        for name, values in found.items():
            area = precision = math.nan
            if np.isfinite(values).all():  # Networks may diverge.
                area = metrics.roc_auc_score(self._is_noisy, values)
                first = np.argsort(-values, kind="stable")[:count]
                precision = self._is_noisy[first].mean()
            self.rows.append(
                {
                    "epoch": epoch + 1,
                    "score": name,
                    "area": area,
                    "precision": precision,
                }
            )


def rank(run: Run, moments: list[int]) -> dict:
    """Trains a network, and ranks its examples at the moments."""
    keras.utils.set_random_seed(run.seed)
    data = experiment.load_data(run)
    network = common.build_network(run.model, data.input_shape, data.classes)
    trainer = keras_fisher.FisherModel(
        network, experiment.penalty(run), trace_every=None, seed=run.seed
    )
    trainer.compile(
        keras.optimizers.SGD(run.learning_rate, momentum=run.momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=settings.jit(),
    )
    ranking = Ranking(network, data, run, {*moments})
    trainer.fit(
        data.train,
        epochs=run.epochs,
        callbacks=[ranking],
        shuffle=False,  # the data set does
        verbose=0,
    )
    result = trainer.evaluate(data.test, return_dict=True, verbose=0)
    return {
        "rows": ranking.rows,
        "test_accuracy": float(result["accuracy"]),
    }


def draw(frame: pd.DataFrame):
    """Areas over the epochs, a panel for each method."""
    methods = [*frame["method"].unique()]
    figure, panels = report.axes(len(methods))
    for axes, method in zip(panels, methods, strict=True):
        seaborn.lineplot(
            frame[frame["method"] == method],
            x="epoch",
            y="area",
            hue="score",
            style="score",
            markers=True,
            dashes=False,
            errorbar="se",
            legend=axes is panels[-1],
            ax=axes,
        )
        report.logarithmic(axes, "x")
        axes.set(ylabel="area under the ROC curve", title=method, ylim=(0.4, 1))
    seaborn.move_legend(panels[-1], "upper left", bbox_to_anchor=(1, 1))
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    moments = sorted(map(int, _MOMENTS.value))
    directory = os.path.join(experiment.output_dir(), "runs")
    os.makedirs(directory, exist_ok=True)
    kind = "cleanlab" if _CLEANLAB.value else "ranks"
    name = f"{kind}{'-'.join(map(str, moments))}.json"
    runs = planned()
    found = sweep.shared(
        {
            sweep.path(run, directory, name): functools.partial(
                rank, run, moments
            )
            for run in runs
        },
        "run",
    )
    frame = pd.DataFrame(
        {
            **dataclasses.asdict(run),
            "test_accuracy": result["test_accuracy"],
            **row,
        }
        for run, result in zip(runs, found, strict=True)
        for row in result["rows"]
    )
    rows = report.table(
        frame,
        ["method", "epoch", "score"],
        {
            "area under ROC (%)": ("area", report.percent),
            "wrong among the first (%)": ("precision", report.percent),
        },
    )
    report.publish(
        _NAME, experiment.output_dir(), {"": rows}, frame, draw(frame)
    )


if __name__ == "__main__":
    app.run(main)
