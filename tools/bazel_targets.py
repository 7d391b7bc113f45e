"""Writes the BUILD files of Bazel, from what the Python files import.

python tools/bazel_targets.py

A module is a `py_library`, a script a `py_binary`, a file of tests a `py_test`.
A target depends on what its file imports, as `python_imports.py` says: so on
packages, too, that only an extra installs and a function imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
import configparser
import pathlib
from pathlib import PurePosixPath as Path
import re

import python_imports as imports

RUNNER = Path("tools/bazel/run_pytest.py")
LOCK = "requirements_lock.txt"
# Names in the lock, where they differ from those that one imports.
_PACKAGES = {
    "PIL": {"pillow"},
    "absl": {"absl_py"},
    "sklearn": {"scikit_learn"},
    # Imports importlib_resources without declaring it.
    "tensorflow_datasets": {"importlib_resources", "tensorflow_datasets"},
}
# What a method of another package imports.
_PACKAGES_OF_METHODS = {"to_markdown": "tabulate"}
# In environments of their own, or installed by hand; tests skip without them.
_ELSEWHERE = {
    *("backpack", "cleanlab", "grain", "jax", "nngeometry", "torch"),
    *("griffe", "keras_hub", "mkdocs", "onnxruntime", "tf2onnx"),
}
_HEAD = """\
# Written by `make bazel-targets`, from what the files import.
load("@rules_python//python:defs.bzl", {rules})

package(default_visibility = ["//{visible_to}"])
"""
_FILES = """
filegroup(
    name = "all_files",
    srcs = glob(
        ["**"],
        exclude = ["**/__pycache__/**"],
    ),
)
"""
_ROOT = """
licenses(["notice"])

exports_files([
    "LICENSE",
    "pyproject.toml",
    "requirements_lock.txt",
])

# For files that look around from where they are.
filegroup(
    name = "checkout",
    srcs = glob(
        [
            "*",
            ".github/**",
        ],
        exclude = [".git"],
    ) + {folders},
)

