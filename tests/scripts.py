"""The example scripts in processes of their own."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *flags, data_dir):
    """Runs an example script in a directory, which its data are kept in."""
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(data_dir),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *flags],
        capture_output=True,
        text=True,
        env=environment,
        cwd=data_dir,
        check=False,
    )


def printed(code, *arguments, folders):
    """The lines that code prints in a process of its own.

    Flags of absl are defined once in each.
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def final_accuracy(output):
    """The test accuracy that a script has printed last, in percent."""
    return float(re.findall(r"Test accuracy: ([\d.]+) %", output)[-1])
