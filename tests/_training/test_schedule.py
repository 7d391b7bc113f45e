"""What a step does is what its schedule says, step by step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher._training.schedule import FRESH
from keras_fisher._training.schedule import NOTHING
from keras_fisher._training.schedule import REUSED
from keras_fisher._training.schedule import Plan
from keras_fisher._training.schedule import Schedule

_STEPS = range(30)
_CASES = [
    (None, None),
    (None, 3),
    *itertools.product(
        (
            FisherPenalty(0.1),
            FisherPenalty(0.1, every=4),
            FisherPenalty(0.1, every=4, reuse=False, start=2),
            FisherPenalty(0.1, every=3, start=5, stop=12),
            GradientPenalty(0.1, every=5, stop=11),
        ),
        (None, 1, 7),
    ),
]


def _expected(penalty, trace_every, step):
    """The arguments of penalties, as they are documented."""
    penalize = NOTHING
    measure = trace_every is not None and step % trace_every == 0
    if penalty is not None:
        stop = penalty.stop or len(_STEPS)
        if penalty.start <= step < stop:
            if (step - penalty.start) % penalty.every == 0:
                penalize = FRESH
                measure |= isinstance(penalty, FisherPenalty)
            elif penalty.reuse:
                penalize = REUSED
    return Plan(penalize, measure)


@pytest.mark.parametrize(("penalty", "trace_every"), _CASES)
def test_steps_have_the_plan_that_the_arguments_say(penalty, trace_every):
    steps = Schedule(penalty, trace_every)
    expected = [_expected(penalty, trace_every, step) for step in _STEPS]
    assert [steps.choose(lambda p: p, step) for step in _STEPS] == expected
    assert set(steps.plans) == set(expected), "no other is compiled"
    observed = steps.observed(np.arange(len(_STEPS)))
    assert observed.tolist() == [plan.observes for plan in expected]
    assert steps.observes == (penalty is not None or trace_every is not None)

    def told(plan):
        return tf.constant(plan.penalize), tf.constant(plan.measure)

    @tf.function
    def in_graph(step):
        return steps.choose(told, step)

    for step, plan in zip(_STEPS, expected):
        found = in_graph(tf.constant(step, tf.int64))
        assert tuple(map(int, found)) == plan


_PLAIN = [Plan(NOTHING, False)]
_BOTH = [*_PLAIN, Plan(NOTHING, True)]
_REUSED = [Plan(REUSED, False), Plan(REUSED, True)]


@pytest.mark.parametrize(
    ("penalty", "trace_every", "plans"),
    [
        (None, 10**6, _BOTH),
        (FisherPenalty(0.1), 10**6, [Plan(FRESH, True)]),
        (
            FisherPenalty(0.1, every=1009),
            997,
            [Plan(FRESH, True), *_REUSED],
        ),
        (
            FisherPenalty(0.1, every=1009, reuse=False),
            None,
            [Plan(FRESH, True), *_PLAIN],
        ),
        (
            GradientPenalty(0.1, every=10**6, reuse=False),
            None,
            [Plan(FRESH, False), *_PLAIN],
        ),
        (
            GradientPenalty(0.1, every=1009, start=3, stop=9),
            997,
            [Plan(FRESH, False), Plan(FRESH, True), *_REUSED, *_BOTH],
        ),
    ],
)
def test_of_long_periods_no_impossible_plan_is_compiled(
    penalty, trace_every, plans
):
    found = Schedule(penalty, trace_every).plans
    assert len(found) == len(plans)
    assert set(found) == set(plans)


@pytest.mark.few(1)
@pytest.mark.parametrize("penalty", [None, FisherPenalty(0.1)])
def test_once_is_a_period_too(penalty):
    model = FisherModel(training.network(), penalty, trace_every=10**6)
    history = training.fit(training.compiled(model), epochs=1).history
    assert np.isfinite(history["fisher_trace"]).all()


@pytest.mark.parametrize("every", [1, 3, 10**12])
@pytest.mark.parametrize("start, stop", [(0, None), (4, 6), (10**12, None)])
def test_the_next_fresh_step_is_the_first_that_is(every, start, stop):
    penalty = FisherPenalty(every=every, start=start, stop=stop)
    schedule = Schedule(penalty, None)
    for step in range(8):
        fresh = [s for s in range(step, 20) if penalty.is_fresh(s)]
        found = schedule.next_fresh(step)
        if fresh or stop:
            assert found == (fresh[0] if fresh else None)
        else:
            assert found > 20 and penalty.is_fresh(found)