py_library(
    name = "keras_fisher",
    deps = [
        ":keras_fisher_tab",
        "//keras_fisher",
    ],
)
"""
# Attributes that stand elsewhere than in the order of the alphabet.
_PLACES = {"name": -2, "srcs": -1, "deps": 1}


class Targets:
    """Targets of Bazel, and what they depend on.

    Args:
        root: The folder of the checkout.
    """

    def __init__(self, root: pathlib.Path):
        self._checkout = imports.Checkout(root)
        self._files = [*self._checkout.trees]
        self._folders = {file.parent for file in self._files}
        self._locked = _locked(root)
        self._shipped = _shipped(root)
        # The folders of `sys.path` that each file is imported from.
        self._roots = {file: set() for file in self._files}
        self._roots[imports.TAB].add(Path())
        for file in self._files:
            for found in self._checkout.ours(file):
                self._roots[found.file].add(found.folder)

    def build_files(self) -> dict[Path, str]:
        """The text of each BUILD file, by its path in the checkout.

        Raises:
            ValueError: If a file imports a package that is not in the lock.
        """
        return {
            folder / "BUILD": self._build_file(folder)
            for folder in sorted(self._folders)
        }

    def _build_file(self, folder: Path) -> str:
        files = [file for file in self._files if file.parent == folder]
        rules = [rule for file in files for rule in self._rules(file)]
        kinds = {"py_library"} if folder == Path() else set()
        kinds |= {rule.partition("(")[0].strip() for rule in rules}
        public = not any(part.startswith("_") for part in folder.parts)
        public &= folder.parts[:1] in ((), (imports.LIBRARY,))
        head = _HEAD.format(
            rules=", ".join(f'"{kind}"' for kind in sorted(kinds)),
            visible_to="visibility:public" if public else ":__subpackages__",
        )
        return "".join([head, self._around(folder), *rules])

    def _around(self, folder: Path) -> str:
        """What a BUILD file has besides a target for each file."""
        if folder == Path():
            below = sorted(self._folders - {folder})
            labels = [f"//{each}:all_files" for each in below]
            return _ROOT.format(folders=_list(labels))
        if folder == RUNNER.parent:
            return f'\nexports_files(["{RUNNER.name}"])\n{_FILES}'
        return _FILES

    def _rules(self, file: Path) -> list[str]:
        """The targets of a file."""
        attributes = {
            "name": file.stem,
            "srcs": [file.name],
            "data": self._data(file),
            "deps": self._dependencies(file),
        }
        if _is_test(file):
            attributes["srcs"] += [f"//{RUNNER.parent}:{RUNNER.name}"]
            attributes["main"] = f"//{RUNNER.parent}:{RUNNER.name}"
            attributes["args"] = [f"$(rootpath {file.name})"]
            return [_rule("py_test", attributes)]
        library = attributes | {
            "name": self._name(file),
            "imports": [_way(file.parent, to) for to in self._roots[file]],
        }
        if not self._is_script(file):
            return [_rule("py_library", library)]
        if not self._roots[file]:
            return [_rule("py_binary", attributes)]
        program = attributes | {"data": [], "deps": [f":{self._name(file)}"]}
        return [_rule("py_binary", program), _rule("py_library", library)]

    def _name(self, file: Path) -> str:
        """The name of the target that others depend on."""
        if file.name == "__init__.py":
            return file.parent.name
        return file.stem + "_library" * self._is_script(file)

    def _label(self, file: Path, here: Path) -> str:
        """How targets in the folder `here` name that of a file."""
        name, folder = self._name(file), file.parent
        if folder == here:
            return f":{name}"
        if folder.name == name:
            return f"//{folder}"
        return f"//{folder}:{name}"

    def _is_script(self, file: Path) -> bool:
        has_guard = any(
            isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            for node in self._checkout.trees[file].body
        )
        # examples/minimal.py has none.
        is_alone = file.parts[0] == "examples" and not self._roots[file]
        return has_guard or is_alone

    def _dependencies(self, file: Path) -> list[str]:
        files = {each.file for each in self._checkout.ours(file)}
        packages = self._packages(file)
        if _is_test(file):
            paths = {folder / "conftest.py" for folder in file.parents}
            files |= paths & self._roots.keys()
            packages |= self._packages(RUNNER)
        return [
            *(self._label(each, file.parent) for each in files),
            *(f"@pip//{name}" for name in packages),
        ]

    def _packages(self, file: Path) -> set[str]:
        """Packages of the lock that a file imports."""
        found = {
            package
            for name in self._checkout.others(file) - _ELSEWHERE
            for package in _PACKAGES.get(name, {name})
        }
        found |= {
            _PACKAGES_OF_METHODS[node.attr]
            for node in ast.walk(self._checkout.trees[file])
            if isinstance(node, ast.Attribute)
            and node.attr in _PACKAGES_OF_METHODS
        }
        if unknown := found - self._locked:
            raise ValueError(
                f"{file} imports {sorted(unknown)}, which {LOCK} does not "
                "have. Declare it in setup.cfg and `make bazel-lock`, or say "
                "in tools/bazel_targets.py what installs it."
            )
        return found

    def _data(self, file: Path) -> list[str]:
        """What a file reads besides Python."""
        if file.parts[0] == imports.LIBRARY:
            return self._package_data(file)
        if file == Path("tests/conftest.py"):
            return ["//:pyproject.toml"]  # pytest's configuration
        looks_around = any(
            isinstance(node, ast.Name) and node.id == "__file__"
            for node in ast.walk(self._checkout.trees[file])
        )
        return ["//:checkout"] if looks_around else []

    def _package_data(self, file: Path) -> list[str]:
        """What wheels have beside the Python files of a folder."""
        if file.name != "__init__.py":
            return []
        return [
            str(path.relative_to(file.parent))
            for path in self._shipped
            if next(f for f in path.parents if f in self._folders)
            == file.parent
        ]


def _shipped(root: pathlib.Path) -> set[Path]:
    """The files that setup.cfg puts into wheels besides Python."""
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    patterns = setup["options.package_data"][imports.LIBRARY].split()
    return {
        Path(path.relative_to(root))
        for pattern in patterns
        for path in (root / imports.LIBRARY).glob(pattern)
    }


def _locked(root: pathlib.Path) -> set[str]:
    """The packages of the lock, by the names of their targets."""
    text = (root / LOCK).read_text("utf-8")
    names = re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
    return {re.sub("[-.]", "_", name.lower()) for name in names}


def _is_test(file: Path) -> bool:
    return file.parts[0] == "tests" and file.name.startswith("test_")


def _way(folder: Path, above: Path) -> str:
    """The path from a folder to one above it."""
    return "/".join([".."] * len(folder.relative_to(above).parts)) or "."


def _rule(kind: str, attributes: dict[str, str | list[str]]) -> str:
    names = sorted(attributes, key=lambda name: (_PLACES.get(name, 0), name))
    lines = [
        f"    {name} = {_value(attributes[name])},\n"
        for name in names
        if attributes[name]
    ]
    return f"\n{kind}(\n{''.join(lines)})\n"


def _value(value: str | list[str]) -> str:
    return f'"{value}"' if isinstance(value, str) else _list(value)


def _list(labels: Iterable[str]) -> str:
    """A list as buildifier writes it."""
    strings = [f'"{label}"' for label in sorted(labels, key=_order)]
    if len(strings) == 1:
        return f"[{strings[0]}]"
    return "[\n" + "".join(f"        {each},\n" for each in strings) + "    ]"


def _order(label: str) -> tuple[int, list[str]]:
    """Files, then targets of this folder, of others, of other repositories."""
    starts = [label.startswith(start) for start in (":", "//", "@")]
    return sum(starts) and 1 + starts.index(True), re.split("[:.]", label)


if __name__ == "__main__":
    checkout = pathlib.Path(__file__).parents[1]
    for path, text in Targets(checkout).build_files().items():
        (checkout / path).write_text(text, "utf-8")
