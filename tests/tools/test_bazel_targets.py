"""Tests of the BUILD files of a small checkout."""

from __future__ import annotations

from pathlib import PurePosixPath as Path

import bazel_targets
import pytest

_FILES = {
    "setup.cfg": "[options.package_data]\nkeras_fisher =\n    _tab/static/*\n",
    "requirements_lock.txt": (
        "absl-py==2.0 \\\n    --hash=sha256:0\npytest==8.0\n"
        "numpy==1.0 ; python_full_version < '3.11'\n"
        "Tabulate==0.9\n    # via keras-fisher\n"
    ),
    "keras_fisher_tab.py": "def load():\n    from keras_fisher import _tab",
    "keras_fisher/__init__.py": "from keras_fisher.model import FisherModel",
    "keras_fisher/model.py": "import numpy as np",
    "keras_fisher/_tab/__init__.py": '"""Shows."""',
    "keras_fisher/_tab/page.py": "ROOT = __file__",
    "keras_fisher/_tab/static/page.js": "",
    "examples/common.py": "import absl.flags",
    "examples/minimal.py": "import keras_fisher",
    "examples/train.py": 'import common\nif __name__ == "__main__":\n    f()',
    "examples/paper/sweep.py": "import train",
    "tests/conftest.py": "import pytest",
    "tests/networks.py": "frame.to_markdown()",
    "tests/deep/test_page.py": (
        "import networks\nfrom keras_fisher._tab import page\nprint(__file__)"
    ),
    "tools/bazel/run_pytest.py": "import pytest",
}
_LIBRARY = """\
# Written by `make bazel-targets`, from what the files import.
load("@rules_python//python:defs.bzl", "py_library")

package(default_visibility = ["//visibility:public"])

filegroup(
    name = "all_files",
    srcs = glob(
        ["**"],
        exclude = ["**/__pycache__/**"],
    ),
)

py_library(
    name = "keras_fisher",
    srcs = ["__init__.py"],
    imports = [".."],
    deps = [":model"],
)

py_library(
    name = "model",
    srcs = ["model.py"],
    imports = [".."],
    deps = ["@pip//numpy"],
)
"""
_TAB = """
py_library(
    name = "_tab",
    srcs = ["__init__.py"],
    data = ["static/page.js"],
    imports = ["../.."],
)

py_library(
    name = "page",
    srcs = ["page.py"],
    imports = ["../.."],
    deps = [":_tab"],
)
"""
_EXAMPLES = """
py_library(
    name = "common",
    srcs = ["common.py"],
    imports = ["."],
    deps = ["@pip//absl_py"],
)

py_binary(
    name = "minimal",
    srcs = ["minimal.py"],
    deps = ["//keras_fisher"],
)

py_binary(
    name = "train",
    srcs = ["train.py"],
    deps = [":train_library"],
)

py_library(
    name = "train_library",
    srcs = ["train.py"],
    imports = ["."],
    deps = [":common"],
)
"""
_HELPERS = """
py_library(
    name = "conftest",
    srcs = ["conftest.py"],
    data = ["//:pyproject.toml"],
    deps = ["@pip//pytest"],
)

py_library(
    name = "networks",
    srcs = ["networks.py"],
    imports = ["."],
    deps = ["@pip//tabulate"],
)
"""
_TEST = """
py_test(
    name = "test_page",
    srcs = [
        "test_page.py",
        "//tools/bazel:run_pytest.py",
    ],
    args = ["$(rootpath test_page.py)"],
    data = ["//:checkout"],
    main = "//tools/bazel:run_pytest.py",
    deps = [
        "//keras_fisher/_tab:page",
        "//tests:conftest",
        "//tests:networks",
        "@pip//pytest",
    ],
)
"""


@pytest.fixture
def root(tmp_path):
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def _text(root, folder):
    return bazel_targets.Targets(root).build_files()[Path(folder, "BUILD")]


def test_a_file_is_what_one_would_write(root):
    assert _text(root, "keras_fisher") == _LIBRARY


@pytest.mark.parametrize(
    "folder, targets",
    [
        ("keras_fisher/_tab", _TAB),
        ("examples", _EXAMPLES),
        ("tests", _HELPERS),
        ("tests/deep", _TEST),
    ],
)
def test_targets_are_what_one_would_write(root, folder, targets):
    head, end_of_files, found = _text(root, folder).partition("    ),\n)\n")
    assert "all_files" in head and end_of_files
    assert found == targets


def test_the_tab_stands_beside_the_package(root):
    text = _text(root, ".")
    assert text.endswith(
        "py_library(\n"
        '    name = "keras_fisher_tab",\n'
        '    srcs = ["keras_fisher_tab.py"],\n'
        '    imports = ["."],\n'
        '    deps = ["//keras_fisher/_tab"],\n'
        ")\n"
    )
    assert '        "//tests/deep:all_files",\n' in text


def test_only_the_library_is_for_others(root):
    files = bazel_targets.Targets(root).build_files()
    public = {p for p, text in files.items() if "//visibility:public" in text}
    assert public == {Path("BUILD"), Path("keras_fisher/BUILD")}


def test_a_package_that_is_not_in_the_lock_is_refused(root):
    (root / "examples/common.py").write_text("import numpi", "utf-8")
    targets = bazel_targets.Targets(root)
    with pytest.raises(
        ValueError, match=r"examples/common.py imports \['numpi'\], which"
    ):
        targets.build_files()
