"""Shows the inputs of one step to a function on the host, before the step."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import threading
from typing import Any

import tensorflow as tf


class FirstLook:
    """Looks at real inputs, once: no others are made up to try a model on.

    Args:
        look: Function of the inputs. What it raises ends the step before it
            changes anything; a graph tells of it by an error of TensorFlow's.
        is_needed: Function that says whether there is anything to look for,
            asked when a step is traced.
    """

    def __init__(
        self, look: Callable[[Any], None], is_needed: Callable[[], bool]
    ):
        self._function = look
        self._is_needed = is_needed
        self._is_done = False
        self._error: Exception | None = None

    def look(self, x: Any) -> None:
        """Looks at concrete inputs, unless that was done."""
        if self._is_done or not self._is_needed():
            return
        self._is_done = True
        try:
            self._function(x)
        except Exception:
            self._is_done = False  # Who goes on is told again.
            raise

    def raise_error(self) -> None:
        """Raises what `look` has raised within a graph."""
        error, self._error = self._error, None
        if error is not None:
            raise error from None

    def step(self, number: Any, at: int | None, x: Any) -> list:
        """To be called in each step, before it; at one step it looks.

        Args:
            number: Of the step, a scalar tensor or variable.
            at: The step at which to look; None for none.
            x: The inputs of one replica.

        Returns:
            Operations that the step has to wait for.
        """
        if at is None or self._is_done or not self._is_needed():
            return []
        if tf.executing_eagerly():
            if int(number) == at:
                self.look(x)
            return []
        # A function on the host takes tensors of the dense kind alone.
        leaves = tf.nest.flatten(x, expand_composites=True)

        def look(*values):
            given = iter(values)
            flat = [None if leaf is None else next(given) for leaf in leaves]
            with _LOOKS:
                try:
                    self.look(tf.nest.pack_sequence_as(x, flat, True))
                except Exception as error:
                    self._error = error
                    raise

        there = [leaf for leaf in leaves if leaf is not None]

        def looked():
            with tf.control_dependencies([tf.py_function(look, there, [])]):
                return tf.constant(True)

        return [tf.cond(number == at, looked, lambda: tf.constant(False))]


class _Looks(contextlib.AbstractContextManager):
    """Context of a function on the host that calls functions itself.

    It holds one of TensorFlow's threads, and a function that it calls waits
    for another one: for ever, if looks hold them all, as a single one does on a
    machine of one processor. There functions run as Python meanwhile (but for
    those of `tf.vectorized_map`, which TensorFlow lets nobody choose).
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._count, self._before = 0, None

    def __enter__(self):
        with self._lock:
            self._count += 1
            if self._before is None and self._count >= _threads():
                self._before = tf.config.functions_run_eagerly()
                tf.config.run_functions_eagerly(True)

    def __exit__(self, *_):
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._before is not None:
                tf.config.run_functions_eagerly(self._before)
                self._before = None


_LOOKS = _Looks()


def _threads() -> int:
    """On how many threads TensorFlow runs operations at once."""
    return (
        tf.config.threading.get_inter_op_parallelism_threads()
        or _threads_of_environment()
        or _processors()
    )


def _threads_of_environment() -> int:
    text = os.environ.get("TF_NUM_INTEROP_THREADS", "")
    return int(text) if text.isdecimal() else 0


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
