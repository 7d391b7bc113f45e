"""Small learning rates and large batches let the Fisher information explode.

Trains with every learning rate and every batch size, without a penalty, and
compares TrF_i and the peak of Tr(F) with the final test accuracy.

python examples/reproduction/learning_rate_sweep.py --jit=true
python examples/reproduction/learning_rate_sweep.py --jit=true \
        --name=batch_size_sweep --learning_rates=0.03 \
        --batch_sizes=32,64,128,256,512
"""

from __future__ import annotations

from absl import app
from absl import flags
import experiment
import numpy as np
import pandas as pd
import report
import seaborn
import sweep

_LEARNING_RATES = experiment.define_numbers(
    "learning_rates",
    (0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
    "Learning rates of SGD.",
)
_BATCH_SIZES = experiment.define_integers(
    "batch_sizes",
    None,
    "Batch sizes, each with every learning rate; --batch_size if not given.",
)
_NAME = flags.DEFINE_string(
    "name", "learning_rate_sweep", "Name of the table and the figure."
)
flags.adopt_module_key_flags(experiment)


def correlations(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rank correlations of traces with test accuracy.

    Of each run, and of the medians of the runs that have `by` in common. Both
    medians are over the runs whose trace is finite: a few that diverge, with a
    huge trace or none, do not decide.
    """
    rows = []
    for name, column in ("TrF_i", "early_trace"), ("peak Tr(F)", "peak_trace"):
        finite = frame[np.isfinite(frame[column])]
        medians = finite.groupby(by)[[column, "test_accuracy"]].median()
        for kind, runs in ("each run", frame), ("medians of seeds", medians):
            correlation = report.correlation(
                runs[column],
                runs["test_accuracy"],
                "Spearman's ρ with test accuracy",
            )
            rows.append({"trace": name, "of": kind, **correlation})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame, by: list[str]):
    """Traces over epochs, and traces against test accuracy."""
    varied = [column for column in by if frame[column].nunique() > 1] or by[:1]
    titles = {column: column.replace("_", " ") for column in varied}
    frame, curves = (
        table.astype(dict.fromkeys(varied, str)).rename(columns=titles)
        for table in (frame, sweep.histories(frame))
    )
    kinds = dict(zip(("hue", "style"), titles.values()), palette="viridis")
    figure, (left, middle, right) = report.axes(3)
    seaborn.lineplot(
        curves,
        x="epoch",
        y="trace",
        estimator="median",
        errorbar=("pi", 100),
        legend=False,
        ax=left,
        **kinds,
    )
    report.logarithmic(left, "y")
    left.set(ylim=(1, None), ylabel="Tr(F)")
    left.set_title("Tr(F) in training (median and range)")
    for axes, column, name in (
        (middle, "early_trace", "TrF$_i$"),
        (right, "peak_trace", "peak Tr(F)"),
    ):
        seaborn.scatterplot(
            frame,
            x=column,
            y=100 * frame["test_accuracy"],
            legend=axes is right,
            ax=axes,
            **kinds,
        )
        report.logarithmic(axes, "x")
        axes.set(xlabel=name, ylabel="final test accuracy (%)")
        report.title_with_correlation(
            axes, frame[column], frame["test_accuracy"]
        )
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    sizes = [dict(batch_size=int(size)) for size in _BATCH_SIZES.value or ()]
    runs = [
        experiment.from_flags(learning_rate=float(rate), seed=seed, **size)
        for rate in _LEARNING_RATES.value
        for size in sizes or [{}]
        for seed in experiment.seeds()
    ]
    output_dir = experiment.output_dir()
    frame = sweep.results(runs, output_dir, _NAME.value)
    by = ["learning_rate", "batch_size"]
    rows = report.table(
        frame,
        by,
        {
            "TrF_i": ("early_trace", report.number),
            "peak Tr(F)": ("peak_trace", report.number),
            "train accuracy (%)": ("train_accuracy", report.percent),
            "test accuracy (%)": ("test_accuracy", report.percent),
            "runs": ("seed", lambda seeds: str(len(seeds))),
        },
    )
    tables = {"": rows}
    if len(frame) > 2:
        tables["Rank correlations:"] = correlations(frame, by)
    report.publish(_NAME.value, output_dir, tables, frame, draw(frame, by))


if __name__ == "__main__":
    app.run(main)
