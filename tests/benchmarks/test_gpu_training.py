"""Training on a card knows how much time it takes."""

from __future__ import annotations

import types

import numpy as np
import pytest

_STEP, _EVALUATION = 2.0, 3.0
_SIDE, _RUN = "FP 1", (0.1, "FP 1", 0.0)


class _Card:
    """A device with a queue, and the clock that waiting for it moves."""

    def __init__(self):
        self.now = self.queued = 0.0

    def wait(self, values):
        self.now += self.queued
        self.queued = 0.0
        return values


class _Program:
    """A step that is put into the queue."""

    def __init__(self, card, seconds, outputs):
        self._card, self._seconds, self._outputs = card, seconds, outputs
        arguments = [{"name": n, "shape": [128]} for n in ("x", "y")]
        self.described = {"arguments": arguments}

    def call(self, values):
        self._card.queued += self._seconds
        return self._outputs


@pytest.fixture
def card(gpu_script, monkeypatch):
    """A card, with the script and a trainer that uses it."""
    card = _Card()
    jax = types.ModuleType("jax")
    jax.jit = lambda function: function
    jax.device_put = lambda value: value
    # What was asked for comes at once: as if it were long since computed.
    jax.device_get = lambda values: values
    jax.block_until_ready = card.wait
    runtime = types.ModuleType("runtime")
    script = gpu_script("train", {"jax": jax, "runtime": runtime})
    monkeypatch.setattr(script.arrays, "made", lambda a: np.zeros(a["shape"]))
    clock = types.SimpleNamespace(
        perf_counter=lambda: card.now, time=lambda: card.now
    )
    monkeypatch.setattr(script, "time", clock)
    images, labels = np.zeros([1280, 1]), np.zeros(1280, "int32")
    card.data = types.SimpleNamespace(
        images=images, labels=labels, noisy=lambda rate: labels
    )
    step = _Program(card, _STEP, {"fisher_trace": 1.0})
    card.trainer = script.Trainer({(_SIDE, "fresh"): step}, card.data)

    def accuracies(values, labels):
        card.now += _EVALUATION
        return {"test": 0.5}

    monkeypatch.setattr(card.trainer, "accuracies", accuracies)
    card.script = script
    return card


def _rows(card, epochs: int, until: float) -> list[dict]:
    rows = []
    card.script.train(card.trainer, _RUN, epochs, card.data, rows.append, until)
    return rows


def test_costs_are_those_of_all_steps_and_of_evaluations(card):
    epoch, evaluation = card.script.costs(card.trainer, [_RUN] * 3, card.data)
    assert epoch == pytest.approx(3 * 10 * _STEP)
    assert evaluation == pytest.approx(3 * _EVALUATION)


def test_seconds_of_an_epoch_are_those_of_all_its_steps(card):
    seconds = [row["seconds"] for row in _rows(card, 2, 1e9)]
    assert seconds == [10 * _STEP] * 2


@pytest.mark.parametrize(
    "seconds, evaluation, expected",
    [
        pytest.param(100.0, 0.0, 10, id="no evaluation"),
        # After 1, 2, 4, 6.
        pytest.param(100.0, 10.0, 6, id="evaluations"),
        pytest.param(1.0, 0.0, 1, id="too little"),
        pytest.param(1e9, 10.0, 30, id="more than enough"),
    ],
)
def test_as_many_epochs_as_fit(card, seconds, evaluation, expected):
    found = card.script.epochs_within(seconds, 30, 10.0, evaluation)
    assert found == expected


def test_a_run_ends_evaluated_when_time_is_over(card):
    rows = _rows(card, 30, until=3 * 10 * _STEP)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert "test" in rows[-1], rows
