"""The Fisher Penalty against what else improves generalization.

With a small learning rate and with the best one: no penalty, the penalties
of the paper (GP_x, GP, GP_r, FP), FP with a bound, and SAM, weight decay, label
smoothing and mixup. Learning rate and strengths are chosen on held-out training
data.

python examples/reproduction/penalty_comparison.py --jit=true
"""

from __future__ import annotations

import dataclasses

from absl import app
from absl import flags
import experiment
import pandas as pd
import report
import seaborn
import sweep
import tuning

_NAME = "penalty_comparison"
_SMALL = flags.DEFINE_float(
    "small_learning_rate", 0.01, "The small learning rate.", 1e-12
)
_LEARNING_RATES = experiment.define_numbers(
    "learning_rates",
    (0.03, 0.05, 0.1, 0.2),
    "Learning rates that the best one is chosen from.",
)
_STRENGTHS = tuning.define_methods(
    {
        "GP_x": (0.001, 0.01, 0.1),
        "GP": (0.1, 0.3, 1),
        "GP_r": (0.1, 0.3, 1),
        "FP": (0.1, 0.3, 1),
        "bounded FP": (1, 10, 100),
        "SAM": (0.05, 0.1, 0.2),
        "weight decay": (0.001, 0.003, 0.01),
        "label smoothing": (0.1, 0.2, 0.4),
        "mixup": (0.2, 0.5, 1),
    }
)
flags.adopt_module_key_flags(tuning)


def gains(frame: pd.DataFrame, small: float, best: float) -> pd.DataFrame:
    """What each method gains, in points of test accuracy."""
    means = frame.groupby(["method", "learning_rate"])["test_accuracy"].mean()
    gap = means["none", best] - means["none", small]
    rows = []
    for method in frame["method"].unique():
        if method == "none":
            continue
        closed = (means[method, small] - means["none", small]) / gap
        gain = means[method, best] - means["none", best]
        rows.append(
            {
                "method": method,
                f"of the gap closed at {small:g} (%)": f"{100 * closed:.0f}",
                f"gain at {best:g} (points)": f"{100 * gain:+.1f}",
            }
        )
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame):
    """Test accuracies of all runs, and their means."""
    figure, (left, right) = report.axes(2)
    shared = dict(
        x="method", hue="learning_rate", palette="colorblind", dodge=0.4
    )
    frame = frame.assign(percent=100 * frame["test_accuracy"])
    for axes, column in (left, "percent"), (right, "peak_trace"):
        seaborn.stripplot(
            frame, y=column, alpha=0.5, legend=False, ax=axes, **shared
        )
        seaborn.pointplot(
            frame,
            y=column,
            errorbar="se",
            linestyle="none",
            marker="_",
            markersize=14,
            legend=axes is left,
            ax=axes,
            **shared,
        )
        report.slanted(axes, 40)
        axes.set_xlabel("")
    left.set_ylabel("final test accuracy (%)")
    report.logarithmic(right, "y")
    right.set_ylabel("peak Tr(F)")
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    small = _SMALL.value
    best = tuning.best_learning_rate([*map(float, _LEARNING_RATES.value)])
    plain = [
        experiment.from_flags(learning_rate=rate)
        for rate in dict.fromkeys((small, best))
    ]
    runs, tried = tuning.chosen(plain, tuning.methods(_STRENGTHS), _NAME)
    frame = sweep.results(
        [
            dataclasses.replace(run, seed=seed)
            for run in (*plain, *runs)
            for seed in experiment.seeds()
        ],
        experiment.output_dir(),
        _NAME,
    )
    frame = frame.sort_values("learning_rate", kind="stable")
    rows = report.table(
        frame,
        ["learning_rate", "method", "strength"],
        {
            "peak Tr(F)": ("peak_trace", report.number),
            "train accuracy (%)": ("train_accuracy", report.percent),
            "test accuracy (%)": ("test_accuracy", report.percent),
        },
    )
    tables = {"": rows}
    if small != best:
        tables["Gains over no penalty:"] = gains(frame, small, best)
    if len(tried):
        tables["What was tried:"] = tuning.tried_table(tried)
    report.publish(_NAME, experiment.output_dir(), tables, frame, draw(frame))


if __name__ == "__main__":
    app.run(main)
