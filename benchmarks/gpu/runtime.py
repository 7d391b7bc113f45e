"""Runs exported programs with the XLA of JAX, which is not public API.

Written for JAX 0.11.2.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
import gzip
import json
import os
from pathlib import Path
import re
import time
from typing import Any

import arrays
import jax
from jax._src.lib import xla_client
import jax.extend
import numpy as np

jax.config.update("jax_enable_x64", True)
# Read as the backend starts: PyTorch is on the same card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
_BACKEND = jax.extend.backend.get_backend()
_NEARLY_ZERO = 1e-4
_NOTHING = (
    "func.func @main(%x: tensor<f32>) -> tensor<f32> {return %x: tensor<f32>}"
)


def parser(description: str) -> argparse.ArgumentParser:
    """What all scripts of the card take: programs, and where results go."""
    result = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument(
        "--programs", default=".gpu-programs", help="Where programs are."
    )
    result.add_argument(
        "--output", default="gpu-results", help="Where results go."
    )
    return result


def _compiled(text: str) -> Any:
    return _BACKEND.compile_and_load(
        text,
        xla_client.DeviceList(tuple(_BACKEND.devices()[:1])),
        xla_client.CompileOptions(),
    )


# A first program, by itself: several threads must not start the compiler.
_compiled(_NOTHING)


def descriptions(directory: Path) -> Iterator[dict[str, Any]]:
    """What the programs in a directory are."""
    for path in sorted(directory.glob("*.json.gz")):
        yield {
            **json.loads(gzip.decompress(path.read_bytes())),
            "directory": str(directory),
        }


class Arguments:
    """Makes arguments, each once for all programs."""

    def __init__(self):
        self._made: dict[str, Any] = {}

    def __call__(self, argument: dict[str, Any]) -> Any:
        """An argument on the device; a variable is the caller's own.

        Programs give the memory of variables to their new values.
        """
        key = json.dumps(argument, sort_keys=True)
        if key not in self._made:
            self._made[key] = arrays.made(argument)
            if argument["role"] != "variable":
                self._made[key] = jax.device_put(self._made[key])
        if argument["role"] != "variable":
            return self._made[key]
        return jax.device_put(self._made[key].copy())

    def clear(self) -> None:
        self._made.clear()


class Program:
    """A compiled program.

    Args:
        described: Its description, of `descriptions`.
        exact: Whether products of `float32` are computed in full; else as
            XLA does it by default, in TF32 where the device has it.
    """

    def __init__(self, described: dict[str, Any], exact: bool = False):
        self.described = described
        path = Path(described["directory"], described["program"])
        text = gzip.decompress(path.read_bytes()).decode()
        if exact:
            text = re.sub(
                r"(precision(_config)? = \[[^\]]*\])",
                lambda found: found[0].replace("DEFAULT", "HIGHEST"),
                text,
            )
        begin = time.perf_counter()
        self._executable = _compiled(text)
        self.compile_seconds = time.perf_counter() - begin

    def begin(self, make: Arguments) -> None:
        """Puts the arguments on the device."""
        self._arguments = [make(a) for a in self.described["arguments"]]
        self.outputs = None

    def step(self) -> None:
        """Executes it once, and feeds results back to the arguments."""
        self.outputs = self._executable.execute(self._arguments)
        for result, output in zip(self.described["results"], self.outputs):
            if result["feeds"] is not None:
                self._arguments[result["feeds"]] = output

    def call(self, values: dict[str, Any]) -> dict[str, Any]:
        """Executes it once on arguments by name.

        Args:
            values: The arguments. New values of variables are put in here.

        Returns:
            The other results by name.
        """
        arguments = [values[a["name"]] for a in self.described["arguments"]]
        outputs = self._executable.execute(arguments)
        others = {}
        for result, output in zip(self.described["results"], outputs):
            feeds = result["feeds"] is not None
            (values if feeds else others)[result["name"]] = output
        return others

    def run(self, steps: int) -> float:
        """The seconds of a step, in so many."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.outputs)
        return (time.perf_counter() - begin) / steps

    def results(self) -> dict[str, np.ndarray]:
        """Results of the last execution by name."""
        return {
            result["name"]: np.asarray(output)
            for result, output in zip(self.described["results"], self.outputs)
        }

    def end(self) -> None:
        """Gives up what is on the device."""
        self._arguments = self.outputs = None

    def errors(self) -> dict[str, float]:
        """How far the results are from those of TensorFlow, by name.

        Relative to the norm of each, and under `"gradient"` of all variables
        of the optimizer together, which are the gradient after one step.
        """
        found, parts = {}, [0.0, 0.0]
        for result, true, output in zip(
            self.described["results"], self.described["true"], self.outputs
        ):
            name = result["name"]
            sketch = arrays.sketch(name, np.asarray(output))
            difference = arrays.difference(sketch, true)
            found[name] = difference / true[0] if true[0] else difference
            if name.startswith("optimizer") and result["shape"]:
                parts[0] += difference**2
                parts[1] += true[0] ** 2
        if parts[1]:
            found["gradient"] = float(np.sqrt(parts[0] / parts[1]))
        return found

    def worst(self, errors: dict[str, float]) -> str:
        """The result that is off most, of those that are not nearly zero.

        As gradients of biases in front of a normalization are.
        """
        norms = {
            result["name"]: true[0]
            for result, true in zip(
                self.described["results"], self.described["true"]
            )
        }
        largest: dict[str, float] = {}
        for name, norm in norms.items():
            group = re.split("[ _/]", name)[0]
            largest[group] = max(norm, largest.get(group, 0.0))
        counted = [
            name
            for name, norm in norms.items()
            if norm >= _NEARLY_ZERO * largest[re.split("[ _/]", name)[0]]
        ]
        return max(counted, key=lambda name: errors[name])

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that an execution needs, as XLA has planned it."""
        stats = self._executable.get_compiled_memory_stats()
        parts = {
            "arguments": stats.argument_size_in_bytes,
            "results": (stats.output_size_in_bytes - stats.alias_size_in_bytes),
            "temporary": stats.temp_size_in_bytes,
        }
        return {**parts, "all": sum(parts.values())}

    def optimized(self) -> str:
        """The program as XLA has optimized it."""
        return "\n".join(
            module.to_string() for module in self._executable.hlo_modules()
        )


_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([\w\-]+)\(", re.MULTILINE
)


def statistics(optimized: str) -> dict[str, int]:
    """What an optimized program executes, counted by kind."""
    found = Counter()
    for line in optimized.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        kind = match[1]
        target = re.search(r'custom_call_target="([^"]+)"', line)
        fusion = re.search(r"kind=(\w+)", line)
        if kind == "custom-call" and target:
            kind = target[1]
        elif kind == "fusion" and fusion:
            triton = '"kind":"__triton' in line
            kind = "fusion triton" if triton else f"fusion {fusion[1]}"
        found[kind] += 1
    return dict(found)


def platform_version() -> str:
    """What the backend says of itself, in one line."""
    return " ".join(str(_BACKEND.platform_version).split())
