"""Runs all tests, for build systems that want a program."""

import pathlib
import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([str(pathlib.Path(__file__).parent)]))
