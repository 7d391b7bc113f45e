"""Time and memory of Tr(F), side by side with its peers in PyTorch.

All sides measure the same network on the same batch, and take turns round by
round. What else the machine does slows PyTorch more than TensorFlow, so
rounds that other processes disturb are repeated. Then each side has a fresh
process for its memory. Prints a table, and writes it with a figure. PyTorch
and the peers live in an environment of their own, which is made if it is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf
from workers import machine
from workers import processes
from workers import reports

import keras_fisher

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each side.", 3)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Examples.", 1)
_JIT = flags.DEFINE_boolean(
    "jit", False, "Whether to compile the sides of TensorFlow with XLA."
)
_PEERS = flags.DEFINE_boolean("peers", True, "Whether to run PyTorch's sides.")
_TORCH_ENV = flags.DEFINE_string(
    "torch_env",
    ".venv-torch",
    "Virtual environment with PyTorch and the peers, from the root of the "
    "repository; completed or made if anything is missing.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    "benchmarks/results",
    "Where to write the table and the figure, from the root of the repository.",
)
_MEMORY_OF = flags.DEFINE_string(
    "memory_of", None, "Only tells the memory of a side; used by the script."
)

_PACKAGES = ("tensorflow", "keras", "numpy")
# BackPACK is faster with opt_einsum, and does not ask for it.
_REQUIREMENTS = (
    "torch==2.13.0",
    "backpack-for-pytorch",
    "nngeometry",
    "numpy",
    "opt_einsum",
)
_WARM_UPS, _MEMORY_CALLS = 2, 3
# Idle threads of one framework spin for a while, at the cost of the other.
_PAUSE = 0.1
_GRADIENTS = {
    "TensorFlow": "TensorFlow gradient",
    "PyTorch": "PyTorch gradient",
}
# Side: framework, estimator.
_SIDES = {
    "TensorFlow gradient": ("TensorFlow", "gradient"),
    "PyTorch gradient": ("PyTorch", "gradient"),
    "keras_fisher monte_carlo": ("TensorFlow", "monte_carlo"),
    "BackPACK BatchL2Grad": ("PyTorch", "monte_carlo"),
    "NNGeometry FIM_MonteCarlo": ("PyTorch", "monte_carlo"),
    "torch.func": ("PyTorch", "monte_carlo"),
    "keras_fisher exact": ("TensorFlow", "exact"),
    "BackPACK DiagGGNExact": ("PyTorch", "exact"),
    "NNGeometry FIM": ("PyTorch", "exact"),
}
_REFERENCE = "keras_fisher exact"
# Of a figure without error, relative; of one with error, in standard errors.
_TOLERANCE, _MOST_ERRORS = 1e-3, 4.0
# Share of the processors that other processes may take in a round, and the
# rounds that are tried for each one that counts.
_MOST_OF_OTHERS, _TRIES = 0.05, 2


def network() -> keras.Model:
    """The network of all sides, with fixed initial weights."""
    keras.utils.set_random_seed(0)
    model = keras_fisher.applications.SimpleCNN((32, 32, 3), classes=10)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=_JIT.value,
    )
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    random = np.random.default_rng(0)
    x = random.normal(size=(_BATCH_SIZE.value, 32, 32, 3)).astype("float32")
    return x, random.integers(0, 10, size=_BATCH_SIZE.value)


def gradient(model: keras.Model, x, y) -> Callable[[], float]:
    """The gradient of the loss, without anything of this library."""

    @tf.function(jit_compile=_JIT.value)
    def loss_and_gradient(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))
            )
        return loss, tape.gradient(loss, model.trainable_variables)

    return lambda: float(loss_and_gradient(x, y)[0])


def tensorflow_sides(model: keras.Model, x, y) -> dict[str, Callable]:
    """Functions that measure once."""
    x, y = tf.constant(x), tf.constant(y)

    def trace(estimator):
        return lambda: keras_fisher.fisher_trace(
            model, x, estimator=estimator, verbose=0
        )

    sides = {}
    for name, (framework, estimator) in _SIDES.items():
        if framework == "TensorFlow":
            is_gradient = estimator == "gradient"
            sides[name] = (
                gradient(model, x, y) if is_gradient else trace(estimator)
            )
    return sides


def peer(python: Path, saved: str) -> processes.Worker:
    """A process with the sides of PyTorch."""
    return processes.Worker(python, "traces_torch.py", saved)


class Usage:
    """What part of the processors other processes take, since it was made."""

    def __init__(self, worker: processes.Worker | None):
        self._worker = worker
        self._begin = self._now()

    def _now(self) -> np.ndarray:
        own = time.process_time()
        if self._worker:
            own += self._worker.ask("cpu")
        return np.array([time.perf_counter(), machine.busy_seconds() - own])

    def of_others(self) -> float:
        """The share, NaN if it is not known."""
        passed, others = self._now() - self._begin
        # `max` would make 0 of NaN.
        return float(np.maximum(0.0, others / passed / os.cpu_count()))


def take_turn(
    tensorflow: dict[str, Callable], worker: processes.Worker | None
) -> dict[str, tuple[float, float]]:
    """Seconds and value of each side, once."""
    turn = {}
    for name in _SIDES:
        if name in tensorflow:
            time.sleep(_PAUSE)
            begin = time.perf_counter()
            value = tensorflow[name]()
            turn[name] = time.perf_counter() - begin, float(value)
        elif worker:
            time.sleep(_PAUSE)
            reply = worker.ask(f"run {name}")
            turn[name] = reply["seconds"], reply["value"]
    return turn


def take_turns(
    tensorflow: dict[str, Callable], worker: processes.Worker | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Seconds and values of each side, by round, and the share of others.

    Rounds that other processes disturbed are repeated: they slow the threads
    of PyTorch, which wait for each other, much more than those of TensorFlow.
    If it does not get quieter, the quietest rounds remain.
    """
    for _ in range(_WARM_UPS):
        take_turn(tensorflow, worker)
    rounds, quiet = [], 0
    while quiet < _ROUNDS.value and len(rounds) < _TRIES * _ROUNDS.value:
        usage = Usage(worker)
        turn = take_turn(tensorflow, worker)
        share = usage.of_others()
        rounds.append((share, turn))
        quiet += not share > _MOST_OF_OTHERS
        print(
            f"Round {len(rounds)}: {quiet} of {_ROUNDS.value} quiet; other "
            f"processes took {share:.0%} of the processors.",
            flush=True,
        )
    rounds = sorted(rounds, key=lambda turn: turn[0])[: _ROUNDS.value]
    seconds, values = (
        {name: np.array([t[name][k] for _, t in rounds]) for name in turn}
        for k in range(2)
    )
    return seconds, values, rounds[-1][0]


