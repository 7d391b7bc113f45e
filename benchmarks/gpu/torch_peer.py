"""PyTorch's sides as the process of JAX sees them."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys
from typing import Any


class Peer:
    """A process with PyTorch, which answers while this one waits."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("torch_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded: list[str] = []

    def _ask(self, *command: Any) -> Any:
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def about(self) -> dict[str, Any]:
        """Versions, and the device it runs on."""
        return self._ask("about")

    def load(
        self, network: str, mode: str, side: str, batch: list
    ) -> dict[str, Any]:
        """Makes a model and runs it; tells its memory, or an `"error"`."""
        found = self._ask("load", network, mode, side, batch)
        if "error" not in found:
            self.loaded.append(side)
        return found

    def run(self, side: str, steps: int) -> float:
        """The seconds of a step, in so many."""
        return self._ask("run", side, steps)

    def clear(self) -> None:
        """Gives up all models."""
        self.loaded = []
        self._ask("clear")

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
