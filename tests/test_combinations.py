"""Every value of every parameter has its turn, and few combinations do."""

from __future__ import annotations

import itertools
import textwrap

import combinations
import pytest

pytest_plugins = ["pytester"]


_TESTS = """
import pytest

SLOW = pytest.mark.slow

@pytest.mark.parametrize("b", [0, 1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("a", [True, 1, 1.0, None])
def test_product(a, b): pass

@pytest.mark.parametrize("a, b", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_table(a, b): pass

@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("same", [[], []])
def test_equal_objects(same, b): pass

@pytest.mark.impossible("small", a=[1, 2], b=0)
@pytest.mark.impossible("three", a=3, b=1)
@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("a", [1, 2, 3, 4])
def test_impossible(a, b): assert b == 1 or a > 2

@pytest.mark.few(2)
@pytest.mark.parametrize("a", [0, 1, 2, 3, pytest.param(4, marks=SLOW)])
def test_few(a): pass

@pytest.mark.few(1)
@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("a", [0, 1])
def test_one(a, b): pass

def test_alone(): pass
"""


def _cases(*sizes):
    ranges = ([(axis, v) for v in range(n)] for axis, n in enumerate(sizes))
    return list(itertools.product(*ranges))


@pytest.mark.parametrize("sizes", [(7,), (1, 1), (2, 5), (6, 3, 2), (3, 3)])
def test_all_values_are_tried_and_no_more_than_that(sizes):
    chosen = combinations.in_turns(_cases(*sizes))
    assert len(chosen) == max(sizes)
    for axis, size in enumerate(sizes):
        assert {case[axis][1] for case in chosen} == set(range(size))


def test_the_others_take_turns():
    chosen = combinations.in_turns(_cases(12, 3, 2))
    for axis, size in ((1, 3), (2, 2)):
        found = [case[axis][1] for case in chosen]
        assert [found.count(v) for v in range(size)] == [12 // size] * size


def test_what_is_left_of_a_product_is_covered():
    cases = [c for c in _cases(4, 4) if c[0][1] >= c[1][1]]
    chosen = combinations.in_turns(cases)
    assert chosen <= set(cases)
    for axis in (0, 1):
        assert {case[axis][1] for case in chosen} == set(range(4))


@pytest.mark.parametrize(
    "number, expected",
    [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, None)],
)
def test_few_are_far_from_each_other(number, expected):
    cases = [0, 1, 2, 3, 4]
    assert combinations.spread(cases, number) == (expected or cases)


def test_products_are_thinned_out_and_tables_are_not(pytester):
    pytester.makeconftest(
        textwrap.dedent("""
            import combinations
            import pytest

            @pytest.hookimpl(tryfirst=True)
            def pytest_collection_modifyitems(items):
                combinations.mark_the_others(items)
        """)
    )
    pytester.makepyprojecttoml(
        '[tool.pytest.ini_options]\nmarkers = ["slow", "impossible", "few"]'
    )
    pytester.makepyfile(_TESTS)
    run = pytester.inline_run("-m", "not slow")
    names = [
        report.nodeid.split("::")[1]
        for report in run.getreports("pytest_runtest_logreport")
        if report.when == "call"
    ]
    counts = {
        n: sum(each.startswith(n) for each in names)
        for n in (
            "test_product",
            "test_table",
            "test_equal_objects",
            "test_impossible",
            "test_few",
            "test_one",
            "test_alone",
        )
    }
    assert list(counts.values()) == [4, 4, 2, 4, 2, 1, 1]
    products = {name for name in names if name.startswith("test_product")}
    assert products == {
        f"test_product[{each}]" for each in ("True-0", "1-1", "1.0-0", "None-1")
    }
    few = {name for name in names if name.startswith(("test_few", "test_one"))}
    assert few == {"test_few[0]", "test_few[2]", "test_one[0-0]"}
    skipped = run.getreports("pytest_runtest_logreport")
    reasons = [str(report.longrepr) for report in skipped if report.skipped]
    assert [reason.count("small") for reason in reasons] == [1, 1, 0]
    assert "three" in reasons[2]
    everything = pytester.inline_run("-m", "slow or not slow")
    everything.assertoutcome(passed=12 + 4 + 4 + 5 + 5 + 4 + 1, skipped=3)
