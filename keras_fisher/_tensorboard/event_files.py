"""TensorBoard's event files: what is in them, and how to take some out.

Read with TensorBoard's own loader, which takes files that are being written,
and files whose last record a killed process has left half-written.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import posixpath
import re
from typing import NamedTuple

from tensorboard.backend.event_processing import event_file_loader
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.util import tensor_util
import tensorflow as tf

# TensorBoard takes every file with this in its name for an event file.
_MARK = "tfevents"


class Scalar(NamedTuple):
    """One point of a curve.

    Attributes:
        tag: Name of the curve.
        step: Where the point is.
        value: What was written; float.
        wall_time: When it was written, in seconds since 1970.
    """

    tag: str
    step: int
    value: float
    wall_time: float


def paths(directory: str) -> list[str]:
    """The event files right in a directory, oldest first."""
    if not tf.io.gfile.isdir(directory):
        return []
    return [
        posixpath.join(directory, name)
        for name in sorted(tf.io.gfile.listdir(directory), key=_age)
        if _MARK in name
    ]


def directories(root: str) -> list[str]:
    """All directories below `root`, and itself, that hold event files."""
    return sorted(
        directory
        for directory, _, names in tf.io.gfile.walk(root)
        if any(_MARK in name for name in names)
    )


def scalars(directory: str) -> Iterator[Scalar]:
    """Yields the points of all curves in a directory, as they were written."""
    kinds = {}  # some writers name the plugin with the first point only
    for event in _events(directory):
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            plugin = kinds.setdefault(value.tag, plugin)
            if plugin == scalar_metadata.PLUGIN_NAME:
                number = tensor_util.make_ndarray(value.tensor).item()
                yield Scalar(value.tag, event.step, number, event.wall_time)


def hyperparameters(directory: str) -> dict[str, float | str | bool]:
    """The hyperparameters last written into a directory; {} if none are."""
    found = {}
    for event in _events(directory):
        for value in event.summary.value:
            if value.tag == hparams_metadata.SESSION_START_INFO_TAG:
                session = hparams_metadata.parse_session_start_info_plugin_data(
                    value.metadata.plugin_data.content
                )
                found = {
                    name: getattr(hparam, hparam.WhichOneof("kind"))
                    for name, hparam in session.hparams.items()
                }
    return found


def has_ended(directory: str) -> bool:
    """Whether a run that is written into a directory has told of its end."""
    return any(
        value.tag == hparams_metadata.SESSION_END_INFO_TAG
        for event in _events(directory)
        for value in event.summary.value
    )


def begins_run(tag: str) -> bool:
    """Whether what is written under a tag tells what run has begun."""
    return tag == hparams_metadata.SESSION_START_INFO_TAG


def take_out(directory: str, unwanted: Callable[[str, int], bool]) -> int:
    """Takes the unwanted curve points out of the files of a directory.

    A file that holds some is written anew. What it was stays beside it, under
    a name that TensorBoard does not read.

    Args:
        directory: Where the files are. No process may be writing them.
        unwanted: Function of a tag and a step.

    Returns:
        Number of points taken out.
    """
    count = 0
    for path in paths(directory):
        kept, found = [], 0
        for event in event_file_loader.LegacyEventFileLoader(path).Load():
            values = [
                value
                for value in event.summary.value
                if not unwanted(value.tag, event.step)
            ]
            removed = len(event.summary.value) - len(values)
            found += removed
            if removed:
                del event.summary.value[:]
                event.summary.value.extend(values)
            if values or not removed:
                kept.append(event.SerializeToString())
        if found:
            _replace(path, kept)
        count += found
    return count


def _age(name: str) -> list:
    """Sorts by the numbers in a name: the second, the process, the count."""
    return [
        (0, int(part)) if part.isdigit() else (1, part)
        for part in re.split(r"(\d+)", name)
    ]


def _events(directory: str) -> Iterator:
    for path in paths(directory):
        yield from event_file_loader.EventFileLoader(path).Load()


def _replace(path: str, records: list[bytes]) -> None:
    directory, name = posixpath.split(path)
    name = name.replace(_MARK, "events")
    new = posixpath.join(directory, f"new.{name}")
    with tf.io.TFRecordWriter(new) as writer:
        for record in records:
            writer.write(record)
    for k in range(1, 1000):
        old = posixpath.join(directory, f"replaced-{k}.{name}")
        if not tf.io.gfile.exists(old):
            break
    # In this order, so that whatever happens in between, nothing is lost.
    tf.io.gfile.copy(path, old)
    tf.io.gfile.rename(new, path, overwrite=True)
