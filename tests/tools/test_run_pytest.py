"""Tests of the program that Bazel runs for each file of tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import pytest

_PROGRAM = pathlib.Path(__file__).parents[2] / "tools/bazel/run_pytest.py"
_TESTS = """
def test_right():
    pass

def test_wrong():
    assert False
"""


def _run(directory, text, **environment):
    file = directory / "test_file.py"
    file.write_text(text, "utf-8")
    return subprocess.run(
        [sys.executable, str(_PROGRAM), str(file)],
        env={**os.environ, **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_fails_where_a_test_fails(tmp_path):
    done = _run(tmp_path, _TESTS)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout


def test_it_fails_where_tests_cannot_be_collected(tmp_path):
    assert _run(tmp_path, "import no_such_module").returncode == 2


@pytest.mark.parametrize("name, status", [("right", 0), ("wrong", 1)])
def test_bazel_picks_tests(tmp_path, name, status):
    done = _run(tmp_path, _TESTS, TESTBRIDGE_TEST_ONLY=name)
    assert done.returncode == status and "1 deselected" in done.stdout


def test_bazel_gets_its_report(tmp_path):
    report = tmp_path / "report.xml"
    _run(tmp_path, _TESTS, XML_OUTPUT_FILE=str(report))
    cases = ElementTree.parse(report).iter("testcase")
    failed = {case.get("name"): case.find("failure") for case in cases}
    assert failed["test_right"] is None
    assert "assert False" in failed["test_wrong"].text


def test_a_file_without_tests_of_the_kind_asked_for_is_well(tmp_path):
    done = _run(tmp_path, "def helper(): pass")
    assert done.returncode == 0 and "no tests ran" in done.stdout


def test_a_pick_that_finds_nothing_is_a_mistake(tmp_path):
    assert _run(tmp_path, _TESTS, TESTBRIDGE_TEST_ONLY="wrnog").returncode == 5
