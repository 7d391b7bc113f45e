"""The targets of Bazel are what the files import, and their lock is fresh."""

from __future__ import annotations

import ast
import configparser
import graphlib
import pathlib
from pathlib import PurePosixPath as Path
import re
from typing import NamedTuple

import bazel_targets
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import python_imports

import keras_fisher

_ROOT = pathlib.Path(__file__).parents[1]
_PYTHONS = ("3.10", "3.11", "3.12", "3.13")


class _Target(NamedTuple):
    kind: str
    sources: list[str]
    dependencies: list[str]


def _build_files() -> list[pathlib.Path]:
    folders = (_ROOT / name for name in python_imports.FOLDERS)
    return [_ROOT / "BUILD", *(p for f in folders for p in f.rglob("BUILD"))]


def _label(text: str, folder: str) -> str:
    """A label in full, as `//folder:name`."""
    if text.startswith("@"):
        return text
    place, _, name = text.partition(":")
    place = place or f"//{folder}"
    return f"{place}:{name or place.rpartition('/')[2]}"


def _targets() -> dict[str, _Target]:
    """All targets that have sources or dependencies, by their labels."""
    found = {}
    for path in _build_files():
        folder = path.parent.relative_to(_ROOT).as_posix().strip(".")
        for node in ast.parse(path.read_text("utf-8")).body:
            name = node.value.func.id
            if not name.startswith("py_"):
                continue
            values = {
                keyword.arg: ast.literal_eval(keyword.value)
                for keyword in node.value.keywords
            }
            found[_label(f":{values['name']}", folder)] = _Target(
                name,
                [str(Path(folder, each)) for each in values.get("srcs", [])],
                [_label(each, folder) for each in values.get("deps", [])],
            )
    return found


_TARGETS = _targets()


def test_build_files_are_what_imports_say():
    expected = bazel_targets.Targets(_ROOT).build_files()
    found = {path.relative_to(_ROOT).as_posix() for path in _build_files()}
    assert found == {str(path) for path in expected}, "make bazel-targets"
    stale = [
        str(path)
        for path, text in expected.items()
        if (_ROOT / path).read_text("utf-8") != text
    ]
    assert not stale, "make bazel-targets"


def _python_files() -> set[str]:
    folders = (_ROOT / name for name in python_imports.FOLDERS)
    return {
        "keras_fisher_tab.py",
        *(
            path.relative_to(_ROOT).as_posix()
            for folder in folders
            for path in folder.rglob("*.py")
        ),
    }


def test_each_file_has_a_target_of_its_kind():
    kinds = {file: set() for file in _python_files()}
    for target in _TARGETS.values():
        for source in target.sources[:1]:
            kinds[source].add(target.kind)
    for file, found in kinds.items():
        if file.startswith("keras_fisher"):
            assert found == {"py_library"}, file
        elif pathlib.PurePath(file).name.startswith("test_"):
            assert found == {"py_test"}, file
        elif 'if __name__ == "__main__":' in (_ROOT / file).read_text("utf-8"):
            assert "py_binary" in found, file
        else:
            assert len(found) == 1, file


def test_dependencies_exist_and_have_no_cycle():
    ours = {
        label: [each for each in target.dependencies if each[0] == "/"]
        for label, target in _TARGETS.items()
    }
    missing = {each for found in ours.values() for each in found} - ours.keys()
    assert not missing
    order = [*graphlib.TopologicalSorter(ours).static_order()]
    assert len(order) == len(_TARGETS) > 300


def test_the_public_target_has_the_whole_library():
    found, waiting = set(), ["//:keras_fisher"]
    while waiting:
        label = waiting.pop()
        if label.startswith("//") and label not in found:
            found.add(label)
            waiting += _TARGETS[label].dependencies
    sources = {each for label in found for each in _TARGETS[label].sources}
    ours = {f for f in _python_files() if f.startswith("keras_fisher")}
    assert sources == ours


def test_files_look_where_pytest_lets_them(pytestconfig):
    paths = [_ROOT / name for name in python_imports.PYTHONPATH]
    assert pytestconfig.getini("pythonpath") == paths


def _declared() -> list[Requirement]:
    """What users and tests need, by setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [
        setup["options"]["install_requires"],
        *(extras[name] for name in ("data", "plot", "test")),
    ]
    return [
        Requirement(line)
        for line in "\n".join(lines).splitlines()
        if line and not line.startswith("%")
    ]


@pytest.mark.parametrize("python", _PYTHONS)
def test_the_lock_has_a_version_of_all_that_is_declared(python):
    text = (_ROOT / bazel_targets.LOCK).read_text("utf-8")
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
    }
    pinned = [
        requirement
        for line in re.findall(r"^\w[^\\\n]*", text, re.MULTILINE)
        for requirement in [Requirement(line)]
        if not requirement.marker or requirement.marker.evaluate(environment)
    ]
    versions = {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in pinned
    }
    assert len(versions) == len(pinned), "make bazel-lock"
    for declared in _declared():
        version = versions[canonicalize_name(declared.name)]
        assert version in declared.specifier, f"{declared}: make bazel-lock"


def test_the_module_is_of_this_version_and_these_pythons():
    module = (_ROOT / "MODULE.bazel").read_text("utf-8")
    version = re.search(r'module\(\n.*\n    version = "(.+)"', module)[1]
    assert version == keras_fisher.__version__
    listed = re.search(r"PYTHON_VERSIONS = \[([^]]+)\]", module)[1]
    assert tuple(re.findall(r'"(.+)"', listed)) == _PYTHONS
    setup = (_ROOT / "setup.cfg").read_text("utf-8")
    assert tuple(re.findall(r"Python :: (3\.\d+)", setup)) == _PYTHONS


def test_bazel_does_not_look_into_environments():
    ignored = (_ROOT / ".bazelignore").read_text("utf-8").split()
    makefile = (_ROOT / "Makefile").read_text("utf-8")
    environments = {*re.findall(r"\.venv(?:-[a-z]+)?\b", makefile)}
    assert len(environments) > 5 and environments <= {*ignored}
