"""What the Python files of the checkout import: files of ours, and packages.

All imports count, wherever in a file they stand: those of a function, those by
name (`importlib.import_module("pandas")`), and those of a program in a string,
as tests give to processes of their own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import pathlib
from pathlib import PurePosixPath as Path
import re
import sys
from typing import NamedTuple

LIBRARY = "keras_fisher"
FOLDERS = ("benchmarks", "docs", "examples", LIBRARY, "tests", "tools")
# Imported by TensorBoard; it stands beside the package.
TAB = Path("keras_fisher_tab.py")
# Where a file looks after its own folder and those above it: what pytest is
# told, and what scripts and tests add by themselves.
PYTHONPATH = ("tests", "examples", "examples/reproduction", "tools")
_ADDED = ("benchmarks/gpu",)
# Functions whose first argument is the name of a module.
_IMPORTERS = {
    *("_imported", "find_spec", "import_module", "imported", "importorskip"),
}
_IMPORT_IN_A_STRING = re.compile(
    rf"^\s*(?:from ({LIBRARY}[\w.]*) import (\w+)|import ({LIBRARY}[\w.]*))",
    re.MULTILINE,
)


class Imported(NamedTuple):
    """A file of ours, and the folder of `sys.path` that it was found in."""

    file: Path
    folder: Path


def python_files(root: pathlib.Path) -> list[Path]:
    """The Python files, by their paths in the checkout `root`."""
    found = (p for folder in FOLDERS for p in (root / folder).rglob("*.py"))
    return sorted([TAB, *(Path(p.relative_to(root)) for p in found)])


def names(tree: ast.Module) -> Iterator[str]:
    """What is imported, as `module` or `module.name`, with repetitions."""
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                yield from (f"{node.module}.{a.name}" for a in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                if _name_of(node.func) in _IMPORTERS:
                    yield name
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                for module, name, whole in _IMPORT_IN_A_STRING.findall(text):
                    yield whole or f"{module}.{name}"


def _name_of(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


class Checkout:
    """Files, and what they import.

    Args:
        root: The folder of the checkout.

    Attributes:
        trees: The syntax tree of each Python file.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.trees = {
            file: ast.parse((root / file).read_text("utf-8"))
            for file in python_files(root)
        }
        self._names = {f: {*names(tree)} for f, tree in self.trees.items()}

    def ours(self, file: Path) -> set[Imported]:
        """The files that a file imports, without itself.

        Importing `a.b.c` runs `a/b/__init__.py`, too. That counts where it
        imports nothing. The others import their modules: that would be a
        cycle, and Python does without them.
        """
        found = {self._find(name, file) for name in self._names[file]}
        found |= self._empty_packages(file)
        return {each for each in found if each and each.file != file}

    def others(self, file: Path) -> set[str]:
        """Top names of what a file imports that is not ours, nor Python's."""
        return {
            name.partition(".")[0]
            for name in self._names[file]
            if not self._find(name, file)
        } - sys.stdlib_module_names

    def _find(self, name: str, file: Path) -> Imported | None:
        for folder in _search_path(file):
            parts = name.split(".")
            while parts:
                path = folder.joinpath(*parts)
                for found in (path.with_suffix(".py"), path / "__init__.py"):
                    if found in self.trees:
                        return Imported(found, folder)
                parts.pop()
        return None

    def _empty_packages(self, file: Path) -> set[Imported]:
        """Those in whose folders a file is, as far as they import nothing."""
        paths = [folder / "__init__.py" for folder in file.parents]
        paths = [path for path in paths if path in self.trees]
        return {
            Imported(path, paths[-1].parent.parent)
            for path in paths
            if not self._names[path]
        }


def _search_path(file: Path) -> list[Path]:
    # The library's own folders are on no path: datasets/mnist1d.py imports the
    # package mnist1d.
    if file.parts[0] == LIBRARY:
        return [Path(".")]
    return [*file.parents, *map(Path, (*PYTHONPATH, *_ADDED))]
