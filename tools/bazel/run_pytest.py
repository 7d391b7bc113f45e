"""Runs pytest for Bazel, on the files that it names.

Stands in a folder of its own: Python puts the folder of a program on its path,
and Bazel's program is a link to this file, so that folder is in the checkout.
"""

from __future__ import annotations

import os
import sys

import pytest


def options(environment: dict[str, str]) -> list[str]:
    """What Bazel asks for in the environment, in the words of pytest.

    Args:
        environment: Variables; Bazel's "Test encyclopedia" says which.
    """
    found = ["-p", "no:cacheprovider"]
    if report := environment.get("XML_OUTPUT_FILE"):
        found.append(f"--junitxml={report}")
    if names := environment.get("TESTBRIDGE_TEST_ONLY"):
        found += ["-k", names]
    return found


def main(arguments: list[str]) -> int:
    """Runs the tests, and returns the exit status."""
    chosen = options(dict(os.environ))
    status = pytest.main([*chosen, *arguments])
    # All tests of a file may be slow, and left out.
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and "-k" not in chosen:
        return 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
