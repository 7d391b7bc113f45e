"""Sides of a benchmark in processes of their own, which take turns."""

from __future__ import annotations

from collections.abc import Iterable
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A script of this directory that answers each line with JSON.

    To be used as a context.

    Args:
        python: The interpreter.
        script: Name of the script.
        *arguments: What it is started with.
    """

    def __init__(self, python: str | Path, script: str, *arguments: str):
        self._name = " ".join([script, *arguments])
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> Any:
        """What the process answers to one line."""
        try:
            print(command, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(
                f"{self._name} failed at `{command}`; see above. If it is a "
                "side of PyTorch, --nopeers runs without it."
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self._process.communicate()


def torch_python(environment: str, requirements: Iterable[str]) -> Path:
    """The interpreter of PyTorch's environment, which is made if needed.

    Args:
        environment: Its directory, from the root of the repository.
        requirements: What it has to have, as for `pip install`.

    Raises:
        SystemExit: If it cannot be made.
    """
    directory = ROOT / environment
    python = directory / "bin" / "python"
    requirements = list(requirements)
    names = [requirement.partition("==")[0] for requirement in requirements]
    check = f"from importlib import metadata; [*map(metadata.version, {names})]"
    try:
        if python.exists():
            found = subprocess.run([python, "-c", check], capture_output=True)
            if found.returncode == 0:
                return python
        print(f"Installing {', '.join(requirements)} in {environment}")
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *requirements],
            check=True,
        )
        subprocess.run([python, "-c", check], check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"The environment {environment} for PyTorch cannot be made; see "
            f"above. Make one with {', '.join(requirements)} and pass it as "
            "--torch_env, or pass --nopeers."
        ) from None
    return python
