"""docs/guarantees.md: every test that it names exists."""

from __future__ import annotations

import pathlib
import re

import pytest

_TESTS = pathlib.Path(__file__).parent
_FILES = {path.name: path for path in _TESTS.rglob("test_*.py")}
_PAGE = _TESTS.parent / "docs" / "guarantees.md"
_NAMED = sorted(
    set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", _PAGE.read_text("utf-8")))
)


@pytest.mark.parametrize("file", sorted({file for file, _ in _NAMED}))
def test_the_tests_that_prove_it_exist(file):
    text = _FILES[file].read_text("utf-8")
    missing = [
        name
        for named, name in _NAMED
        if named == file and f"def {name}(" not in text
    ]
    assert not missing, missing


def test_each_promise_names_a_test():
    rows = [
        line
        for line in _PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ") and "| test |" not in line
    ]
    assert rows
    for row in rows:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), row
