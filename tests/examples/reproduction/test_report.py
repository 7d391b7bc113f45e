"""Tables of the experiments."""

from __future__ import annotations

import math

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


def test_too_few_pairs_have_no_correlation():
    x, y = pd.Series([1.0, 2.0, math.nan]), pd.Series([1.0, 3.0, 2.0])
    assert report.rank_correlation(x, y) is None
    assert report.correlation(x, y, "ρ")["ρ"] == ""
    figure, (axes, _) = report.axes(2)
    report.title_with_correlation(axes, x, y)
    assert axes.get_title() == ""
    report.title_with_correlation(axes, y, y)
    assert axes.get_title() == "Spearman's ρ = 1.00"
    report.plt.close(figure)


def test_means_of_some_of_the_runs_say_of_how_many():
    assert report.number(pd.Series([1.0, math.nan, 3.0])) == "2 ± 1 (2 of 3)"
    assert report.number(pd.Series([1.0, math.nan])) == "1 (1 of 2)"
    assert report.number(pd.Series([1.0, 3.0])) == "2 ± 1"
    assert report.number(pd.Series([math.nan])) == ""
