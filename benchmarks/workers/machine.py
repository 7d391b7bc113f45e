"""What machine this is, and what its processes take; for any environment."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
import math
import os
from pathlib import Path
import platform
import resource
import sys


def peak() -> float:
    """The most memory this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # `getrusage` would count the process that started this one too.
        fields = dict(
            line.split(":", 1) for line in status.read_text().splitlines()
        )
        return int(fields["VmHWM"].split()[0]) / 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def busy_seconds() -> float:
    """Time that all processors have worked since boot, NaN if unknown."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return math.nan
    ticks = [int(n) for n in statistics.read_text().split("\n")[0].split()[1:9]]
    idle = sum(ticks[3:5])
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    """Name of the processor's model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1] for line in lines if "model name" in line]
    return names[0].strip() if names else platform.processor()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages."""
    return {name: metadata.version(name) for name in packages}
