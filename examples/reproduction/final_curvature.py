"""Small traces early in training end in flatter minima.

Trains with several learning rates, without a penalty and with FP, and
compares TrF_i with Tr(H) and Tr(F) of the trained networks on training data.

python examples/reproduction/final_curvature.py --jit=true
"""

from __future__ import annotations

import functools
import os

from absl import app
from absl import flags
import experiment
from experiment import common
import keras
import pandas as pd
import report
import seaborn
import sweep

import keras_fisher

_NAME = "final_curvature"
_LEARNING_RATES = experiment.define_numbers(
    "learning_rates",
    (0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
    "Learning rates of SGD.",
)
_ALPHA = flags.DEFINE_float(
    "alpha",
    0.3,
    "α of the Fisher Penalty; 0 for the runs without a penalty alone.",
    0.0,
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 1024, "Training examples to measure Tr(H) and Tr(F) on.", 2
)
flags.adopt_module_key_flags(experiment)


def measure(row: pd.Series) -> dict[str, float]:
    """Tr(H) and Tr(F) of a trained network on the first training examples."""
    data = common.load_data(
        row["dataset"],
        row["batch_size"],
        train_examples=row["train_examples"],
    )
    batch = data.examples.unbatch().batch(_EXAMPLES.value).take(1)
    x, y = next(batch.as_numpy_iterator())
    network = keras.models.load_model(row["path"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    hessian = keras_fisher.hessian_trace(
        network, x, y, loss=loss, tolerance=0.02, seed=0, verbose=0
    )
    fisher = keras_fisher.fisher_trace(
        network, x, estimator="exact", likelihood="categorical", batch_size=256
    )
    return {"hessian_trace": float(hessian), "final_trace": float(fisher)}


def draw(frame: pd.DataFrame):
    """Final Tr(H) and Tr(F) against TrF_i."""
    figure, panels = report.axes(2)
    for axes, column, name in zip(
        panels, ("hessian_trace", "final_trace"), ("Tr(H)", "Tr(F)")
    ):
        seaborn.scatterplot(
            frame,
            x="early_trace",
            y=column,
            hue="learning rate",
            style="method",
            palette="viridis",
            legend=axes is panels[-1],
            ax=axes,
        )
        report.logarithmic(axes, "x")
        report.logarithmic(axes, "y")
        axes.set(xlabel="TrF$_i$", ylabel=f"final {name}")
        report.title_with_correlation(axes, frame["early_trace"], frame[column])
    seaborn.move_legend(panels[-1], "upper left", bbox_to_anchor=(1, 1))
    return figure


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of TrF_i with the final traces."""
    methods = [*frame.groupby("method", sort=False)]
    rows = []
    for kind, runs in [("all", frame), *methods] if methods[1:] else methods:
        for name, column in (
            ("final Tr(H)", "hessian_trace"),
            ("final Tr(F)", "final_trace"),
        ):
            correlation = report.correlation(runs["early_trace"], runs[column])
            rows.append({"runs": kind, "TrF_i with": name, **correlation})
    return pd.DataFrame(rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    methods = [{}]
    if _ALPHA.value:
        methods.append(dict(method="FP", strength=_ALPHA.value))
    runs = [
        experiment.from_flags(learning_rate=float(rate), seed=seed, **method)
        for method in methods
        for rate in _LEARNING_RATES.value
        for seed in experiment.seeds()
    ]
    frame = sweep.results(runs, experiment.output_dir(), _NAME)
    print("Measuring the trained networks")
    jobs = {
        f"{os.path.splitext(row['path'])[0]}-curvature{_EXAMPLES.value}.json": (
            functools.partial(measure, row)
        )
        for _, row in frame.iterrows()
    }
    measured = sweep.shared(jobs, "network")
    frame = frame.join(pd.DataFrame(measured))
    frame["learning rate"] = frame["learning_rate"].map("{:g}".format)
    rows = report.table(
        frame,
        ["method", "learning rate"],
        {
            "TrF_i": ("early_trace", report.number),
            "final Tr(H)": ("hessian_trace", report.number),
            "final Tr(F)": ("final_trace", report.number),
            "train loss": ("train_loss", report.number),
            "test accuracy (%)": ("test_accuracy", report.percent),
        },
    )
    tables = {"": rows, "Rank correlations:": correlations(frame)}
    report.publish(_NAME, experiment.output_dir(), tables, frame, draw(frame))


if __name__ == "__main__":
    app.run(main)
