"""Directories that are written into, here or in remote storage."""

from __future__ import annotations

import os

import tensorflow as tf

# What TensorFlow, Keras and Python raise where a file cannot be written.
ERRORS = (OSError, tf.errors.OpError)


def check_writable(argument: str, directory: str) -> None:
    """Makes a directory; a `ValueError` if nothing can be written into it.

    Args:
        argument: What the caller's user knows the directory as.
        directory: Its path.
    """
    trial = os.path.join(directory, f".writable-{os.getpid()}")
    try:
        tf.io.gfile.makedirs(directory)
        with tf.io.gfile.GFile(trial, "w") as file:
            file.write("")
        tf.io.gfile.remove(trial)
    except ERRORS as error:
        raise ValueError(
            f"`{argument}` must be a directory that can be written. Received: "
            f"{argument}={directory!r}, and writing fails: {error}. Give "
            "another, or the right to write there."
        ) from error
