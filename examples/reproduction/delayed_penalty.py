"""The Fisher Penalty acts early: switched on too late, it does not help.

Trains with FP from several optimizer steps on, and without it.

python examples/reproduction/delayed_penalty.py --jit=true
"""

from __future__ import annotations

from absl import app
from absl import flags
import experiment
import pandas as pd
import report
import seaborn
import sweep

_NAME = "delayed_penalty"
_ALPHA = flags.DEFINE_float("alpha", 0.3, "α of the Fisher Penalty.", 1e-12)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 0.01, "Learning rate of SGD.", 1e-12
)
_STARTS = experiment.define_integers(
    "starts",
    (0, 62, 310, 930, 1860),
    "Optimizer steps from which the penalty is added, each in runs of its own.",
    at_least=0,
)
flags.adopt_module_key_flags(experiment)


def draw(frame: pd.DataFrame):
    """Test accuracy by start, and the traces."""
    figure, (left, right) = report.axes(2)
    frame = frame.assign(percent=100 * frame["test_accuracy"])
    seaborn.stripplot(frame, x="penalty", y="percent", alpha=0.5, ax=left)
    seaborn.pointplot(
        frame,
        x="penalty",
        y="percent",
        errorbar="se",
        linestyle="none",
        marker="_",
        markersize=20,
        color="0.2",
        ax=left,
    )
    left.set(xlabel="", ylabel="final test accuracy (%)")
    report.slanted(left, 30)
    curves = sweep.histories(frame)
    curves["penalty"] = names(curves)
    seaborn.lineplot(
        curves,
        x="epoch",
        y="trace",
        hue="penalty",
        palette="viridis",
        estimator="median",
        errorbar=("pi", 100),
        ax=right,
    )
    report.logarithmic(right, "y")
    right.set(ylabel="Tr(F)", ylim=(1, None))
    return figure


def names(frame: pd.DataFrame) -> pd.Series:
    """What to call the runs."""
    from_start = "from step " + frame["start"].astype(str)
    return from_start.where(frame["method"] != "none", "never")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    kinds = [
        dict(method="FP", strength=_ALPHA.value, start=int(start))
        for start in _STARTS.value
    ]
    runs = [
        experiment.from_flags(
            learning_rate=_LEARNING_RATE.value, seed=seed, **kind
        )
        for kind in (*kinds, {})
        for seed in experiment.seeds()
    ]
    frame = sweep.results(runs, experiment.output_dir(), _NAME)
    frame["penalty"] = names(frame)
    rows = report.table(
        frame,
        ["penalty"],
        {
            "TrF_i": ("early_trace", report.number),
            "peak Tr(F)": ("peak_trace", report.number),
            "train accuracy (%)": ("train_accuracy", report.percent),
            "test accuracy (%)": ("test_accuracy", report.percent),
        },
    )
    report.publish(
        _NAME, experiment.output_dir(), {"": rows}, frame, draw(frame)
    )


if __name__ == "__main__":
    app.run(main)
