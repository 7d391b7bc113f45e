"""Packages that only some modules need, and that an extra installs."""

from __future__ import annotations

import importlib
from types import ModuleType


def imported(name: str, needed_by: str) -> ModuleType:
    """Imports a module of the extra `plot`, or says how to install it.

    Args:
        name: Module to import.
        needed_by: Module of ours that cannot do without it.

    Raises:
        ImportError: If it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs {name.partition('.')[0]}, which cannot be "
            f"imported ({error}). Install it with "
            '`pip install "keras_fisher[plot]"`.',
            name=error.name,
        ) from error
