"""Functions compiled for a model, kept as long as the model lives."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
import weakref

_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def uses_xla(model: Any) -> bool:
    """Whether a model is compiled with XLA when Keras trains it."""
    return bool(getattr(model, "jit_compile", False))


def kept(model: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for a model as it is now.

    Args:
        model: The model. What is kept must hold no strong reference to it.
        key: Tells apart different things that are kept for one model.
        make: Called if there is nothing yet, or if since then other variables
            have become trainable, or dtypes or the use of XLA have changed.
    """
    state = (
        uses_xla(model),
        str(getattr(model, "dtype_policy", None)),
        tuple(id(variable) for variable in model.trainable_variables),
    )
    known = _KEPT.setdefault(model, {})
    if key not in known or known[key][0] != state:
        known[key] = state, make()
    return known[key][1]
