"""Functions compiled for a model, kept as long as the model lives."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from typing import Any
import weakref

import tensorflow as tf

from keras_fisher._measuring.model_fingerprint import fingerprint

_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def uses_xla(model: Any) -> bool:
    """Whether a model is compiled with XLA when Keras trains it."""
    return bool(getattr(model, "jit_compile", False))


@contextlib.contextmanager
def in_graphs() -> Iterator[None]:
    """Functions are traced within, whatever the program has asked for.

    `tf.config.run_functions_eagerly` would leave no graph to read.
    """
    asked = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(False)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(asked)


def kept(
    model: Any, key: Hashable, made_for: Sequence, make: Callable[[], Any]
) -> Any:
    """What `make` returns, made once for a model as it is now.

    Args:
        model: The model. What is kept must hold no strong reference to it.
        key: Tells apart different things that are kept for one model.
        made_for: What it depends on besides the model.
        make: Called if there is nothing yet, or if since then anything about
            the model or `made_for` was changed but the values of variables.
    """
    state = [uses_xla(model), *fingerprint(model, *made_for)]
    known = _KEPT.setdefault(model, {})
    if key not in known or known[key][0] != state:
        known[key] = state, make()
    return known[key][1]
