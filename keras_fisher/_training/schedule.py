"""What each step does besides training: nothing, measure, penalize, reuse."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from keras_fisher.penalties.base import Penalty

NOTHING, FRESH, REUSED = range(3)  # what a step does with the penalty
_LONGEST_PERIOD = 100_000


class Plan(NamedTuple):
    """What one step does besides training; each has its own function.

    Attributes:
        penalize: `NOTHING`, `FRESH` for a new penalty, or `REUSED` for the
            stored gradient.
        measure: Whether Tr(F) is measured.
    """

    penalize: int
    measure: bool

    @property
    def is_plain(self) -> bool:
        """Whether the step is Keras's own."""
        return not self.measure and self.penalize == NOTHING

    @property
    def observes(self) -> bool:
        """Whether there is something to tell of the step."""
        return self.measure or self.penalize == FRESH


class Schedule:
    """The plan of each optimizer step, counted from 0.

    Args:
        penalty: With its `start`, `stop`, `every` and `reuse`; None for none.
        trace_every: Measure Tr(F) every so many steps, next to those at which
            the penalty measures it in passing; None for the latter alone.
    """

    def __init__(self, penalty: Penalty | None, trace_every: int | None):
        self._penalty = penalty
        self._trace_every = trace_every

    @property
    def observes(self) -> bool:
        """Whether steps may do anything besides training."""
        return self._penalty is not None or self._trace_every is not None

    def observed(self, steps: np.ndarray) -> np.ndarray:
        """Whether there is something to tell of each of some steps."""
        penalize, measure = np.divmod(self._codes(np.asarray(steps)), 2)
        return (measure == 1) | (penalize == FRESH)

    @property
    def plans(self) -> list[Plan]:
        """The plans that some step follows, so that no other is compiled."""
        return list(map(_plan, self._reachable_codes))

    def choose(self, function: Callable[[Plan], Any], step) -> Any:
        """Calls `function` with the plan of a step, which may be a tensor."""
        step = tf.cast(tf.convert_to_tensor(step), tf.int64)
        if tf.executing_eagerly():
            return function(_plan(self._codes(int(step))))
        codes = self._reachable_codes
        if len(codes) == 1:
            return function(_plan(codes[0]))
        code = self._codes(step)
        index = tf.argmax(
            tf.cast(code == tf.constant(codes, tf.int64), tf.int32)
        )
        return tf.switch_case(
            tf.cast(index, tf.int32),
            [lambda c=c: function(_plan(c)) for c in codes],
        )

    def next_fresh(self, step: int) -> int | None:
        """The first step from this one on that has a fresh penalty."""
        if self._penalty is None:
            return None
        penalty = self._penalty
        first = max(step, penalty.start)
        first += (penalty.start - first) % penalty.every
        return first if penalty.is_fresh(first) else None

    def _codes(self, step):
        """Plans as integers; `step` may be an array, or a tensor."""
        nothing = 0 * step
        integer = _caster(step)
        fresh = reused = measured = nothing
        if self._trace_every is not None:
            measured = integer(step % self._trace_every == 0)
        if self._penalty is not None:
            fresh = integer(self._penalty.is_fresh(step))
            if self._penalty.stores_gradient:
                reused = integer(self._penalty.is_active(step)) - fresh
            if self._penalty.measures_trace:
                # In passing, so that these steps are all alike.
                measured = measured | fresh
        return 2 * (FRESH * fresh + REUSED * reused) + measured

    @functools.cached_property
    def _reachable_codes(self) -> list[int]:
        penalty = self._penalty
        every = 1 if penalty is None else penalty.every
        phases = [0]
        if penalty is not None:
            phases += [penalty.start, penalty.stop or 0]
        period = math.lcm(every, self._trace_every or 1)
        if period > _LONGEST_PERIOD:
            steps = np.array([*phases, *(first + 1 for first in phases)])
            codes = Schedule(penalty, None)._codes(steps).tolist()
            if self._trace_every is not None:
                codes += [code | 1 for code in codes]
            return sorted(set(codes))
        steps = [np.arange(first, first + period) for first in phases]
        return sorted(set(self._codes(np.concatenate(steps)).tolist()))


def _plan(code: int) -> Plan:
    penalize, measure = divmod(int(code), 2)
    return Plan(penalize, bool(measure))


def _caster(step):
    if tf.is_tensor(step):
        return lambda condition: tf.cast(condition, step.dtype)
    return lambda condition: np.asarray(condition).astype(np.int64)
