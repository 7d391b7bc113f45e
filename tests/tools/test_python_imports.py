"""Tests of what the files of a checkout import."""

from __future__ import annotations

import ast
from pathlib import PurePosixPath as Path
import textwrap

import pytest
import python_imports

_FILES = {
    "keras_fisher/__init__.py": "from keras_fisher import model",
    "keras_fisher/model.py": "from keras_fisher._common.checks import check",
    "keras_fisher/data.py": "import data",
    "keras_fisher/_common/__init__.py": '"""Imports nothing."""',
    "keras_fisher/_common/checks.py": "import os.path\nimport numpy as np",
    "keras_fisher_tab.py": "",
    "examples/common.py": "import keras_fisher.model",
    "examples/paper/run.py": "import common\nimport sweep\nimport common.x",
    "examples/reproduction/sweep.py": "from keras_fisher import FisherModel",
    "tests/networks.py": "from tensorflow import keras",
    "tests/deep/test_model.py": "import networks, sweep, pytest",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return python_imports.Checkout(tmp_path)


@pytest.mark.parametrize(
    "file, found",
    [
        ("keras_fisher/__init__.py", {"keras_fisher/model.py": "."}),
        (
            "keras_fisher/model.py",
            {"keras_fisher/_common/checks.py": "."},
        ),
        (
            "keras_fisher/_common/checks.py",
            {"keras_fisher/_common/__init__.py": "."},
        ),
        ("keras_fisher/_common/__init__.py", {}),
        # Its own folder is not where the library looks for `data`.
        ("keras_fisher/data.py", {}),
        ("examples/common.py", {"keras_fisher/model.py": "."}),
        (
            "examples/paper/run.py",
            {
                "examples/common.py": "examples",
                "examples/reproduction/sweep.py": "examples/reproduction",
            },
        ),
        (
            "examples/reproduction/sweep.py",
            {"keras_fisher/__init__.py": "."},
        ),
        (
            "tests/deep/test_model.py",
            {
                "examples/reproduction/sweep.py": "examples/reproduction",
                "tests/networks.py": "tests",
            },
        ),
    ],
)
def test_files_are_found_where_python_finds_them(checkout, file, found):
    assert checkout.ours(Path(file)) == {
        (Path(file), Path(folder)) for file, folder in found.items()
    }


@pytest.mark.parametrize(
    "file, found",
    [
        ("keras_fisher/_common/checks.py", {"numpy"}),
        ("keras_fisher/data.py", {"data"}),
        ("keras_fisher/model.py", set()),
        ("tests/networks.py", {"tensorflow"}),
        ("tests/deep/test_model.py", {"pytest"}),
    ],
)
def test_packages_are_what_is_neither_ours_nor_pythons(checkout, file, found):
    assert checkout.others(Path(file)) == found


@pytest.mark.parametrize(
    "text, found",
    [
        ("import a.b, c as d", {"a.b", "c"}),
        ("from a import b, c", {"a.b", "a.c"}),
        ("def f():\n    from a import b", {"a.b"}),
        ("if TYPE_CHECKING:\n    import a", {"a"}),
        ("importlib.import_module('a.b')", {"a.b"}),
        ("importlib.import_module(name)", set()),
        ("plt = _imported('matplotlib.pyplot')", {"matplotlib.pyplot"}),
        ("pytest.importorskip('a', reason='b')", {"a"}),
        ("print('a')", set()),
        ("C = '''\n  from keras_fisher import a\n'''", {"keras_fisher.a"}),
        ("run('import keras_fisher.a as a; a.b')", {"keras_fisher.a"}),
        ("def f():\n    '''\n    import keras_fisher\n    '''", set()),
        ("print('You import keras_fisher')", set()),
    ],
)
def test_imports_are_seen_wherever_they_stand(text, found):
    tree = ast.parse(textwrap.dedent(text))
    assert {*python_imports.names(tree)} == found