def tell_memory(name: str) -> None:
    """Prints the peaks before and after a side has run in this process."""
    model, (x, y) = network(), batch()
    measure = tensorflow_sides(model, x, y)[name]
    before = machine.peak()
    for _ in range(_MEMORY_CALLS):
        measure()
    print(json.dumps([before, machine.peak()]))


def memory(name: str, python: Path | None, saved: str) -> tuple[float, float]:
    """Peaks of a fresh process, with model and data, and with a side too."""
    if _SIDES[name][0] == "TensorFlow":
        told = subprocess.run(
            [sys.executable, *sys.argv, f"--memory_of={name}"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return tuple(json.loads(told.stdout.splitlines()[-1]))
    with peer(python, saved) as worker:
        before = worker.ask("peak")
        for _ in range(_MEMORY_CALLS):
            worker.ask(f"run {name}")
        return before, worker.ask("peak")


def table_of(
    seconds: dict[str, np.ndarray],
    values: dict[str, np.ndarray],
    peaks: dict[str, tuple[float, float]],
):
    """A `pandas.DataFrame` with a row for each side."""
    # Not above: the processes whose memory is measured do without.
    import pandas as pd

    rows = []
    for name, times in seconds.items():
        framework, estimator = _SIDES[name]
        low, ratio, high = np.percentile(
            times / seconds[_GRADIENTS["TensorFlow"]], [25, 50, 75]
        )
        own = times / seconds[_GRADIENTS[framework]]
        row = {
            "side": name,
            "estimator": estimator,
            "median_ms": 1e3 * np.median(times),
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
            "ratio_own": np.median(own),
            "peak_mb": peaks[name][1],
            "peak_above_mb": peaks[name][1] - peaks[name][0],
        }
        if estimator != "gradient":
            row["trace"] = values[name].mean()
        if estimator == "monte_carlo":
            row["trace_error"] = values[name].std(ddof=1) / len(times) ** 0.5
        rows.append(row)
    return pd.DataFrame(rows)


def disagreements(values: dict[str, np.ndarray]) -> list[str]:
    """Warnings of sides that do not measure what the others do."""
    drawn = [n for n in values if _SIDES[n][1] == "monte_carlo"]
    # All of them draw one label for each example, and so have one variance.
    variance = np.mean([values[name].var(ddof=1) for name in drawn])
    warnings = []
    for name, column in values.items():
        allowed = _TOLERANCE
        expected = values[_REFERENCE].mean()
        if _SIDES[name][1] == "gradient":
            expected = values[_GRADIENTS["TensorFlow"]].mean()
        elif name in drawn:
            error = np.sqrt(variance / len(column)) / expected
            allowed += _MOST_ERRORS * error
        # So written, it warns of NaN too.
        if not abs(column.mean() / expected - 1) <= allowed:
            warnings.append(
                f"WARNING: {name} found {column.mean():.6g} where "
                f"{expected:.6g} was expected."
            )
    return warnings


def for_reading(table):
    """The table with figures as text."""

    def trace(row):
        if np.isnan(row.trace):
            return ""
        if np.isnan(row.trace_error):
            return f"{row.trace:.4f}"
        return f"{row.trace:.3f} ± {row.trace_error:.3f}"

    shown = table[["side", "estimator"]].copy()
    shown["median ms"] = table.median_ms.map("{:.0f}".format)
    shown["ratio"] = table.ratio.map("{:.2f}".format)
    shown["quartiles"] = [
        f"{row.ratio_low:.2f}, {row.ratio_high:.2f}"
        for row in table.itertuples()
    ]
    shown["ratio to own"] = table.ratio_own.map("{:.2f}".format)
    shown["peak MB"] = table.peak_mb.map("{:.0f}".format)
    shown["above model"] = table.peak_above_mb.map("{:.0f}".format)
    shown["Tr(F)"] = [trace(row) for row in table.itertuples()]
    return shown


def report(
    shown, warnings: list[str], found: dict[str, str], share: float
) -> str:
    """What the results say, and what they were found with."""
    lines = [
        "# Tr(F) beside its peers",
        "",
        "Written by `benchmarks/traces.py`:",
        "",
        f"```sh\n{reports.command()}\n```",
        "",
        f"SimpleCNN for 32x32x3 images, {_BATCH_SIZE.value} examples, "
        f"{_ROUNDS.value} rounds, XLA {'on' if _JIT.value else 'off'} in "
        "TensorFlow.",
        "",
        reports.markdown(shown.columns, shown.values),
        "",
        *(f"{warning}\n" for warning in warnings),
        "- A gradient is one forward and backward pass of the mean loss; "
        "`ratio` is the median over rounds of the time to TensorFlow's, with "
        "its quartiles, and `ratio to own` that to the gradient of the same "
        "framework.",
        f"- `peak MB` is the most memory of a fresh process after "
        f"{_MEMORY_CALLS} calls; `above model` is what it has grown by since "
        "libraries, model and data were there.",
        "- Tr(F) is the mean over rounds, with its standard error. All "
        "monte_carlo sides draw one label for each example at each call.",
        "",
        "![The same as bars](traces.png)",
        "",
        reports.conditions(
            found,
            f"; other processes took at most {share:.0%} of them in a round",
        ),
    ]
    return "\n".join(lines) + "\n"


def draw(table, path: Path) -> None:
    """Time and memory as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"TensorFlow": "tab:orange", "PyTorch": "tab:blue"}
    frameworks = [_SIDES[name][0] for name in table.side]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 0.8 + 0.34 * len(table)), dpi=120
    )
    # Estimators stand apart.
    groups = table.estimator.ne(table.estimator.shift()).cumsum()
    positions = np.arange(len(table)) + 0.6 * groups.to_numpy()
    style = dict(color=[colors[name] for name in frameworks], height=0.75)
    spread = np.abs(
        table[["ratio_low", "ratio_high"]].to_numpy().T - table.ratio.to_numpy()
    )
    left.barh(positions, table.ratio, xerr=spread, ecolor="0.3", **style)
    bars = right.barh(positions, table.peak_above_mb, **style)
    right.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    right.margins(x=0.12)
    reports.label_bars(
        left,
        table.ratio_high,
        positions,
        table.ratio,
        "{:.1f}",
        xytext=(4, 0),
        fontsize=8,
    )
    left.margins(x=0.12)
    left.set_yticks(positions, table.side)
    left.invert_yaxis()
    left.set_xlabel("time, in gradients of TensorFlow")
    right.set_xlabel("memory beside model and data, MB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colors.values()]
    if len(set(frameworks)) > 1:
        right.legend(handles, colors, loc="best", frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str]) -> None:
    del argv
    if _MEMORY_OF.value:
        tell_memory(_MEMORY_OF.value)
        return
    python = None
    if _PEERS.value:
        python = processes.torch_python(_TORCH_ENV.value, _REQUIREMENTS)
    model, (x, y) = network(), batch()
    tensorflow = tensorflow_sides(model, x, y)
    found = machine.versions(_PACKAGES)
    with tempfile.TemporaryDirectory() as directory:
        saved = os.path.join(directory, "batch.npz")
        weights = {
            f"weight_{k:02}": weight
            for k, weight in enumerate(model.get_weights())
        }
        np.savez(saved, x=x, y=y, **weights)
        with contextlib.ExitStack() as stack:
            worker = None
            if python:
                worker = stack.enter_context(peer(python, saved))
                found.update(worker.ask("versions"))
            seconds, values, share = take_turns(tensorflow, worker)
        peaks = {name: memory(name, python, saved) for name in seconds}

    table = table_of(seconds, values, peaks)
    shown, warnings = for_reading(table), disagreements(values)
    if share > _MOST_OF_OTHERS:
        warnings.append(
            f"WARNING: Other processes took up to {share:.0%} of the "
            "processors, which slows PyTorch more than TensorFlow."
        )
    print(shown.to_string(index=False))
    for warning in warnings:
        print(warning)
    output = reports.output_directory(_OUTPUT_DIR.value)
    table.to_csv(output / "traces.csv", index=False, float_format="%.6g")
    (output / "traces.md").write_text(report(shown, warnings, found, share))
    draw(table, output / "traces.png")


if __name__ == "__main__":
    app.run(main)
