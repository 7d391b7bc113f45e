"""Tables of the experiments."""

from __future__ import annotations

import math

import bounded_penalty
import pandas as pd
import report


def test_what_no_run_has_is_left_empty():
    nothing = pd.Series([math.nan, math.nan])
    assert report.percent(nothing) == report.number(nothing) == ""


def test_tables_have_means_with_standard_errors():
    frame = pd.DataFrame(
        {"kind": ["b", "b", "a"], "accuracy": [0.5, 0.7, 0.25]}
    )
    rows = report.table(
        frame,
        ["kind"],
        {
            "percent": ("accuracy", report.percent),
            "number": ("accuracy", report.number),
        },
    )
    assert rows.to_numpy().tolist() == [
        ["b", "60.0 ± 10.0", "0.6 ± 0.1"],
        ["a", "25.0", "0.25"],
    ]


def test_the_worst_bounded_run_may_be_the_better_one():
    shared = {"label_noise": 0.4, "learning_rate": 0.1}
    frame = pd.DataFrame(
        {**shared, "method": method, "strength": strength, "test_accuracy": a}
        for method, strength, a in (
            ("none", 0.0, 0.5),
            ("FP", 0.3, 0.6),
            ("FP", 1.0, 0.65),
            ("bounded FP", 1.0, 0.78),
            ("bounded FP", 10.0, 0.83),
        )
    )
    (row,) = bounded_penalty.settings_table(frame).to_dict("records")
    assert row["best FP"] == "65.0 (α = 1)"
    assert row["worst bounded - best FP (points)"] == "+13.0"
