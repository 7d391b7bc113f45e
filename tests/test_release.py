"""What is published beside the code says the same as the code."""

from __future__ import annotations

import configparser
import pathlib
import re

import keras_fisher

_ROOT = pathlib.Path(__file__).parents[1]


def _minors(text: str) -> set[str]:
    """Versions of Python like `3.10` that stand in quotes."""
    return set(re.findall(r'"(3\.\d+)"', text))


def test_the_changelog_begins_with_the_version():
    text = (_ROOT / "CHANGELOG.md").read_text("utf-8")
    heading = re.search(r"^## (\S+) \((.+)\)$", text, re.MULTILINE)
    assert heading[1] == keras_fisher.__version__
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", heading[2])


def test_workflows_run_the_declared_pythons_and_targets_that_exist():
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    declared = re.findall(
        r"Python :: (3\.\d+)", setup["metadata"]["classifiers"]
    )
    workflow = (_ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    assert _minors(workflow) == set(declared)
    makefile = (_ROOT / "Makefile").read_text("utf-8")
    named = re.findall(r"(?:run: make|target:) ([\w-]+)", workflow)
    targets = makefile.partition(".PHONY:")[2].partition("\n\n")[0].split()
    assert named and set(named) <= set(targets)


def test_hooks_run_the_ruff_that_make_lint_runs():
    hooks = (_ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    entries = re.findall(r"entry: (\S+) (\w+)", hooks)
    makefile = (_ROOT / "Makefile").read_text("utf-8")
    linted = re.findall(r"\$\(BIN\)/ruff (\w+)", makefile)
    assert {command for _, command in entries} == set(linted)
    assert {program for program, _ in entries} == {".venv/bin/ruff"}
