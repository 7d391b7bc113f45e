"""Trains on Fashion-MNIST with exported steps, fed back to themselves.

Needs JAX and NumPy, no TensorFlow. Prints a line for each epoch of each run,
and writes all of them as CSV as they come.
"""

from __future__ import annotations

import concurrent.futures
import csv
import gzip
from pathlib import Path
import time
from typing import Any

import arrays
import jax
import numpy as np
import runtime

_NONE, _EVALUATION = "no penalty", "evaluation"
# Learning rates, sides and label noise, what is told apart first is first.
_RUNS = (
    *((0.1, _NONE, 0.0), (0.003, _NONE, 0.0), (0.003, "FP 1", 0.0)),
    *((0.003, _NONE, 0.4), (0.003, "FP 1", 0.4), (0.1, _NONE, 0.4)),
    *((0.003, "FP bounded", 0.0), (0.003, "FP bounded", 0.4)),
    *((0.1, "FP 0.1", 0.4), (0.1, "FP 0.1", 0.0), (0.003, "FP 0.1", 0.0)),
    *((0.1, "FP 1", 0.4), (0.003, "FP 0.1", 0.4), (0.1, "FP 1", 0.0)),
)


def read(path: Path) -> np.ndarray:
    """An array from a file in the IDX format."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, "uint8", offset=4 + 4 * rank).reshape(shape)


class Data:
    """Fashion-MNIST on the device, its images normalized.

    Args:
        directory: Has the four files of Debian's `dataset-fashion-mnist`.
    """

    def __init__(self, directory: Path):
        images, test = (
            read(directory / f"{part}-images-idx3-ubyte.gz")
            for part in ("train", "t10k")
        )
        mean, std = images.mean(), images.std()
        self.labels, self.test_labels = (
            read(directory / f"{part}-labels-idx1-ubyte.gz").astype("int32")
            for part in ("train", "t10k")
        )
        self.images, self.test_images = (
            jax.device_put(((x - mean) / std).astype("float32")[..., None])
            for x in (images, test)
        )

    def noisy(self, rate: float) -> np.ndarray:
        """The labels for training, a share of them drawn anew."""
        size = self.labels.shape
        drawn = (10 * arrays.uniform("noisy label", size)).astype("int32")
        return np.where(
            arrays.uniform("is noisy", size) < rate, drawn, self.labels
        )


@jax.jit
def _batch(x, y, rows):
    return x[rows], y[rows]


class Trainer:
    """Trains one network.

    Args:
        programs: By side and plan.
        data: What it trains on.
    """

    def __init__(self, programs: dict[tuple, runtime.Program], data: Data):
        self._programs, self._data = programs, data
        first = next(iter(programs.values())).described["arguments"]
        self._x, self._y = first[0]["name"], first[1]["name"]
        self._size = first[0]["shape"][0]

    def start(self, side: str, rate: float) -> dict[str, Any]:
        """Initial values of all variables, with a learning rate."""
        values = {}
        for (name, _), program in self._programs.items():
            if name not in (side, _EVALUATION):
                continue
            for argument in program.described["arguments"]:
                value = arrays.made(argument)
                if argument["name"].endswith(" rate"):
                    value = np.full_like(value, rate)
                values[argument["name"]] = jax.device_put(value)
        return values

    def epoch(self, values, side, labels, seed: int, limit=None):
        """One epoch, or some of its steps; Tr(F) as it was measured."""
        order = np.argsort(
            arrays.uniform(f"order {seed}", self._data.labels.shape)
        )
        count = limit or len(order) // self._size
        traces, known = [], {}
        for step in range(count):
            rows = order[step * self._size : (step + 1) * self._size]
            values[self._x], values[self._y] = _batch(
                self._data.images, labels, rows
            )
            plan = "fresh"
            if (side, plan) not in self._programs:
                plan = "plain" if step % 10 else "measured"
            found = self._programs[side, plan].call(values)
            if not known:
                known = {n.rpartition("/")[2]: n for n in found}
            if step % 10 == 0:
                traces.append(found[known["fisher_trace"]])
        # Steps are queued only, and who calls reads the clock.
        jax.block_until_ready(values)
        return np.asarray(jax.device_get(traces))

    def predicted(self, values, images) -> np.ndarray:
        """The labels that the model gives images."""
        program, size = self._programs[_EVALUATION, "outputs"], self._size
        found = []
        for begin in range(0, len(images), size):
            # The last batch is as long as the others.
            begin = min(begin, len(images) - size)
            values[self._x] = images[begin : begin + size]
            outputs = program.call(values)
            logits = next(o for o in outputs.values() if o.ndim == 2)
            found.append((begin, logits.argmax(-1)))
        labels = np.zeros(len(images), "int32")
        for begin, part in found:
            labels[begin : begin + size] = np.asarray(part)
        return labels

    def accuracies(self, values, labels: np.ndarray) -> dict[str, float]:
        """On the test set, and on clean and noisy examples."""
        test = self.predicted(values, self._data.test_images)
        train = self.predicted(values, self._data.images)
        is_noisy = labels != self._data.labels
        found = {
            "test": (test == self._data.test_labels).mean(),
            "clean": (train == labels)[~is_noisy].mean(),
        }
        if is_noisy.any():
            found["noisy"] = (train == labels)[is_noisy].mean()
            found["recovered"] = (train == self._data.labels)[is_noisy].mean()
        return {k: float(v) for k, v in found.items()}


def is_evaluated(epoch: int, epochs: int) -> bool:
    """Whether accuracies are computed after an epoch, counted from 1."""
    return epoch in (1, epochs) or epoch % 2 == 0


def train(
    trainer: Trainer, run: tuple, epochs: int, data: Data, write, until: float
) -> None:
    """One run.

    Args:
        trainer: Has the programs.
        run: One of `_RUNS`.
        epochs: How many, if time allows.
        data: What is trained on.
        write: Takes a row of each epoch.
        until: When no epoch is begun any more, as of `time.time`.
    """
    rate, side, noise = run
    labels = data.noisy(noise)
    on_device = jax.device_put(labels)
    values = trainer.start(side, rate)
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        traces = trainer.epoch(values, side, on_device, epoch)
        seconds = time.perf_counter() - begin
        row = {
            "rate": rate,
            "side": side,
            "noise": noise,
            "epoch": epoch,
            "trace": float(traces.mean()),
            "peak": float(traces.max()),
            "seconds": round(seconds, 2),
        }
        is_late = time.time() > until
        if is_late or is_evaluated(epoch, epochs):
            row |= trainer.accuracies(values, labels)
        write(row)
        if is_late and epoch < epochs:
            print(f"no time: {run} after {epoch} epochs", flush=True)
            return


def main() -> None:
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--data", default="/usr/share/datasets/fashion-mnist", help="Images.")
    add("--network", default="ResNet-20", help="Which network.")
    add("--seconds", type=float, default=240.0, help="Time for everything.")
    add("--runs", type=int, default=8, help="How many of the runs.")
    add("--epochs", type=int, default=30, help="At most.")
    options = parser.parse_args()
    start = time.time()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    described = [
        d
        for d in runtime.descriptions(Path(options.programs))
        if d["network"] == options.network and d["kind"] == "trained"
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(runtime.Program, described)
        programs = {
            (d["side"], d["plan"]): program
            for d, program in zip(described, compiled)
        }
    data = Data(Path(options.data))
    trainer = Trainer(programs, data)
    known = {side for side, _ in programs}
    runs = [run for run in _RUNS if run[1] in known][: options.runs]
    print(f"{time.time() - start:.0f} s: compiled {len(programs)}", flush=True)
    epoch, evaluation = costs(trainer, runs, data)
    until = start + options.seconds
    left = 0.8 * (until - time.time())
    epochs = epochs_within(left, options.epochs, epoch, evaluation)
    print(
        f"{epoch:.1f} s for an epoch of all, {evaluation:.1f} s for their "
        f"evaluations: {epochs} epochs",
        flush=True,
    )
    fields = ["rate", "side", "noise", "epoch", "trace", "peak", "test"]
    fields += ["clean", "noisy", "recovered", "seconds"]
    with (output / "gpu-training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()

        def write(row):
            writer.writerow(row)
            file.flush()
            print(
                " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in row.items()
                ),
                flush=True,
            )

        for run in runs:
            if time.time() > until:
                print(f"no time: {run}")
                continue
            train(trainer, run, epochs, data, write, until)


def costs(trainer: Trainer, runs, data: Data) -> tuple[float, float]:
    """Seconds that an epoch of all runs takes, and one evaluation of each."""
    labels, total = jax.device_put(data.labels), 0.0
    for rate, side, _ in runs:
        values = trainer.start(side, rate)
        trainer.epoch(values, side, labels, 0, 3)
        begin = time.perf_counter()
        trainer.epoch(values, side, labels, 0, 20)
        total += time.perf_counter() - begin
    epoch = total / 20 * (len(data.labels) // 128)
    # They run the same program, whatever the side; the first one compiles.
    trainer.accuracies(values, data.labels)
    begin = time.perf_counter()
    trainer.accuracies(values, data.labels)
    return epoch, len(runs) * (time.perf_counter() - begin)


def epochs_within(
    seconds: float, most: int, epoch: float, evaluation: float
) -> int:
    """How many epochs fit into a time, at least one.

    Args:
        seconds: The time for all runs.
        most: No more epochs than these.
        epoch: Seconds that one of all runs takes.
        evaluation: Seconds that one of all runs takes.
    """

    def total(epochs: int) -> float:
        evaluated = sum(is_evaluated(e, epochs) for e in range(1, epochs + 1))
        return epochs * epoch + evaluated * evaluation

    fitting = (n for n in range(1, most + 1) if total(n) <= seconds)
    return max(fitting, default=1)


if __name__ == "__main__":
    main()
