"""Many runs in one directory: resumed where stopped, shared by processes.

Each run has a file for its result, one for its trained network and one that
is locked while a process works on it. The operating system frees the lock of
a process that dies.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import threading
import time

import experiment
from experiment import Run
from experiment import common
from experiment import settings
import keras
import pandas as pd
import resuming
import tensorflow as tf

_SECONDS_BETWEEN_LOOKS = 1.0
# What XLA compiles for a run stays in the memory of its process.
_RUNS_IN_A_PROCESS = 10
# Else glibc gives large tensors back to the system after each operation and
# gets them anew page by page, which takes SimpleCNN's steps on pictures 1.4
# times as long. It reads this when a process begins.
_KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


def results(runs: Iterable[Run], output_dir: str, title: str) -> pd.DataFrame:
    """Trains what has not been trained, with a bar over the runs.

    Runs that another process is working on are waited for.

    Args:
        runs: The runs; those that are equal are trained once.
        output_dir: Their files are in its directory `runs`.
        title: Said before it begins.

    Returns:
        A row for each run, in their order, with the fields of the `Run` and
        what was measured, `history` and `path` (of the network) included.
    """
    runs = [*dict.fromkeys(run.effective() for run in runs)]
    directory = os.path.join(output_dir, "runs")
    os.makedirs(directory, exist_ok=True)
    print(f"{title}: {len(runs)} runs")
    with trainer(settings.jit()) as train:

        def job(run: Run):
            return lambda: {
                "run": dataclasses.asdict(run),
                **train(run, path(run, directory, "keras")),
            }

        found = shared(
            {path(run, directory, "json"): job(run) for run in runs}, "run"
        )
    for run in runs:
        resuming.delete(
            experiment.backup_directory(path(run, directory, "keras"))
        )
    for result in found:
        del result["run"]  # which may be of before a field was added
    return pd.DataFrame(
        {
            **dataclasses.asdict(run),
            **result,
            "path": path(run, directory, "keras"),
        }
        for run, result in zip(runs, found, strict=True)
    )


def histories(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each epoch of each run, with the fields of the run."""
    fields = [field.name for field in dataclasses.fields(Run)]
    return pd.DataFrame(
        {**row[fields], **epoch}
        for _, row in frame.iterrows()
        for epoch in row["history"]
    )


@contextlib.contextmanager
def trainer(jit: bool | str):
    """Context with `experiment.train` in a process of its own, now and then."""
    context = multiprocessing.get_context("spawn")
    executor, left = None, 0
    for name, value in _KEPT_MEMORY.items():
        os.environ.setdefault(name, value)

    def train(run: Run, path: str) -> dict:
        nonlocal executor, left
        if left == 0:
            if executor is not None:
                executor.shutdown()
            executor = futures.ProcessPoolExecutor(
                1, mp_context=context, initializer=_begin_process
            )
            left = _RUNS_IN_A_PROCESS
        left -= 1
        return executor.submit(experiment.train, run, path, jit).result()

    try:
        yield train
    finally:
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)


def _begin_process() -> None:
    _expect_tracing()

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def shared(jobs: dict[str, Callable[[], dict]], unit: str) -> list[dict]:
    """Does what has not been done, with a bar, and waits for other processes.

    Args:
        jobs: For each file with a result what gives that result, if the file
            is not there and no other process is at it.
        unit: Of the bar.

    Returns:
        The results, in the order of the jobs.
    """
    _expect_tracing()
    bar = keras.utils.Progbar(len(jobs), unit_name=unit)
    waiting = [*jobs]
    while waiting:
        left = []
        for path in waiting:
            if _is_done(path, jobs[path]):
                bar.add(1)
            else:
                left.append(path)
        if len(left) == len(waiting):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        waiting = left
    return [_read(path) for path in jobs]


def _is_done(path: str, job: Callable[[], dict]) -> bool:
    """Whether there is a result, after doing the job if it is free."""
    if os.path.exists(path):
        return True
    with _lock(os.path.splitext(path)[0] + ".lock") as is_free:
        if not is_free:
            return False
        # Another may have done it since.
        if not os.path.exists(path):
            write(path, json.dumps(job(), indent=1))
    return True


def _expect_tracing() -> None:
    # Each run traces functions of its own, which TensorFlow warns of.
    tf.get_logger().setLevel("ERROR")


def _read(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def path(run: Run, directory: str, extension: str) -> str:
    """Where a file of a run is: runs that differ in anything have others."""
    known = dataclasses.asdict(run.effective())
    # Runs of before these fields keep their names.
    if run.train_examples is None:
        del known["train_examples"]
    if known["fraction"] == 1:
        del known["fraction"]
    fields = json.dumps(known, sort_keys=True)
    digest = hashlib.sha256(fields.encode()).hexdigest()[:10]
    name = f"{run.method}-{run.strength:g}-lr{run.learning_rate:g}"
    name = f"{name}-seed{run.seed}-{digest}".replace(" ", "_")
    return os.path.join(directory, f"{name}.{extension}")


@contextlib.contextmanager
def _lock(path: str):
    """Context with whether this process alone has the lock."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write(path: str, text: str) -> None:
    """Writes a file that is complete whenever it is there."""
    with (
        common.replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(text)
