"""What tests of several benchmarks need."""

from __future__ import annotations

import importlib
import pathlib
import sys

import pytest

_BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_script(monkeypatch):
    """Imports a script of `benchmarks/gpu`.

    Some need JAX or PyTorch: stand-ins for modules are given by name.
    """
    paths = [str(_BENCHMARKS / "gpu"), str(_BENCHMARKS)]
    monkeypatch.setattr(sys, "path", [*paths, *sys.path])

    def load(name: str, stand_ins: dict):
        for module, stand_in in stand_ins.items():
            monkeypatch.setitem(sys.modules, module, stand_in)
        return importlib.import_module(name)

    yield load
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(paths[1]):
            del sys.modules[name]
