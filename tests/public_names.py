"""The names that users write."""

from __future__ import annotations

import importlib
import inspect

import keras_fisher

MODULES = [
    name
    for name in keras_fisher.__all__
    if inspect.ismodule(getattr(keras_fisher, name))
]
_PARTS = [*MODULES, "likelihoods.draws"]


def all_names() -> list[str]:
    """Full names as users write them; those in two places in the longer."""
    names, known = [], set()
    for module_name in _PARTS:
        module = importlib.import_module(f"keras_fisher.{module_name}")
        own = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
            and not name.startswith("_")
        ]
        for name in own:
            if inspect.ismodule(getattr(module, name)):
                continue
            names.append(f"keras_fisher.{module_name}.{name}")
            known.add(id(getattr(module, name)))
    for name in sorted({*keras_fisher.__all__} - {*MODULES}):
        if id(getattr(keras_fisher, name)) not in known:
            names.append(f"keras_fisher.{name}")
    return names
