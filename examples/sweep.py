"""Many runs in one directory: resumed where stopped, shared by processes.

Each run has a file for its result, one for its trained network and one that
is locked while a process works on it. The operating system frees the lock of
a process that dies.
"""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time

import common
from experiment import Run
from experiment import train
import keras
import pandas as pd
import tensorflow as tf

_SECONDS_BETWEEN_LOOKS = 1.0


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
    # That each run traces functions of its own is no news.
    tf.get_logger().setLevel("ERROR")
    runs = [*dict.fromkeys(runs)]
    directory = os.path.join(output_dir, "runs")
    os.makedirs(directory, exist_ok=True)
    print(f"{title}: {len(runs)} runs")
    bar = keras.utils.Progbar(len(runs), unit_name="run")
    waiting = runs
    while waiting:
        left = [run for run in waiting if not _ensure(run, directory, bar)]
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


def _ensure(run: Run, directory: str, bar) -> bool:
    """Whether there is a result of a run, after training it if it is free."""
    path = _path(run, directory, "json")
    if not os.path.exists(path):
        with _lock(_path(run, directory, "lock")) as is_free:
            if not is_free:
                return False
            # Another may have trained it since.
            if not os.path.exists(path):
                network = _path(run, directory, "keras")
                result = {"run": dataclasses.asdict(run), **train(run, network)}
                write(path, json.dumps(result, indent=1))
                keras.utils.clear_session()
    bar.add(1)
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
