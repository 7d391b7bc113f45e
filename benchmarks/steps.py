"""Step time and memory through `fit`, beside plain Keras and PyTorch.

Every side trains the same network on the same batch in a process of its own,
and they take turns, so that what else the machine does falls on all of them
alike. Beside the ratios stands the arithmetic floor: how many more
multiplications a step has than a plain one. Prints a table for each network,
and writes all of them with a figure.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app
from absl import flags
import numpy as np
import pandas as pd
from workers import machine
from workers import processes
from workers import reports
from workers import sides
from workers.networks import NETWORKS

_ROUNDS = flags.DEFINE_integer("rounds", 11, "Turns of each side.", 3)
_NETWORKS = flags.DEFINE_multi_enum(
    "network", [], list(NETWORKS), "A network to measure; all if none is given."
)
_SIDES = flags.DEFINE_multi_enum(
    "side", [], list(sides.NAMES), "A side to measure; all if none is given."
)
_JIT = flags.DEFINE_enum(
    "jit",
    "faster",
    ["faster", "on", "off"],
    "Whether XLA compiles the sides of Keras: where it makes plain Keras "
    "faster on CPUs, or on or off for all networks.",
)
_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution",
    1,
    "Steps in one call of the train function, 1 by default in Keras.",
    1,
)
_PEERS = flags.DEFINE_boolean("peers", True, "Whether to run PyTorch's sides.")
_TORCH_ENV = flags.DEFINE_string(
    "torch_env",
    ".venv-torch",
    "Virtual environment with PyTorch, from the root of the repository; "
    "completed or made if anything is missing.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "benchmarks/results",
    "Where to write the tables and the figure, from the root of the "
    "repository.",
)

_TORCH = {"PyTorch": "plain", "PyTorch FP": "FP"}
_TORCH_REQUIREMENTS = ("torch==2.13.0", "numpy")
_PACKAGES = ("tensorflow", "keras", "numpy")
# Idle threads of one framework spin for a while, at the cost of the other.
_PAUSE = 0.1


def uses_xla(network: str) -> bool:
    if _JIT.value == "faster":
        return NETWORKS[network].jit
    return _JIT.value == "on"


def workers(network: str, python: Path | None, saved: str):
    """Yields names and processes of all sides."""
    jit = "jit" if uses_xla(network) else "graph"
    names = _SIDES.value or list(sides.NAMES)
    for name in dict.fromkeys([sides.PLAIN, *names]):
        yield (
            name,
            processes.Worker(
                sys.executable,
                "steps_keras.py",
                network,
                name,
                jit,
                str(_PER_EXECUTION.value),
            ),
        )
    if python:
        for name, penalty in _TORCH.items():
            yield (
                name,
                processes.Worker(
                    python, "steps_torch.py", network, penalty, saved
                ),
            )


def steps_of(network: str, side: str) -> int:
    """Steps in a turn, with each kind of step as often as in training."""
    period = sides.period(side)
    return -(-NETWORKS[network].steps // period) * period


def measure(network: str, python: Path | None) -> tuple[pd.DataFrame, dict]:
    """A row for each side, and the versions of peers."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        saved = os.path.join(directory, "batch.npz")
        x, y = NETWORKS[network].batch()
        np.savez(saved, x=x, y=y)
        with contextlib.ExitStack() as stack:
            running = {
                name: stack.enter_context(worker)
                for name, worker in workers(network, python, saved)
            }
            steps = {name: steps_of(network, name) for name in running}
            for worker in running.values():
                worker.ask("peak")  # until all have started
            first = {n: w.ask("first") for n, w in running.items()}
            for name, worker in running.items():
                worker.ask(f"run {steps[name]}")
            times = {name: [] for name in running}
            for k in range(_ROUNDS.value):
                for name, worker in running.items():
                    time.sleep(_PAUSE)
                    times[name].append(worker.ask(f"run {steps[name]}"))
                print(f"{network}: round {k + 1} of {_ROUNDS.value}")
            peaks = {n: w.ask("peak") for n, w in running.items()}
            operations = {
                name: None if name in _TORCH else worker.ask("operations")
                for name, worker in running.items()
            }
            if python:
                found = running["PyTorch"].ask("versions")

    plain = np.array(times[sides.PLAIN])
    rows = []
    for name in running:
        low, ratio, high = np.percentile(times[name] / plain, [25, 50, 75])
        before, after = peaks[name]
        rows.append(
            {
                "network": network,
                "side": name,
                "median_ms": 1e3 * np.median(times[name]),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "floor": (operations[name] or np.nan) / operations[sides.PLAIN],
                "first_step_s": first[name],
                "peak_mb": after,
                "peak_above_mb": after - before,
            }
        )
    return pd.DataFrame(rows), found


