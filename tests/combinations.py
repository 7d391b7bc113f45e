"""Which combinations of parameters are tried each time.

A test of thirty layers, three modes and two dtypes has 180 cases. `make test`
tries each layer, each mode and each dtype, combined in turns; `make test-all`
tries every combination. Rows of one `parametrize` are not left out, only
where several of them are multiplied is there a choice, unless a test whose
cases take long says that `few` of them do.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Sequence

import pytest

# What a case has of each axis: the axis, and its value there.
Values = tuple[tuple[Hashable, Hashable], ...]


def in_turns(cases: Iterable[Values]) -> set[Values]:
    """Few cases that have every value of every axis.

    One of each value, in order, with those of other axes that had the fewest
    turns before.

    Args:
        cases: Each with a value of each axis.

    Returns:
        Those to try.
    """
    cases = list(cases)
    axes = collections.defaultdict(dict)
    for case in cases:
        for axis, value in case:
            axes[axis].setdefault((axis, value), []).append(case)
    turns = collections.Counter()
    chosen = set()
    for values in axes.values():
        for value, having in values.items():
            if not turns[value]:
                case = min(having, key=lambda c: sum(turns[v] for v in c))
                turns.update(case)
                chosen.add(case)
    return chosen


def spread(cases: Sequence, number: int) -> list:
    """Some of the cases, from the first on, as far from each other as can be.

    Args:
        cases: All of them, in order.
        number: How many to take, at least 1.

    Returns:
        Those; all if there are no more.
    """
    number = min(number, len(cases))
    return [cases[i * len(cases) // number] for i in range(number)]


def mark_the_others(items: Iterable[pytest.Item]) -> None:
    """Leaves the combinations that have no turn to `make test-all`.

    Those that `impossible(reason, argument=value, ...)` tells of are skipped,
    and take nobody's turn: with `argument=[...]`, any of these values. Of what
    has a turn, a test that is marked `few(number)` tries that many.
    """
    tests = collections.defaultdict(dict)
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        if reasons := _reasons_against(item):
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))
        elif not item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            tests[name].setdefault(_values(item), []).append(item)
    for cases in tests.values():
        chosen = in_turns(cases)
        first = next(iter(cases.values()))[0]
        if few := first.get_closest_marker("few"):
            turns = [case for case in cases if case in chosen]
            chosen = set(spread(turns, *few.args))
        for case in cases.keys() - chosen:
            for item in cases[case]:
                item.add_marker(pytest.mark.slow)


def _reasons_against(item: pytest.Item) -> list[str]:
    arguments = item.callspec.params
    return [
        reason
        for mark in item.iter_markers("impossible")
        for (reason,) in [mark.args]
        if all(
            arguments[name] in values
            if isinstance(values, list)
            else arguments[name] == values
            for name, values in mark.kwargs.items()
        )
    ]


def _values(item: pytest.Item) -> Values:
    # A table, whose rows give several arguments, is one axis.
    arguments = dict(item.callspec.params)
    values = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        row = tuple(_key(arguments.pop(n)) for n in names if n in arguments)
        values.append((tuple(names), row))
    values += [(name, (_key(value),)) for name, value in arguments.items()]
    return tuple(values)


def _key(value: object) -> Hashable:
    # What is made for the test has no equals; 1 and True are two values.
    if isinstance(value, str | int | float | None):
        return type(value), value
    return id(value)
