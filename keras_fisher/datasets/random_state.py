"""The global random generators of Python and NumPy, borrowed and returned."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import random
import threading

import numpy as np

# The generators are global: two threads that draw from them would mix.
_LOCK = threading.RLock()


@contextlib.contextmanager
def borrowed_random_state() -> Iterator[None]:
    """Give a block fresh global randomness and the caller's state back.

    Inside, the global generators of `random` and `numpy.random` start from
    the operating system's entropy, and one thread at a time has them. After
    the block they continue as if it had never run.
    """
    with _LOCK:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed()
        np.random.seed()
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
