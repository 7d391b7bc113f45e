"""Prints the lowest versions that setup.cfg declares, as pip takes them."""

from __future__ import annotations

import configparser
import pathlib

_SETUP = pathlib.Path(__file__).parents[1] / "setup.cfg"


def lowest() -> list[str]:
    """Requirements like `keras==3.12.0`, of those that have a lower bound."""
    setup = configparser.ConfigParser()
    setup.read(_SETUP)
    lines = setup["options"]["install_requires"].splitlines()
    # 3.12 stands for 3.12.0.
    return [line.replace(">=", "==") for line in lines if ">=" in line]


if __name__ == "__main__":
    print(*lowest())
