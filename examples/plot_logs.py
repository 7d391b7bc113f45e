"""Draws the paper's kinds of figure from what training wrote to TensorBoard.

python examples/plot_logs.py --log_dir=logs --output_dir=figures
"""

from __future__ import annotations

from collections.abc import Iterator
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import common
import matplotlib
from pandas.api import types

from keras_fisher import logs
from keras_fisher import plotting

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_LOG_DIR = flags.DEFINE_string(
    "log_dir",
    None,
    "Directory of one run or of many.",
    required=True,
    allow_override=True,  # of the flag for files of absl's own log
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "figures", "Directory for the figures and the table."
)
_SMOOTH = flags.DEFINE_integer(
    "smooth", 8, "Consecutive measurements of Tr(F) to average.", 1
)
_ACCURACY = flags.DEFINE_string(
    "accuracy", "val_accuracy", "Final metric to draw over TrF_i."
)


def figures(frame, runs) -> Iterator[tuple[str, plt.Axes]]:
    """Draws what the runs have, and yields it with its name."""
    tags = set(frame["tag"])
    if "fisher/trace" in tags:
        yield "trace", plotting.trace(frame, smooth=_SMOOTH.value)
    if "fisher/probe_trace" in tags:
        tag = "fisher/probe_trace"
        yield "probe_trace", plotting.trace(frame, tag=tag)
    if "fisher/ratio" in tags:
        yield (
            "penalty_ratio",
            plotting.penalty_ratio(frame, smooth=_SMOOTH.value),
        )
    if "memorization/noisy_accuracy" in tags:
        yield "memorization", plotting.memorization(frame)
    try:
        yield (
            "early_trace",
            plotting.early_trace_against_accuracy(
                runs, accuracy=_ACCURACY.value
            ),
        )
    except ValueError as error:
        print(f"No figure of TrF_i. {error}")
    by_layer = frame[frame["tag"].str.startswith("fisher/trace_by_layer/")]
    taken = set()
    for run in by_layer["run"].unique():
        name = f"trace_by_layer-{run.replace('/', '-').strip('.')}".rstrip("-")
        while name in taken:  # as a/b and a-b
            name += "+"
        taken.add(name)
        yield name, plotting.trace_by_layer(frame, run)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    try:
        frame, runs = logs.read(_LOG_DIR.value), logs.runs(_LOG_DIR.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    numbers = [*filter(lambda n: types.is_numeric_dtype(runs[n]), runs)]
    if flags.FLAGS["accuracy"].present and _ACCURACY.value not in numbers:
        raise app.UsageError(
            f"--accuracy={_ACCURACY.value} is no metric of the runs. They "
            f"have: {', '.join(numbers)}."
        )
    path = os.path.join(_OUTPUT_DIR.value, "runs.csv")
    common.check_writable(path)
    runs.to_csv(path)
    print(path)
    for name, axes in figures(frame, runs):
        path = os.path.join(_OUTPUT_DIR.value, f"{name}.png")
        axes.figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(axes.figure)
        print(path)


if __name__ == "__main__":
    app.run(main)
