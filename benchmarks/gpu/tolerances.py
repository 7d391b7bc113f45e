"""How far results on a card may be from those of TensorFlow on a CPU.

Relative to what they are. Each program is judged by itself, so that no
precision speaks for another one.
"""

from __future__ import annotations

import math
from typing import Any

import tables

_ROUNDING = 1e-5
# Differences lose half the digits.
_OF_DIFFERENCES = 1e-3
# In float32 a ReLU near zero may round to the other side, with all that comes
# of it. Of networks that have so many of them that one does, gradients were off
# by up to 2 % (ResNet-50) even on a CPU, those of differences by up to 16 %,
# and what a step returns by 0.06 %. Without the penalty, the gradient of a
# penalized step would be off by 70 % or more. Smaller faults are for float64
# to find, in which no ReLU is so near zero and 1e-7 was the most.
_WITH_MANY_RELUS = ("VGG11", "ResNet-50", "WideResNet-16-8")
_GRADIENT, _GRADIENT_OF_DIFFERENCES, _RETURNED = 0.1, 0.4, 0.01


def needs_float64(network: str) -> bool:
    """Whether float32 tells of gross faults alone."""
    return network in _WITH_MANY_RELUS


def allowed(name: str) -> tuple[float, float]:
    """The most that a program's gradient, and what it returns, may be off."""
    parts = tables.name_parts(name)
    has_differences = "finite difference" in parts["side"]
    if parts["mode"] == "mixed_bfloat16":
        # What is rounded depends on what a compiler fuses.
        return math.inf, math.inf
    if parts["mode"] == "float32" and needs_float64(parts["network"]):
        gradient = _GRADIENT_OF_DIFFERENCES if has_differences else _GRADIENT
        return gradient, _RETURNED
    tolerance = _OF_DIFFERENCES if has_differences else _ROUNDING
    return tolerance, tolerance


def wrong(checks: dict[str, dict[str, Any]]) -> list[str]:
    """Programs that are off by more, of those that were checked."""
    found = []
    for name, check in checks.items():
        errors = (
            tables.worst([check["gradient"] or 0.0]),
            tables.worst([0.0, *check["outputs"].values()]),
        )
        most = allowed(name)
        for what, error, limit in zip(("gradient", "returned"), errors, most):
            if error > limit:
                found.append(f"{name}: {what} {error:.1e}, not {limit:.0e}")
    return found
