"""TrF_i, the peak and the explosion, on measurements made up for the test."""

from __future__ import annotations

import math
import warnings

import keras
import numpy as np
import pytest

from keras_fisher import FisherModel
from keras_fisher._training.measurements import Measurements
from keras_fisher.callbacks import EarlyPhase


class _Model:
    """What `EarlyPhase` sees of a `FisherModel`."""

    def __init__(self, step=0):
        self.optimizer = keras.optimizers.SGD()
        self.at(step)

    def at(self, step, *measured):
        self.optimizer.iterations.assign(step)
        self.measurements = Measurements(
            np.array([s for s, _ in measured], np.int64),
            np.array([[t / 4, 3 * t / 4] for _, t in measured]).reshape(-1, 2),
            np.full([len(measured)], np.nan),
            np.full([len(measured)], 8),
            np.full([len(measured)], np.nan),
            np.full([len(measured)], np.nan),
        )


def _run(early, steps, *, start=0, monitor="loss"):
    """Feeds one epoch of calls, each `(logs value, [(step, trace), ...])`."""
    model = _Model(start)
    early.set_model(model)
    early.on_epoch_begin(0)
    for value, measured in steps:
        model.at(start, *measured)
        early.on_train_batch_end(0, {monitor: value})
    model.at(measured[-1][0] + 1 if measured else start)
    logs = {monitor: value}
    early.on_epoch_end(0, logs)
    return logs


_CALLS = [
    (2.0, [(0, 5.0)]),
    (1.5, []),
    (1.2, [(2, 20.0), (3, 60.0)]),
    (0.9, []),
    (0.8, [(5, 40.0)]),
    (0.7, [(6, 30.0)]),
]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_the_loss_of_a_step_that_overflowed_is_passed_over(lost):
    early = EarlyPhase()
    _run(early, [(lost, [(0, 7.0)]), *_CALLS[2:3], (lost, [(4, 9.0)])])
    assert (early.crossing, early.early_step) == (0.6, None)
    _run(early, [(0.5, [(6, 30.0)])], start=5)
    assert (early.early_step, early.early_trace) == (6, 30.0)


@pytest.mark.parametrize(
    "threshold, step, trace",
    [
        (2.5, 0, 5.0),
        (1.5, 3, 60.0),  # crossed at a step that was not measured
        (1.2, 3, 60.0),
        (0.8, 5, 40.0),
        (0.75, 6, 30.0),
        (0.1, None, math.nan),
    ],
)
def test_the_early_trace_is_the_last_measured_at_the_crossing(
    threshold, step, trace
):
    early = EarlyPhase("loss", threshold)
    logs = _run(early, _CALLS)
    assert early.early_step == step
    np.testing.assert_equal(early.early_trace, trace)
    assert early.crossing == threshold
    np.testing.assert_equal(
        logs,
        {
            "loss": 0.7,
            "fisher_early_trace": trace,
            "fisher_peak_trace": 60.0,
            "fisher_explosion": 12.0,
        },
    )


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_trace_that_overflowed_is_passed_over(lost):
    early = EarlyPhase()
    _run(early, [(2.0, [(0, lost)]), (1.9, [(1, 2.0)]), (1.8, [(2, lost)])])
    assert early.steps == [1] and early.peak_trace == 2.0
    assert early.explosion == 1.0


def test_peak_and_explosion():
    early = EarlyPhase()
    assert math.isnan(early.peak_trace) and math.isnan(early.explosion)
    assert early.peak_step is None
    _run(early, _CALLS)
    assert early.steps == [0, 2, 3, 5, 6]
    assert early.traces == [5.0, 20.0, 60.0, 40.0, 30.0]
    assert early.peaks == [5.0, 20.0, 60.0, 60.0, 60.0]
    assert (early.peak_trace, early.peak_step) == (60.0, 3)
    assert [early.explosion_at(s) for s in early.steps] == [1, 4, 12, 12, 12]


