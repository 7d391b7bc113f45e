"""The strength of a method is chosen on held-out data."""

from __future__ import annotations

import experiment
import experiments
import pytest
import tuning


def test_the_strength_that_validates_best_is_chosen(monkeypatch):
    validation = {
        ("FP", 0.1): 0.5,
        ("FP", 1.0): 0.7,
        ("GP", 0.2): 0.1,
        ("GP", 0.3): 0.0,
    }
    seen = []

    def train(run, path):
        seen.append(run)
        return experiments.result(validation[run.method, run.strength])

    experiments.train_by(monkeypatch, train)
    plain = [
        experiment.from_flags(learning_rate=rate, fraction=0.5)
        for rate in (0.1, 0.2)
    ]
    runs, tried = tuning.chosen(
        plain, {"FP": (0.1, 1.0), "GP": (0.2, 0.3)}, "choosing"
    )
    assert {(run.holdout, run.fraction) for run in seen} == {(0.2, 0.5)}
    assert [
        (run.learning_rate, run.method, run.strength, run.holdout, run.fraction)
        for run in runs
    ] == [
        (rate, method, strength, 0, 0.5)
        for rate in (0.1, 0.2)
        for method, strength in (("FP", 1.0), ("GP", 0.2))
    ]
    texts = tuning.tried_table(tried)["strength: validation accuracy (%)"]
    assert (
        texts.tolist()
        == [
            "0.1: 50.0, 1: 70.0",
            "0.2: 10.0, 0.3: 0.0",
        ]
        * 2
    )


def test_nothing_is_trained_to_choose_from_one(monkeypatch):
    def train(run, path):
        pytest.fail(f"trained {run}")

    experiments.train_by(monkeypatch, train)
    plain = experiment.from_flags(learning_rate=0.1)
    (run,), tried = tuning.chosen([plain], {"FP": (0.3,)}, "choosing")
    assert (run.method, run.strength, run.holdout) == ("FP", 0.3, 0)
    assert tried.empty
    assert tuning.best_learning_rate([0.1]) == 0.1


def test_the_learning_rate_that_validates_best_is_chosen(monkeypatch):
    validation = {0.1: 0.5, 0.2: 0.9, 0.4: 0.7}
    seen = []

    def train(run, path):
        seen.append((run.method, run.holdout))
        return experiments.result(validation[run.learning_rate])

    experiments.train_by(monkeypatch, train)
    assert tuning.best_learning_rate([*validation]) == 0.2
    assert set(seen) == {("none", 0.2)}
