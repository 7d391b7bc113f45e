"""The image of Tr(F) by layer and step: what it holds, and how often."""

from __future__ import annotations

import time

import numpy as np

from keras_fisher.callbacks.heat_map import HeatMap


def test_what_is_added_is_collected():
    heat_map = HeatMap()
    heat_map.add(0, {"a": 1.0, "b": 2.0})
    heat_map.add(4, {"b": 3.0})
    steps, traces, layers = heat_map.collected()
    assert steps.tolist() == [0, 4] and layers == ["a", "b"]
    np.testing.assert_array_equal(traces, [[1.0, 2.0], [np.nan, 3.0]])


def test_long_runs_are_kept_as_means_of_neighbors():
    heat_map = HeatMap()
    for step in range(5000):
        heat_map.add(step, {"a": float(step), "b": 1.0})
    steps, traces, _ = heat_map.collected()
    assert 512 <= len(steps) < 1024
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(traces[:, 1], 1.0)
    # Each row is the mean of the steps up to the next.
    whole = np.diff(steps) == steps[1] - steps[0]
    width = steps[1] - steps[0]
    np.testing.assert_allclose(
        traces[:-1, 0][whole], steps[:-1][whole] + (width - 1) / 2
    )


def test_a_layer_frozen_for_half_of_a_mean_keeps_its_value():
    heat_map = HeatMap()
    for step in range(1024):
        heat_map.add(step, {"a": 2.0} if step % 2 else {"a": 2.0, "b": 5.0})
    _, traces, layers = heat_map.collected()
    assert len(traces) == 512
    np.testing.assert_array_equal(traces[:, layers.index("b")], 5.0)


def test_it_is_drawn_when_there_is_something_new_and_time_has_passed(
    monkeypatch,
):
    heat_map = HeatMap()
    assert not heat_map.is_due(at_last=False)
    assert not heat_map.is_due(at_last=True)
    heat_map.add(0, {"a": 1.0})
    assert heat_map.is_due(at_last=False)
    begin = time.monotonic()
    pixels = heat_map.draw()
    took = time.monotonic() - begin
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert not heat_map.is_due(at_last=True)  # nothing new
    heat_map.add(2, {"a": 3.0})
    assert heat_map.is_due(at_last=True)
    assert not heat_map.is_due(at_last=False)  # too early
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100 * took + 1)
    assert heat_map.is_due(at_last=False)
    assert (heat_map.draw() != pixels).any()
