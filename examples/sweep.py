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

import common
import experiment
from experiment import Run
import keras
import pandas as pd
import settings
import tensorflow as tf

_SECONDS_BETWEEN_LOOKS = 1.0
# What XLA compiles for a run stays in the memory of its process.
_RUNS_IN_A_PROCESS = 10


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
    runs = [*dict.fromkeys(runs)]
    directory = os.path.join(output_dir, "runs")
    os.makedirs(directory, exist_ok=True)
    print(f"{title}: {len(runs)} runs")
    bar = keras.utils.Progbar(len(runs), unit_name="run")
    waiting = runs
    with trainer(settings.jit()) as train:
        while waiting:
            left = []
            for run in waiting:
                if _is_done(run, directory, train):
                    bar.add(1)
                else:
                    left.append(run)
            if len(left) == len(waiting):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            waiting = left
    return pd.DataFrame([_row(run, directory) for run in runs])


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
    # That each run traces functions of its own is no news.
    tf.get_logger().setLevel("ERROR")

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _is_done(run: Run, directory: str, train: Callable) -> bool:
    """Whether there is a result of a run, after training it if it is free."""
    path = _path(run, directory, "json")
    if os.path.exists(path):
        return True
    with _lock(_path(run, directory, "lock")) as is_free:
        if not is_free:
            return False
        # Another may have trained it since.
        if not os.path.exists(path):
            result = train(run, _path(run, directory, "keras"))
            result = {"run": dataclasses.asdict(run), **result}
            write(path, json.dumps(result, indent=1))
    return True


def _row(run: Run, directory: str) -> dict:
    with open(_path(run, directory, "json"), encoding="utf-8") as file:
        result = json.load(file)
    return {
        **result.pop("run"),
        **result,
        "path": _path(run, directory, "keras"),
    }


def _path(run: Run, directory: str, extension: str) -> str:
    fields = json.dumps(dataclasses.asdict(run), sort_keys=True)
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
