"""The smallest example, and what all of them may import."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
import scripts

import keras_fisher

_SCRIPTS = sorted((scripts.ROOT / "examples").rglob("*.py"))


def test_minimal_prints_the_trace_and_the_accuracy(data_dir):
    result = scripts.run("minimal.py", data_dir=data_dir)
    assert result.returncode == 0, result.stderr
    trace = re.search(r"Tr\(F\): ([\d.]+) ± ([\d.]+)", result.stdout)
    assert trace, result.stdout
    assert 0 < float(trace[2]) < float(trace[1]), trace[0]
    assert scripts.final_accuracy(result.stdout) > 90
    assert [*pathlib.Path(data_dir).glob("logs/train/*tfevents*")]


@pytest.mark.parametrize("path", _SCRIPTS, ids=lambda path: path.stem)
def test_examples_import_public_names_alone(path):
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module.split(".")[0] == "keras_fisher"
    ]
    for module, name in imported:
        public = keras_fisher
        for part in module.split(".")[1:]:
            assert part in public.__all__, (path, module)
            public = getattr(public, part)
        names = getattr(public, "__all__", dir(public))
        assert name in names and not name.startswith("_"), (module, name)
