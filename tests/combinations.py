"""Which combinations of parameters are tried each time.

A test of thirty layers, three modes and two dtypes has 180 cases. `make test`
tries each layer, each mode and each dtype, combined in turns; `make test-all`
tries every combination. Rows of one `parametrize` are never left out: only
where several of them are multiplied is there a choice.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable
from collections.abc import Iterable

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


def mark_the_others(items: Iterable[pytest.Item]) -> None:
    """Leaves the combinations that have no turn to `make test-all`.

    Those that `impossible(reason, argument=value, ...)` tells of are skipped,
    and take nobody's turn: with `argument=[...]`, any of these values.
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
        for case in cases.keys() - in_turns(cases):
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
