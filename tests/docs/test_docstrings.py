"""Docstrings of public names have what a reader needs."""

from __future__ import annotations

import importlib
import inspect
import re

import public_names
import pytest

_FIELD = re.compile(r"^    \*{0,2}(\w+):", re.MULTILINE)


def _section(doc: str, name: str) -> str:
    """The indented lines below `name:`."""
    found = re.search(rf"^{name}:\n((?: +.*\n|\n)*)", doc + "\n", re.M)
    return found[1] if found else ""


@pytest.mark.parametrize("full_name", public_names.all_names())
def test_a_docstring_is_complete(full_name):
    module, _, name = full_name.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    doc = inspect.getdoc(value)
    arguments = [*inspect.signature(value).parameters]
    # Tuples and dataclasses have attributes, and these for arguments.
    fields = _section(doc, "Args") or _section(doc, "Attributes")
    assert _FIELD.findall(fields) == arguments
    assert re.search(r"^Example:\n(```py(thon|con)$|>>> )", doc, re.MULTILINE)
