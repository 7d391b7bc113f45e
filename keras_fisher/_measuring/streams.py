"""What brings its own batches: how to read it, and whether it ends."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import itertools
import sys
from typing import Any
from typing import NamedTuple
import warnings

import keras
import tensorflow as tf

# So many batches are more than data have that somebody measures all of: an
# epoch of ImageNet is 5,000 batches of 256.
_SUSPICIOUS = 10_000
# From the user's call down to the generator that warns.
_STACKLEVEL = 5


class Stream(NamedTuple):
    """Batches as somebody else has made them.

    Attributes:
        begin: Function that begins to read, once for each call.
        count: Number of batches; None if nobody knows.
    """

    begin: Callable[[], Iterator]
    count: int | None


def of(x: Any, steps: int | None = None) -> Stream | None:
    """The batches of a data set or generator; None of anything else.

    Args:
        x: A `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader` of
            PyTorch, a data set or loader of Grain, a generator, or other data.
        steps: How many batches are wanted; None for all.

    Raises:
        ValueError: If all are wanted of what has no end, or is a generator.
    """
    if isinstance(x, tf.data.Dataset):
        count = int(x.cardinality())
        is_endless = count == tf.data.INFINITE_CARDINALITY
        found = Stream(x.__iter__, count if count >= 0 else None)
    elif isinstance(x, keras.utils.PyDataset):
        is_endless = x.num_batches is None
        found = Stream(lambda: _items(x), x.num_batches)
    elif _is_of(x, "torch.utils.data", "DataLoader"):
        found, is_endless = Stream(x.__iter__, _length(x)), False
    elif _is_of(x, "grain", "DataLoader", "IterDataset", "MapDataset"):
        is_endless = _length(x) == sys.maxsize
        # Of those that it counts, a filter leaves out some.
        found = Stream(x.__iter__, None)
    elif isinstance(x, Iterator):
        is_endless = True
        # Who reads them again finds them kept.
        kept = list(itertools.islice(x, steps)) if steps else []
        found = Stream(kept.__iter__, len(kept))
    else:
        return None
    if steps is not None:
        return Stream(
            lambda: itertools.islice(found.begin(), steps),
            steps if found.count is None else min(steps, found.count),
        )
    if is_endless:
        raise ValueError(
            "It is not known that the data ever end. Received: "
            f"{type(x).__name__} without `steps`. Pass `steps=`, the number "
            "of batches to measure on."
        )
    return found if found.count is not None else _watched(found)


def _is_of(x: Any, module: str, *names: str) -> bool:
    """Whether `fit` takes it as one of a package that may not be there."""
    imported = sys.modules.get(module)
    classes = (getattr(imported, name, None) for name in names)
    return isinstance(x, tuple(filter(None, classes)))


def _length(x: Any) -> int | None:
    try:
        return len(x)
    except TypeError:  # which those raise that do not know it
        return None


def _items(x: keras.utils.PyDataset) -> Iterator:
    count = x.num_batches
    numbers = itertools.count() if count is None else range(count)
    return (x[i] for i in numbers)


def _watched(stream: Stream) -> Stream:
    """One that warns if it has not ended when others have long done so."""
    has_warned = False

    def begin():
        nonlocal has_warned
        for number, batch in enumerate(stream.begin(), start=1):
            if number > _SUSPICIOUS and not has_warned:
                has_warned = True
                warnings.warn(
                    f"{_SUSPICIOUS:,} batches have been read, and nobody "
                    "knows whether the data end. If they do not, this does "
                    "not either: interrupt it and pass `steps=`, the number "
                    "of batches to measure on. If they do, "
                    "`tf.data.experimental.assert_cardinality` tells a data "
                    "set its length.",
                    stacklevel=_STACKLEVEL,
                )
            yield batch

    return Stream(begin, None)
