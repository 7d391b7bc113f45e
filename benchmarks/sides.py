"""What `steps.py` measures beside a plain `keras.Model`."""

from __future__ import annotations

from keras_fisher import FisherPenalty

PLAIN = "keras.Model"
_MICRO_BATCHES = 4
# Arguments of `FisherModel` and of the penalty; None for Keras alone.
_SIDES = {
    PLAIN: None,
    "no penalty, no trace": (dict(trace_every=None), None),
    "trace every 50": (dict(trace_every=50), None),
    "trace every 10": (dict(trace_every=10), None),
    "FP every 1": ({}, {}),
    "FP every 10": ({}, dict(every=10)),
    "FP every 10, not reused": ({}, dict(every=10, reuse=False)),
    "FP fraction 1/8": ({}, dict(fraction=1 / 8)),
    "FP 4 micro-batches": ({}, dict(micro_batch_size=_MICRO_BATCHES)),
    "FP finite difference": ({}, dict(method="finite_difference")),
    "GP": (dict(penalty="gradient", trace_every=None), None),
}
NAMES = tuple(_SIDES)


def arguments(name: str, batch_size: int) -> dict | None:
    """Arguments of `FisherModel` for a side; None for `keras.Model`."""
    if _SIDES[name] is None:
        return None
    model, penalty = _SIDES[name]
    if penalty is None:
        return model
    if "micro_batch_size" in penalty:
        size = batch_size // penalty["micro_batch_size"]
        penalty = dict(penalty, micro_batch_size=size)
    return dict(model, penalty=FisherPenalty(0.1, **penalty))
