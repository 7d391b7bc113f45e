"""What a GPU does in a step, kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import io
from pathlib import Path
import re
import tarfile
import tempfile
from typing import Any

import jax

_MOST = 200
# Names of kernels that multiply matrices or convolve, with tensor cores or
# without; the others are XLA's own.
_PRODUCTS = re.compile(
    r"gemm|conv|cutlass|cudnn|xmma|nvjet|dgrad|wgrad|fprop|cublas", re.I
)


def profiled(run: Callable[[int], Any], steps: int) -> dict[str, Any]:
    """Times of kernels, by name, of a function that makes so many steps.

    Returns:
        Milliseconds of a step on the device, those in matrix products and
        convolutions, the number of kernels, and the longest ones: name,
        milliseconds, count.
    """
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory)
        run(steps)
        jax.profiler.stop_trace()
        (path,) = Path(directory).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        seconds, counts = Counter(), Counter()
        for plane in data.planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    seconds[event.name] += event.duration_ns * 1e-6 / steps
                    counts[event.name] += 1 / steps
    return {
        "milliseconds": sum(seconds.values()),
        "products": sum(
            value for name, value in seconds.items() if _PRODUCTS.search(name)
        ),
        "kernels": sum(counts.values()),
        "longest": [
            [name, value, counts[name]]
            for name, value in seconds.most_common(_MOST)
        ],
    }


def archive(path: Path, texts: dict[str, str]) -> None:
    """Writes texts as files of an archive."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            data = text.encode()
            info = tarfile.TarInfo(name.replace("/", "__") + ".hlo")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
