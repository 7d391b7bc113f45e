"""The Fisher Penalty slows the memorization of noisy labels.

Trains on labels of which a share is drawn anew, without a penalty and with
several, and follows the accuracy on clean and on noisy examples and Tr(F) on
both. Strengths are chosen on held-out, equally noisy, training data.

python examples/reproduction/label_noise.py --jit=true
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

_NAME = flags.DEFINE_string(
    "name", "label_noise", "Name of the table and the figure."
)
_LABEL_NOISE = flags.DEFINE_float(
    "label_noise", 0.4, "Share of the training labels to draw anew.", 0.01, 1.0
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 0.03, "Learning rate of SGD.", 1e-12
)
_STRENGTHS = tuning.define_methods(
    {
        "FP": (0.1, 0.3, 1, 3),
        "bounded FP": (1, 10, 30, 100),
        "GP_r": (0.1, 0.3, 1, 3),
        "SAM": (0.05, 0.1, 0.2, 0.5),
        "label smoothing": (0.1, 0.2, 0.4, 0.8),
        "mixup": (0.2, 0.4, 0.7, 1),
    }
)
flags.adopt_module_key_flags(tuning)


def draw(frame: pd.DataFrame):
    """Accuracies and traces over the epochs."""
    curves = sweep.histories(frame)
    methods = [*frame["method"].unique()]
    figure, (left, middle, right) = report.axes(3)
    shared = dict(x="epoch", hue="method", hue_order=methods, errorbar="se")
    measured = curves.dropna(subset=["test_accuracy"])
    kinds = {
        "clean_accuracy": "clean",
        "noisy_accuracy": "noisy",
    }
    long = measured.melt(["epoch", "method"], [*kinds], "examples")
    long["examples"] = long["examples"].map(kinds)
    long["value"] *= 100
    seaborn.lineplot(
        long, y="value", style="examples", legend=False, ax=left, **shared
    )
    left.set(ylabel="accuracy on the given labels (%)", title="Memorization")
    measured = measured.assign(percent=100 * measured["test_accuracy"])
    seaborn.lineplot(measured, y="percent", legend=False, ax=middle, **shared)
    middle.set(ylabel="test accuracy (%)", title="Generalization")
    kinds = {"clean_trace": "clean", "noisy_trace": "noisy"}
    long = curves.melt(["epoch", "method"], [*kinds], "examples")
    long["examples"] = long["examples"].map(kinds)
    seaborn.lineplot(long, y="value", style="examples", ax=right, **shared)
    seaborn.move_legend(right, "upper left", bbox_to_anchor=(1, 1))
    report.logarithmic(right, "y")
    right.set(ylabel="Tr(F)", title="On clean and noisy examples")
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    plain = experiment.from_flags(
        learning_rate=_LEARNING_RATE.value, label_noise=_LABEL_NOISE.value
    )
    runs, tried = tuning.chosen(
        [plain], tuning.methods(_STRENGTHS), _NAME.value
    )
    frame = sweep.results(
        [
            dataclasses.replace(run, seed=seed)
            for run in (plain, *runs)
            for seed in experiment.seeds()
        ],
        experiment.output_dir(),
        _NAME.value,
    )
    rows = report.table(
        frame,
        ["method", "strength"],
        {
            "final test (%)": ("test_accuracy", report.percent),
            "best test (%)": ("best_test_accuracy", report.percent),
            "clean learned (%)": ("clean_accuracy", report.percent),
            "noisy memorized (%)": ("noisy_accuracy", report.percent),
            "noisy recovered (%)": ("recovered_accuracy", report.percent),
            "peak Tr(F)": ("peak_trace", report.number),
        },
    )
    tables = {"": rows}
    if len(tried):
        tables["What was tried:"] = tuning.tried_table(tried)
    report.publish(
        _NAME.value, experiment.output_dir(), tables, frame, draw(frame)
    )


if __name__ == "__main__":
    app.run(main)
