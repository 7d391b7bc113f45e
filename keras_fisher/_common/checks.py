"""Checks of arguments: errors say what was received and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import numbers
from typing import Any


def number(
    name: str, value: Any, allowed: Callable[[Any], bool], description: str
) -> float:
    """Returns a number as Python's, with which all that takes numbers works.

    Raises:
        ValueError: Unless `value` is a number, also of NumPy, that is allowed.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not allowed(value)
    ):
        raise ValueError(
            f"`{name}` must be {description}. Received: {name}={value!r}"
        )
    return float(value)


def integer(
    name: str, value: Any, minimum: int, description: str | None = None
) -> int:
    """Returns an integer as Python's, with which all that takes them works.

    Raises:
        ValueError: Unless `value` is an integer, also of NumPy, >= `minimum`.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)
        or value < minimum
    ):
        raise ValueError(
            f"`{name}` must be an integer "
            f"{description or f'of at least {minimum}'}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def choice(name: str, value: Any, allowed: Sequence) -> None:
    """Raises a `ValueError` unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {tuple(allowed)}. "
            f"Received: {name}={value!r}"
        )
