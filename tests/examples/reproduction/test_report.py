"""Tables of the experiments."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
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


def _row(x, y):
    return [*report.correlation(pd.Series(x), pd.Series(y)).values()]


def test_few_pairs_have_an_exact_p_and_no_interval():
    nan = math.nan
    assert _row(range(3), [3, 2, 1]) == ["-1.00", "", "0.33", "3"]
    # Two of the 24 permutations are as extreme.
    ordered = _row([1.0, nan, 2.0, 3.0, 9.0], [4, 9, 3, 2, 1])
    assert ordered == ["-1.00", "", "0.083", "4"]
    assert _row(range(4), [5, 5, 5, 5]) == ["nan", "", "", "4"]
    assert _row(range(8), range(8)) == ["1.00", "[1.00, 1.00]", "", "8"]


def test_the_exact_p_is_that_of_all_permutations():
    x, y = pd.Series([1, 2, 3, 4, 4, 6, 7]), pd.Series([2, 1, 3, 3, 9, 5, 6])
    ours = report.rank_correlation(x, y).correlation
    all_of_them = [
        report.rank_correlation(x, pd.Series(permuted)).correlation
        for permuted in itertools.permutations(y)
    ]
    above = sum(found > ours - 1e-9 for found in all_of_them)
    [told, _, p, _] = _row(x, y)
    assert told == f"{ours:.2f}"
    assert float(p) == pytest.approx(2 * above / math.factorial(7), rel=0.05)


def test_means_of_some_of_the_runs_say_of_how_many():
    assert report.number(pd.Series([1.0, math.nan, 3.0])) == "2 ± 1 (2 of 3)"
    assert report.number(pd.Series([1.0, math.nan])) == "1 (1 of 2)"
    assert report.number(pd.Series([1.0, 3.0])) == "2 ± 1"
    assert report.number(pd.Series([math.nan])) == ""