@pytest.mark.parametrize(
    "monitor, mode, threshold, step",
    [
        ("loss", "auto", None, 5),  # half of 2.0
        ("accuracy", "auto", 0.5, 2),
        ("accuracy", "auto", None, 2),
        ("auc", "max", 0.7, 3),
        ("auc", "min", 0.25, 0),
    ],
)
def test_monitors_fall_or_rise(monitor, mode, threshold, step):
    values = {
        "loss": [2.0, 1.9, 1.4, 1.2, 1.1, 1.0],
        "accuracy": [0.2, 0.4, 0.5, 0.6, 0.7, 0.8],
        "auc": [0.2, 0.4, 0.5, 0.7, 0.8, 0.9],
    }[monitor]
    early = EarlyPhase(monitor, threshold, mode=mode)
    _run(
        early, [(v, [(s, 1.0)]) for s, v in enumerate(values)], monitor=monitor
    )
    assert early.early_step == step


def test_measurements_that_have_no_trace_are_not_counted():
    early = EarlyPhase("loss", 1.0)
    _run(early, [(2.0, [(0, math.nan)]), (0.5, [(1, 3.0)])])
    assert early.steps == [1] and early.early_step == 1


def test_a_first_trace_of_zero_explodes_at_once():
    early = EarlyPhase(warn_above=None)
    _run(early, [(2.0, [(0, 0.0)]), (2.0, [(1, 3.0)])])
    assert early.explosion == math.inf


def test_asked_twice_it_counts_once():
    once, twice = EarlyPhase("loss", 0.8), EarlyPhase("loss", 0.8)
    _run(once, _CALLS)
    _run(twice, [call for call in _CALLS for _ in range(2)])
    for name in ("steps", "traces", "peaks", "early_step", "early_trace"):
        assert getattr(once, name) == getattr(twice, name), name


def test_one_line_warns_of_an_explosion():
    early = EarlyPhase(warn_above=10)
    with pytest.warns(UserWarning, match=r"step 3, 12 times") as found:
        _run(early, _CALLS)
    assert len(found) == 1
    assert "\n" not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(EarlyPhase(warn_above=12), _CALLS)
        _run(EarlyPhase(warn_above=None), _CALLS)


def test_an_entry_that_the_logs_lack_is_named():
    early = EarlyPhase("accuracy")
    with pytest.warns(UserWarning, match=r"`accuracy`.*loss"):
        _run(early, _CALLS)
    assert early.early_step is None and early.peak_trace == 60.0


def test_entries_of_validation_are_seen_at_the_end_of_an_epoch():
    early = EarlyPhase("val_loss", 1.0)
    model = _Model()
    early.set_model(model)
    early.on_epoch_begin(0)
    model.at(0, (0, 5.0))
    early.on_train_batch_end(0, {"loss": 2.0})
    assert early.early_step is None
    early.on_epoch_end(0, {"loss": 2.0, "val_loss": 0.9})
    assert (early.early_step, early.early_trace) == (0, 5.0)


# More than one fit.


def test_a_second_fit_goes_on():
    early = EarlyPhase("loss", 0.1)
    _run(early, _CALLS)
    _run(early, [(0.05, [(8, 70.0)])], start=7)
    assert early.steps[-1] == 8 and early.peak_trace == 70.0
    assert early.early_step == 8


def test_a_run_from_the_start_begins_anew():
    early = EarlyPhase("loss", 1.2, warn_above=None)
    _run(early, _CALLS)
    _run(early, [(2.0, [(0, 1.0)]), (1.0, [(2, 7.0)])])
    assert early.traces == [1.0, 7.0] and early.explosion == 7
    assert (early.early_step, early.early_trace) == (2, 7.0)


def test_nothing_of_the_run_before_is_kept():
    """Not what crossed at its first step, nor half of its first loss."""
    early, half = EarlyPhase("loss", 2.5), EarlyPhase()
    for trace, loss in (5.0, 2.0), (3.0, 8.0):
        _run(early, [(2.0, [(0, trace)])])
        assert (early.early_step, early.early_trace) == (0, trace)
        _run(half, [(loss, [(0, trace)])])
        assert half.crossing == loss / 2


