"""Prints requirements of setup.cfg, as pip takes them.

python tests/floor.py               # the lowest versions that are declared
python tests/floor.py --extra=docs  # those of one extra, without the rest
"""

from __future__ import annotations

import argparse
import configparser
import pathlib

_SETUP = pathlib.Path(__file__).parents[1] / "setup.cfg"


def _setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(_SETUP)
    return setup


def lowest() -> list[str]:
    """Requirements like `keras==3.12`, of those that have a lower bound."""
    lines = _setup()["options"]["install_requires"].splitlines()
    # 3.12 stands for 3.12.0.
    declared = [line.replace(">=", "==") for line in lines if ">=" in line]
    # TensorBoard 2.20 imports pkg_resources, and does not say so.
    return [*declared, "setuptools<81"]


def of_extra(name: str) -> list[str]:
    """The requirements of one extra."""
    return _setup()["options.extras_require"][name].split()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--extra")
    extra = parser.parse_args().extra
    print(*(of_extra(extra) if extra else lowest()))
