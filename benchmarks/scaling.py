"""How the cost of a penalized step grows with the sizes of a network.

Dense layers with one size at a time varied, in plain Keras and with the Fisher
Penalty, each in a process of its own that take turns. Writes the table, and a
figure of time and memory with fitted exponents.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app
from absl import flags
import numpy as np
import pandas as pd
from workers import machine
from workers import networks
from workers import processes
from workers import reports
from workers import sides

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", 1)
_JIT = flags.DEFINE_boolean("jit", True, "Whether to compile with XLA.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "benchmarks/results",
    "Where to write the table and the figure, from the root of the repository.",
)

_BASE = dict(batch=256, width=512, depth=3, classes=10)
_VALUES = dict(
    batch=[32, 64, 128, 256, 512, 1024, 2048],
    width=[64, 128, 256, 512, 1024, 2048],
    depth=[1, 2, 4, 8, 16],
    classes=[10, 32, 100, 320, 1000],
)
_SIDES = (sides.PLAIN, "FP every 1")
_SECONDS = 0.2  # of an epoch
_FEWEST, _MOST = 2, 200  # steps in an epoch
# Smaller sizes cost what calls cost, so the exponent is of the larger ones.
_FITTED = 3


def measure(sizes: dict[str, int]) -> list[dict]:
    """A row for each side."""
    name = networks.sized(**sizes)
    workers = {
        side: processes.Worker(
            sys.executable,
            "steps_keras.py",
            name,
            side,
            "jit" if _JIT.value else "graph",
            "1",
        )
        for side in _SIDES
    }
    steps, times, rows = {}, {side: [] for side in workers}, []
    with contextlib.ExitStack() as stack:
        for side, worker in workers.items():
            stack.enter_context(worker).ask("first")
            seconds = worker.ask(f"run {_FEWEST}")
            steps[side] = int(np.clip(_SECONDS / seconds, _FEWEST, _MOST))
        for _ in range(_ROUNDS.value):
            for side, worker in workers.items():
                times[side].append(worker.ask(f"run {steps[side]}"))
        for side, worker in workers.items():
            before, after = worker.ask("peak")
            rows.append(
                {
                    "side": side,
                    "ms": 1e3 * np.median(times[side]),
                    "grown_mb": after - before,
                }
            )
    return rows


def exponent(sizes, figures) -> float:
    """The slope of the last points on logarithmic axes."""
    last = slice(-_FITTED, None)
    return np.polyfit(np.log(sizes)[last], np.log(figures)[last], 1)[0]


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Of time and memory, for each size and side."""
    rows = []
    for (varied, side), points in table.groupby(["varied", "side"], sort=False):
        rows.append(
            {
                "varied": varied,
                "side": side,
                "exponent of time": exponent(points["size"], points["ms"]),
                "exponent of memory": exponent(
                    points["size"], points["grown_mb"]
                ),
                "largest": points["size"].iloc[-1],
                "ms": points["ms"].iloc[-1],
                "grown MB": points["grown_mb"].iloc[-1],
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Time and memory over each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(
        2, len(_VALUES), figsize=(11, 5), dpi=120, sharey="row", sharex="col"
    )
    rows = (("ms", "ms a step"), ("grown_mb", "memory grown, MB"))
    for axes_row, (column, label) in zip(all_axes, rows):
        axes_row[0].set_ylabel(label)
        for axes, (_, points) in zip(
            axes_row, table.groupby("varied", sort=False)
        ):
            for side, line in points.groupby("side", sort=False):
                slope = exponent(line["size"], line[column])
                axes.loglog(
                    line["size"],
                    line[column],
                    "o-",
                    ms=4,
                    label=f"{side}: {slope:.2f}",
                )
            axes.legend(frameon=False, fontsize=7, title_fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, varied in zip(all_axes[1], _VALUES):
        axes.set_xlabel({"batch": "batch size"}.get(varied, varied))
    figure.suptitle("Exponents of the three largest sizes in the legends")
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str]) -> None:
    del argv
    rows = []
    for varied, values in _VALUES.items():
        for value in values:
            sizes = {**_BASE, varied: value}
            for row in measure(sizes):
                rows.append({"varied": varied, "size": value, **row})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    shown = exponents(table)
    print(shown.to_string(index=False))

    output = reports.output_directory(_OUTPUT_DIR.value)
    table.to_csv(output / "scaling.csv", index=False, float_format="%.6g")
    draw(table, output / "scaling.png")
    base = ", ".join(f"{name} {size}" for name, size in _BASE.items())
    cells = [
        [x if isinstance(x, str) else f"{x:.4g}" for x in row]
        for row in shown.values
    ]
    text = [
        "# How the cost of a step grows",
        "",
        f"Written by `{reports.command()}`: dense layers, {base} but for the "
        f"size that is varied; XLA {'on' if _JIT.value else 'off'}. The "
        f"exponents are fitted to the {_FITTED} largest sizes.",
        "",
        reports.markdown(shown.columns, cells),
        "",
        "![Time and memory over each size](scaling.png)",
        "",
        reports.conditions(machine.versions(["tensorflow", "keras"])),
        "",
    ]
    (output / "scaling.md").write_text("\n".join(text))


if __name__ == "__main__":
    app.run(main)
