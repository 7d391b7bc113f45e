"""One setting of the bounded penalty for all learning rates, clean or noisy.

Small and large learning rates, labels as they are and a share of them drawn
anew: the paper's penalty with each of several α, the bounded one with α over
two decades, and no penalty. What is to be seen: the paper's needs an α of its
own for each row, the bounded one does not.

python examples/reproduction/bounded_penalty.py --jit=true
"""

from __future__ import annotations

from absl import app
from absl import flags
import experiment
from experiment import Run
import pandas as pd
import report
import seaborn
import sweep

_NAME = "bounded_penalty"
_BOUNDED = "bounded FP"
_LEARNING_RATES = experiment.define_numbers(
    "learning_rates", (0.01, 0.03, 0.1, 0.2), "Learning rates of SGD."
)
_LABEL_NOISE = flags.DEFINE_float(
    "label_noise",
    0.4,
    "Share of the training labels to draw anew in the noisy half of the runs.",
    0.01,
    1.0,
)
_ALPHAS = experiment.define_numbers(
    "alphas", (0.1, 0.3, 1), "α of the paper's penalty, to choose from."
)
_BOUNDED_ALPHAS = experiment.define_numbers(
    "bounded_alphas", (1, 10, 100), "α of the bounded penalty."
)
flags.adopt_module_key_flags(experiment)


def planned() -> list[Run]:
    """The runs that the flags ask for."""
    methods = [
        ("none", 0.0),
        *[(_BOUNDED, float(alpha)) for alpha in _BOUNDED_ALPHAS.value],
        *[("FP", float(alpha)) for alpha in _ALPHAS.value],
    ]
    return [
        experiment.from_flags(
            learning_rate=float(rate),
            label_noise=noise,
            method=method,
            strength=strength,
            seed=seed,
        )
        for seed in experiment.seeds()
        for noise in (0.0, _LABEL_NOISE.value)
        for method, strength in methods
        for rate in _LEARNING_RATES.value
    ]


def settings_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting: the best of the paper's, and all bounded ones."""
    rows = []
    for (noise, rate), runs in frame.groupby(["label_noise", "learning_rate"]):
        of = dict([*runs.groupby(["method", "strength"])])
        tuned = max(
            (key for key in of if key[0] == "FP"),
            key=lambda key: of[key]["test_accuracy"].mean(),
        )
        best = of[tuned]["test_accuracy"]
        row = {
            "noisy labels (%)": f"{100 * noise:g}",
            "learning rate": f"{rate:g}",
            "none": report.percent(of["none", 0.0]["test_accuracy"]),
            "best FP": f"{report.percent(best)} (α = {tuned[1]:g})",
        }
        gains = []
        for (method, strength), group in of.items():
            if method == _BOUNDED:
                found = group["test_accuracy"]
                row[f"bounded, α = {strength:g}"] = report.percent(found)
                gains.append(found.mean() - best.mean())
        row["worst bounded - best FP (points)"] = f"{100 * min(gains):+.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame):
    """Test accuracies by α, at each learning rate."""
    frame = frame[frame["method"] != "none"]
    frame = frame.assign(percent=100 * frame["test_accuracy"])
    noises = [*frame["label_noise"].unique()]
    figure, panels = report.axes(max(2, len(noises)))
    for axes, noise in zip(panels, noises):
        seaborn.lineplot(
            frame[frame["label_noise"] == noise],
            x="strength",
            y="percent",
            hue="learning_rate",
            style="method",
            palette="colorblind",
            markers=True,
            errorbar="se",
            legend=noise == noises[-1],
            ax=axes,
        )
        report.logarithmic(axes, "x")
        axes.set(
            xlabel="α",
            ylabel="final test accuracy (%)",
            title=f"{100 * noise:g} % noisy labels",
        )
    seaborn.move_legend(
        panels[len(noises) - 1], "upper left", bbox_to_anchor=(1, 1)
    )
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    frame = sweep.results(planned(), experiment.output_dir(), _NAME)
    columns = {
        "peak Tr(F)": ("peak_trace", report.number),
        "train (%)": ("train_accuracy", report.percent),
        "test (%)": ("test_accuracy", report.percent),
    }
    if "noisy_accuracy" in frame:
        columns["noisy memorized (%)"] = ("noisy_accuracy", report.percent)
    rows = report.table(
        frame, ["label_noise", "learning_rate", "method", "strength"], columns
    )
    tables = {"": settings_table(frame), "All runs:": rows}
    report.publish(_NAME, experiment.output_dir(), tables, frame, draw(frame))


if __name__ == "__main__":
    app.run(main)
