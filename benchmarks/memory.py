"""The memory of a process, for scripts in any environment."""

from __future__ import annotations

from pathlib import Path
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
