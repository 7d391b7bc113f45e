"""Docstrings that Python completes, completed for the site as well.

`keras_fisher.penalties.kinds` gives each penalty the arguments of its base
class as it is imported. The site is made of the source, without TensorFlow.
"""

from __future__ import annotations

import inspect

import griffe


class SharedArguments(griffe.Extension):
    """Does as the end of `keras_fisher.penalties.kinds` does."""

    def on_package(self, *, pkg, **kwargs):
        del kwargs
        base = pkg["penalties.base.Penalty"].docstring.value
        arguments = "".join(inspect.cleandoc(base).partition("Args:")[1:])
        for found in pkg["penalties.kinds"].classes.values():
            if [str(each) for each in found.bases] == ["Penalty"]:
                own = inspect.cleandoc(found.docstring.value)
                found.docstring.value = f"{own}\n\n{arguments}"