def for_reading(table: pd.DataFrame) -> pd.DataFrame:
    """The table of one network, with figures as text."""

    def to_plain(column):
        own = table[column] / table[column][0]
        return own.map("{:.2f}".format)

    return pd.DataFrame(
        {
            "side": table.side,
            "ms": table.median_ms.map("{:.4g}".format),
            "ratio": table.ratio.map("{:.2f}".format),
            "quartiles": [
                f"{row.ratio_low:.2f}, {row.ratio_high:.2f}"
                for row in table.itertuples()
            ],
            "floor": table.floor.map(
                lambda x: "" if np.isnan(x) else f"{x:.2f}"
            ),
            "first step s": table.first_step_s.map("{:.1f}".format),
            "to plain": to_plain("first_step_s"),
            "peak MB": table.peak_mb.map("{:.0f}".format),
            "grown by MB": table.peak_above_mb.map("{:.0f}".format),
            "grown, to plain": to_plain("peak_above_mb"),
        }
    )


def report(tables: dict[str, pd.DataFrame], found: dict[str, str]) -> str:
    """What the results say, and what they were found with."""
    lines = [
        "# The cost of a step",
        "",
        f"Written by `{reports.command()}`, {_ROUNDS.value} rounds.",
        "",
    ]
    for network, table in tables.items():
        xla = "XLA" if uses_xla(network) else "without XLA"
        shown = for_reading(table)
        lines += [
            f"## {network}, batch of {NETWORKS[network].batch_size}, {xla}",
            "",
            reports.markdown(shown.columns, shown.values),
            "",
        ]
    lines += [
        "- `ratio` is the median over rounds of the time of a step to that of "
        "`keras.Model.fit` in the same round, with its quartiles.",
        "- `floor` is the same ratio of multiplications in matrix products and "
        "convolutions, counted in the graph; empty where steps differ.",
        "- `first step` is a `fit` of one step in Keras, with all that is "
        "traced and compiled for it; in PyTorch it includes the model.",
        "- `grown by` is the most memory of the process less what it had "
        "before the model was made.",
        "",
        "![The same as bars](steps.png)",
        "",
        reports.conditions(found),
    ]
    return "\n".join(lines) + "\n"


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Ratios as bars, with the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    count = max(map(len, tables.values()))
    figure, all_axes = plt.subplots(
        rows,
        columns,
        sharey=True,
        squeeze=False,
        figsize=(1.6 + 3 * columns, rows * (0.9 + 0.26 * count)),
        dpi=120,
    )
    for axes in all_axes.flat[len(tables) :]:
        axes.set_visible(False)
    for axes, (network, table) in zip(all_axes.flat, tables.items()):
        spread = np.abs(
            table[["ratio_low", "ratio_high"]].to_numpy().T
            - table.ratio.to_numpy()
        )
        colors = [
            "tab:blue" if name in _TORCH else "tab:orange"
            for name in table.side
        ]
        positions = np.arange(len(table))
        axes.barh(
            positions, table.ratio, xerr=spread, color=colors, ecolor="0.3"
        )
        axes.plot(table.floor, positions, "k|", ms=11, mew=2)
        reports.label_bars(
            axes,
            np.fmax(table.ratio_high, table.floor),
            positions,
            table.ratio,
            "{:.2f}",
            xytext=(7, 0),
            fontsize=7,
        )
        axes.set_xlim(0, 1.2 * table[["ratio_high", "floor"]].max().max())
        axes.set_title(network, fontsize=9)
        axes.set_yticks(positions, table.side, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes.flat:
        if axes.get_visible() and not axes.yaxis_inverted():
            axes.invert_yaxis()
    # A legend's mark would look like one more floor.
    figure.supxlabel(
        "time of a step, to keras.Model.fit (black: arithmetic floor)",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str]) -> None:
    del argv
    python = None
    if _PEERS.value:
        python = processes.torch_python(_TORCH_ENV.value, _TORCH_REQUIREMENTS)
    found, tables = machine.versions(_PACKAGES), {}
    output = reports.output_directory(_OUTPUT_DIR.value)
    for network in _NETWORKS.value or NETWORKS:
        table, versions = measure(network, python)
        tables[network] = table
        found.update(versions)
        print(for_reading(table).to_string(index=False), flush=True)
        # Each time, since all networks take the better part of an hour.
        pd.concat(tables.values()).to_csv(
            output / "steps.csv", index=False, float_format="%.6g"
        )
        (output / "steps.md").write_text(report(tables, found))
        draw(tables, output / "steps.png")


if __name__ == "__main__":
    app.run(main)