def test_steps_that_are_done_again_are_measured_again():
    early = EarlyPhase("loss", 0.8)
    _run(early, _CALLS)
    assert early.early_step == 5
    _run(early, [(1.1, [(3, 10.0)]), (0.6, [(5, 9.0)])], start=3)
    assert early.steps == [0, 2, 3, 5]
    assert early.traces == [5.0, 20.0, 10.0, 9.0]
    assert early.peak_trace == 20.0
    assert (early.early_step, early.early_trace) == (5, 9.0)


def test_a_crossing_before_what_is_done_again_stays():
    early = EarlyPhase("loss", 1.3)
    _run(early, _CALLS)
    assert (early.early_step, early.early_trace) == (3, 60.0)
    _run(early, [(0.9, [(5, 10.0)]), (0.6, [(6, 9.0)])], start=5)
    assert (early.early_step, early.early_trace) == (3, 60.0)
    assert early.steps == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("threshold", [1.0, None])
def test_a_run_seen_from_its_middle_may_have_crossed_before(threshold):
    early = EarlyPhase("loss", threshold)
    _run(early, [(0.9, [(40, 8.0)]), (0.2, [(42, 7.0)])], start=40)
    assert early.early_step is None


def test_a_run_seen_from_before_the_crossing_has_an_early_trace():
    early = EarlyPhase("loss", 1.0)
    _run(early, [(1.3, [(40, 8.0)]), (0.9, [(42, 7.0)])], start=40)
    assert early.early_step == 42


def test_restored_it_is_what_it_was():
    early = EarlyPhase("loss")
    early.restore([0, 4], [2.0, 6.0], threshold=0.5, early=(4, 6.0))
    assert early.explosion == 3 and early.crossing == 0.5
    assert (early.early_step, early.early_trace) == (4, 6.0)
    early.restore([0, 4], [2.0, 6.0], threshold=0.5)
    _run(early, [(0.6, [(8, 9.0)]), (0.4, [(10, 8.0)])], start=7)
    assert early.early_step == 10 and early.explosion == 4.5


def test_what_is_restored_does_not_warn_again():
    exploded, calm = EarlyPhase(warn_above=2), EarlyPhase(warn_above=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exploded.restore([0, 4], [2.0, 6.0])
        _run(exploded, [(0.6, [(8, 3.0)]), (0.5, [(10, 9.0)])], start=7)
        calm.restore([0, 4], [2.0, 3.0])
    assert exploded.explosion == 4.5
    with pytest.warns(UserWarning, match="step 10, 4.5 times") as found:
        _run(calm, [(0.6, [(8, 3.0)]), (0.5, [(10, 9.0)])], start=7)
    assert len(found) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "up"}, "mode"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": "low"}, "threshold"),
        ({"warn_above": 0.5}, "warn_above"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyPhase(**arguments)


def test_in_a_fit_the_logs_have_it(tmp_path):
    network = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model = FisherModel(network, trace_every=1, seed=0)
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=3,
    )
    x = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
    early = EarlyPhase("loss", threshold=100.0)
    later = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = model.fit(
        x, np.arange(40) % 3, 8, 2, verbose=0, callbacks=[early, later]
    ).history
    assert history["fisher_peak_trace"][-1] == max(early.traces)
    assert history["fisher_early_trace"] == 2 * [early.traces[2]]
    assert early.early_step == 2  # the last of the first call
    assert early.steps == list(range(10))
    assert "fisher_explosion" in (tmp_path / "log.csv").read_text()


def test_traces_of_zero_are_no_explosion(recwarn):
    """As those of a model of one class are."""
    early = EarlyPhase()
    _run(early, [(2.0, [(0, 0.0)]), (1.9, [(1, 0.0)])])
    assert early.explosion == 1.0
    assert not recwarn


@pytest.mark.parametrize("first", [0.0, -3.0])
def test_half_of_no_positive_loss_is_no_threshold(first):
    early = EarlyPhase()
    with pytest.warns(UserWarning, match=r"that was .*Give .* `threshold`"):
        _run(early, [(first, [(0, 5.0)]), (first - 4, [(1, 6.0)])])
    assert early.early_step is None and early.traces == [5.0, 6.0]
    given = EarlyPhase("loss", first - 2)
    _run(given, [(first, [(0, 5.0)]), (first - 4, [(1, 6.0)])])
    assert given.early_step == 1
