"""PyTorch's sides as the process of JAX sees them."""

from __future__ import annotations

import contextlib
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
        with contextlib.suppress(BrokenPipeError):  # Told below.
            print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                "The process with PyTorch has ended with exit status "
                f"{self._process.wait()}; its last words are above."
            )
        return json.loads(answer)

    def about(self) -> dict[str, Any]:
        """Versions, and the device it runs on.

        Raises:
            RuntimeError: If PyTorch does not run here.
        """
        found = self._ask("about")
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

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
