"""How results are written: tables, figures, and what they were found with."""

from __future__ import annotations

from collections.abc import Iterable
import os
from pathlib import Path
import platform
import shlex
import subprocess
import sys

from workers import machine
from workers import processes

# By which TensorFlow picks its kernels.
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


def command() -> str:
    """The command that is running."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    words = ["python", script, *sys.argv[1:]]
    if _ONEDNN in os.environ:
        words.insert(0, f"{_ONEDNN}={os.environ[_ONEDNN]}")
    return shlex.join(words)


def commit() -> str:
    """The last commit of the library, with a plus sign if files differ.

    Empty where there is no history.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=processes.ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()

    found = git("log", "-1", "--format=%h", "--", "keras_fisher")
    return found + "+" * bool(git("status", "--porcelain", "keras_fisher"))


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows_of(text: str) -> list[list[str]]:
    """The rows of the first table that `markdown` has written into a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def conditions(found: dict[str, str], more: str = "") -> str:
    """A list of the machine, of the versions found, and of our commit.

    Args:
        found: Versions by package.
        more: What to add to the line of the processor.
    """
    lines = [
        f"processor: {machine.processor()}, {os.cpu_count()} cores{more}",
        f"system: {platform.platform()}",
        f"python {platform.python_version()}",
        *(f"{name} {version}" for name, version in found.items()),
        *([f"commit {known}"] if (known := commit()) else []),
    ]
    return "\n".join(f"- {line}" for line in lines)


def output_directory(name: str) -> Path:
    """A directory given from the root of the repository, made if needed."""
    path = processes.ROOT / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def label_bars(axes, ends, positions, values, form: str, **style) -> None:
    """Writes the value of each horizontal bar behind its end."""
    for end, position, value in zip(ends, positions, values):
        axes.annotate(
            form.format(value),
            (end, position),
            textcoords="offset points",
            va="center",
            **style,
        )
