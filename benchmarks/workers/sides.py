"""What `steps.py` measures beside a plain `keras.Model`."""

from __future__ import annotations

import re

from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty

PLAIN = "keras.Model"


def _sides(batch_size: int) -> dict[str, dict | None]:
    """Arguments of `FisherModel`; None for Keras alone."""

    def penalized(bound=None, **kwargs) -> dict:
        return dict(penalty=FisherPenalty(0.1, bound=bound, **kwargs))

    return {
        PLAIN: None,
        "no penalty, no trace": dict(trace_every=None),
        "trace every 50": dict(trace_every=50),
        "trace every 10": dict(trace_every=10),
        "FP every 1": penalized(),
        "FP bounded": penalized(bound=1.0),
        "FP every 10": penalized(every=10),
        "FP every 10, not reused": penalized(every=10, reuse=False),
        "FP fraction 1/8": penalized(fraction=1 / 8),
        "FP 4 micro-batches": penalized(micro_batch_size=batch_size // 4),
        "FP finite difference": penalized(method="finite_difference"),
        "FP bounded finite difference": penalized(
            bound=1.0, method="finite_difference"
        ),
        "GP": dict(penalty=GradientPenalty(0.1, bound=None), trace_every=None),
    }


NAMES = tuple(_sides(batch_size=4))


def arguments(name: str, batch_size: int) -> dict | None:
    """Arguments of `FisherModel` for a side; None for `keras.Model`."""
    return _sides(batch_size)[name]


def period(name: str) -> int:
    """Number of steps after which a side does the same again."""
    found = re.search(r"every (\d+)", name)
    return int(found[1]) if found else 1
