"""Reading back, as tables, what training wrote for TensorBoard.

    frame = keras_fisher.logs.read("logs")  # every point of every curve
    table = keras_fisher.logs.runs("logs")  # one row a run

Needs pandas, which comes with `pip install "keras_fisher[plot]"`.
"""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING

import tensorflow as tf

from keras_fisher._common import optional_imports
from keras_fisher._tensorboard import event_files
from keras_fisher._tensorboard import tags

if TYPE_CHECKING:
    import pandas as pd


def read(log_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads all curves below a log directory.

    The files may still be written to, or be what a killed run has left.

    Args:
        log_dir: Directory of one run, or of any tree of runs.

    Returns:
        A row for each point, by run, split, tag and step, with the columns

        - `run`: directory of the run, relative to `log_dir`; `"."` for
          `log_dir` itself.
        - `split`: `"train"`, `"validation"` or `"hparams"`, the directory of
          the run that the point was in; `""` if it has another name, and is
          then taken for a run.
        - `tag`: name of the curve, for example `"fisher/trace"`.
        - `step` (int64): the optimizer step, or the epoch for `epoch_*`.
        - `value` (float64).
        - `wall_time` (float64): when it was written, in seconds since 1970.

        Of points that were written more than once, as by a run that went on
        from an earlier checkpoint, the last one. The index numbers the points
        in the order of writing, in which layers are in that of the model.

    Raises:
        ImportError: If pandas is missing.
        ValueError: If there is no such directory, or no event file in it.

    Example:
    ```pycon
    >>> frame = keras_fisher.logs.read("logs")
    >>> trace = frame[frame["tag"] == "fisher/trace"]
    >>> trace.groupby("run")["value"].max()
    run
    lr=0.01    411.2
    lr=0.1      97.3
    Name: value, dtype: float64
    ```
    """
    pd = optional_imports.imported("pandas", __name__)
    points = [
        (run, split, *point)
        for run, split, directory in _located(log_dir)
        for point in event_files.scalars(directory)
    ]
    columns = ["run", "split", *event_files.Scalar._fields]
    frame = pd.DataFrame(points, columns=columns).astype(
        {
            **dict.fromkeys(["run", "split", "tag"], str),
            "step": "int64",
            **dict.fromkeys(["value", "wall_time"], "float64"),
        }
    )
    key = ["run", "split", "tag", "step"]
    # Several files may have been written to in turns.
    frame = frame.sort_values("wall_time", kind="stable", ignore_index=True)
    return frame.drop_duplicates(key, keep="last").sort_values(key)


def runs(log_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads the hyperparameters and the final metrics of runs.

    Args:
        log_dir: Directory of one run, or of any tree of runs.

    Returns:
        A row for each run, with the index `run` (as of `read`). The columns
        are the hyperparameters, in alphabetical order, and after them the
        metrics, for example `early_trace` (TrF_i) and `val_accuracy`. A
        metric with the name of a hyperparameter is called `metric/<name>`.
        What a run does not have is NaN.

    Raises:
        ImportError: If pandas is missing.
        ValueError: If there is no such directory, or no event file in it.

    Example:
    ```pycon
    >>> table = keras_fisher.logs.runs("logs")
    >>> table[["learning_rate", "early_trace", "val_accuracy"]]
             learning_rate  early_trace  val_accuracy
    run
    lr=0.01           0.01        301.7         0.872
    lr=0.1            0.10         81.0         0.939
    ```
    """
    pd = optional_imports.imported("pandas", __name__)
    given, measured = {}, {}
    for run, split, directory in _located(log_dir):
        if split in (tags.TRAIN, tags.VALIDATION):
            # Not read to the end, which can take minutes.
            metrics, is_run = {}, any(event_files.scalars(directory))
            hyperparameters = {}
        else:
            points = [*event_files.scalars(directory)]
            metrics, is_run = _last_metrics(points), bool(points)
            hyperparameters = event_files.hyperparameters(directory)
        if is_run or hyperparameters:
            given.setdefault(run, {}).update(hyperparameters)
            measured.setdefault(run, {}).update(metrics)
    index = pd.Index(list(given), name="run")
    left, right = (
        pd.DataFrame(list(rows.values()), index=index).sort_index(axis=1)
        for rows in (given, measured)
    )
    right = right.rename(
        columns={name: tags.METRIC + name for name in left.columns}
    )
    return pd.concat([left, right], axis=1).sort_index()


def _located(log_dir: str | os.PathLike[str]) -> list[tuple[str, str, str]]:
    """Run, split and path of each directory with event files."""
    root = os.fspath(log_dir)
    if not tf.io.gfile.isdir(root):
        raise ValueError(
            f"There is no directory log_dir={root!r}. Pass the log_dir of "
            "FisherTensorBoard, or a directory that holds those of many runs."
        )
    located = []
    for directory in event_files.directories(root):
        path = posixpath.relpath(directory, root)
        located.append((*tags.run_and_split(path), directory))
    if not located:
        raise ValueError(
            f"There are no event files of TensorBoard in log_dir={root!r}, nor "
            "in a directory below it. Train with the callback "
            f"FisherTensorBoard({root!r}) to write some."
        )
    return located


def _last_metrics(points: list[event_files.Scalar]) -> dict[str, float]:
    return {
        point.tag.removeprefix(tags.METRIC): point.value
        for point in sorted(points, key=lambda point: point.wall_time)
        if point.tag.startswith(tags.METRIC)
    }
