"""Docstrings of public names describe the arguments that there are."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

import keras_fisher

_API = pathlib.Path(__file__).parents[2] / "docs" / "api"
_NAMES = [
    name
    for path in sorted(_API.glob("*.md"))
    for name in re.findall(
        r"^::: keras_fisher\.(\S+)$", path.read_text("utf-8"), re.MULTILINE
    )
]
_SECTION = re.compile(r"^Args:\n((?:    .*\n|\n)*)", re.MULTILINE)
_MARKS = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def _described(name: str) -> tuple[list[str] | None, list[str]]:
    """Arguments of the section `Args`, if any, and of the signature."""
    value = keras_fisher
    for part in name.split("."):
        value = getattr(value, part)
    section = _SECTION.search(inspect.getdoc(value) + "\n")
    parameters = inspect.signature(value).parameters.values()
    taken = [_MARKS.get(p.kind, "") + p.name for p in parameters]
    if section is None:
        return None, taken
    heads = re.findall(r"^    (?! )([^:]+):", section[1], re.MULTILINE)
    return [n.strip() for head in heads for n in head.split(",")], taken


@pytest.mark.parametrize("name", _NAMES)
def test_the_arguments_are_those_of_the_signature(name):
    described, taken = _described(name)
    if described is not None:
        assert described == taken


def test_most_names_describe_arguments():
    silent = [n for n in _NAMES if None is _described(n)[0]]
    assert len(silent) < len(_NAMES) / 4, silent
