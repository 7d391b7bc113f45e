"""The house stays as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / "keras_fisher"

# What each room may import, besides itself: imports run one way.
_ROOMS = {
    "_common": set(),
    "estimates": set(),
    "_tensorboard": {"_common"},
    "likelihoods": {"_common"},
    "_derivatives": {"_common"},
    "penalties": {"_common", "_derivatives", "likelihoods"},
    "_measuring": {"_common", "_derivatives", "estimates", "likelihoods"},
    "_training": {"_common", "_derivatives", "likelihoods", "penalties"},
    "layers": {
        *("_common", "_derivatives", "_training", "likelihoods", "penalties"),
    },
    "model": {
        *("_common", "_training", "likelihoods", "penalties"),
    },
    "logs": {"_common", "_tensorboard"},
    "plotting": {"_common", "_tensorboard"},
    "_fisher_tab": {"_tensorboard", "plotting"},
    "callbacks": {
        *("_common", "_measuring", "_tensorboard", "_training", "plotting"),
    },
    "datasets": {"_common"},
    "applications": {"_common"},
}
_MOST_FLOORS = 10
_LONGEST_FUNCTION, _LONGEST_FILE = 60, 500


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


_MODULES = {_name(path): path for path in _PACKAGE.rglob("*.py")}


def _imports(path: pathlib.Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in _MODULES else node.module)
    return found & _MODULES.keys()


_GRAPH = {name: _imports(path) - {name} for name, path in _MODULES.items()}


def test_imports_have_no_cycle_and_few_floors():
    way = []

    @functools.cache
    def floor(module):
        assert module not in way, f"cycle: {[*way, module]}"
        way.append(module)
        found = 1 + max(map(floor, _GRAPH[module]), default=0)
        way.pop()
        return found

    highest = max(_MODULES, key=floor)
    assert floor(highest) <= _MOST_FLOORS, (highest, floor(highest))


def _room(module: str) -> str:
    return (*module.split("."), "")[1]


@pytest.mark.parametrize("room", sorted({*map(_room, _MODULES)} - {""}))
def test_imports_run_one_way(room):
    wrong = [
        (module, imported)
        for module in _MODULES
        if _room(module) == room
        for imported in _GRAPH[module]
        if _room(imported) not in {room, *_ROOMS[room]}
    ]
    assert not wrong, wrong


def _names_imported(path: pathlib.Path) -> list[tuple[str, str]]:
    """Modules and names of all `from ... import ...` in a file."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_no_private_name_is_imported_from_another_file():
    wrong = [
        (module, source, name)
        for module, path in _MODULES.items()
        for source, name in _names_imported(path)
        if source.startswith("keras_fisher") and name.startswith("_")
    ]
    assert not wrong, wrong


def test_the_page_names_every_module():
    page = (_ROOT / "docs" / "architecture.md").read_text("utf-8")
    names = {p.name for p in _MODULES.values()} - {"__init__.py"}
    missing = {name for name in names if name not in page}
    assert not missing, missing


def test_documents_name_files_that_exist():
    pages = [*_ROOT.glob("*.md"), *_ROOT.glob("docs/*.md")]
    missing = [
        (page.name, name)
        for page in pages
        for name in re.findall(
            r"`((?:tests|benchmarks|examples)/[\w/]+\.py)",
            page.read_text("utf-8"),
        )
        if not (_ROOT / name).exists()
    ]
    assert len(pages) > 5
    assert not missing, missing


def test_test_modules_do_not_import_each_other():
    wrong = [
        (path.name, node.lineno)
        for path in (_ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
        )
        if name.startswith("test_")
    ]
    assert not wrong, wrong


def _tracked(pattern: str) -> list[pathlib.Path]:
    found = subprocess.run(
        ["git", "ls-files", pattern],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = found.stdout.split()
    # A copy without its history has what lies in the folders.
    paths = [_ROOT / n for n in names] or _ROOT.glob(f"**/{pattern}")
    return [
        path
        for path in paths
        if path.exists() and not any(p.startswith(".venv") for p in path.parts)
    ]


def _length(function: ast.FunctionDef) -> int:
    """Lines of code, without a docstring."""
    begin = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    last = begin.end_lineno if has_docstring else function.lineno - 1
    first_lines = begin.lineno - function.lineno if has_docstring else 0
    return function.end_lineno - last + first_lines


def test_no_function_and_no_file_is_long():
    long = []
    for path in _tracked("*.py"):
        text = path.read_text("utf-8")
        if text.count("\n") > _LONGEST_FILE:
            long.append(f"{path}: {text.count(chr(10))} lines")
        long += [
            f"{path}: {node.name}: {_length(node)} lines"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and _length(node) > _LONGEST_FUNCTION
        ]
    assert not long, "\n".join(long)
