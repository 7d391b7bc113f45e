"""Checks of the arguments that several networks take."""

from __future__ import annotations

from collections.abc import Iterable
import numbers

_SHAPES = {
    2: "(length, channels) for signals",
    3: "(height, width, channels) for images",
}


def checked_shape(
    input_shape: Iterable[int],
    *,
    ranks: tuple[int, ...] = (3,),
    poolings: int = 0,
) -> tuple[int, ...]:
    """Returns `input_shape` as a tuple of integers.

    Args:
        input_shape: Shape of one example.
        ranks: How many axes it may have: 2 for signals, 3 for images.
        poolings: How often the network halves an image, without padding.

    Returns:
        The sizes of the axes.

    Raises:
        ValueError: If it has another rank, has an axis that is not a positive
            integer, or is an image too small for the poolings.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    sizes_are_known = all(map(_is_positive_integer, shape))
    if len(shape) not in ranks or not sizes_are_known:
        allowed = " or ".join(_SHAPES[rank] for rank in ranks)
        raise ValueError(
            f"`input_shape` must be {allowed}, of positive integers and "
            f"without the batch. Received: input_shape={input_shape!r}."
        )
    # The poolings must leave at least one pixel.
    minimum = 2**poolings
    if len(shape) == 3 and min(shape[:2]) < minimum:
        times = "twice" if poolings == 2 else f"{poolings} times"
        raise ValueError(
            f"Images must be at least {minimum} pixels high and wide, to be "
            f"pooled {times}. Received: input_shape={input_shape!r}. Resize "
            "or pad them."
        )
    return tuple(map(int, shape))


def repetitions(depth: int, step: int, rest: int) -> int:
    """Returns the positive n for which `depth` is `step` n + `rest`.

    Raises:
        ValueError: If there is none.
    """
    is_integer = _is_positive_integer(depth)
    depth = int(depth) if is_integer else depth
    n, excess = divmod(depth - rest, step) if is_integer else (0, 0)
    if n < 1 or excess:
        n = max(n, 1)
        raise ValueError(
            f"`depth` must be {step}n + {rest} for a positive integer n. "
            f"Received: depth={depth!r}. The next valid depths are "
            f"{step * n + rest} and {step * (n + 1) + rest}."
        )
    return n


def _is_positive_integer(value: object) -> bool:
    is_integer = isinstance(value, numbers.Integral)
    return is_integer and not isinstance(value, bool) and value >= 1
