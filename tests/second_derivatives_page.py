"""Writes the tables of docs/second_derivatives.md, which the tests go by.

python tests/second_derivatives_page.py
"""

from __future__ import annotations

import pathlib

import keras
import second_derivative_cases as cases
import second_derivative_layers as layer_cases

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "second_derivatives.md"
# What is above is written by hand.
_MARK = "<!-- From here on: python tests/second_derivatives_page.py -->"


def _sorted(names) -> str:
    return ", ".join(f"`{name}`" for name in sorted(set(names)))


def _exact(table: dict, modes: dict[str, tuple]) -> list[str]:
    """Names that are exact everywhere, and those that XLA does not compile."""
    rows = {}
    for name in table:
        kind = "" if "xla" in modes[name] else "not compiled by XLA"
        rows.setdefault(kind, []).append(name)
    return [
        f"| exact{', ' + kind if kind else ''} | {_sorted(names)} |"
        for kind, names in sorted(rows.items())
    ]


def _section(title, exact, modes, differences, constant, refused) -> list[str]:
    rows = _exact(exact, modes)
    rows += [
        f"| finite differences only: {reason} | {_sorted(names)} |"
        for reason, names in _by_reason(differences).items()
    ]
    rows += [
        f"| not differentiable: {reason} | {_sorted(names.split())} |"
        for reason, names in constant.items()
    ]
    rows += [
        f"| not in the catalogue: {reason} | {_sorted(names.split())} |"
        for reason, names in refused.items()
    ]
    head = ["", f"## {title}", "", "| second derivative | of |", "|---|---|"]
    return [*head, *rows]


def _by_reason(differences: dict[str, str]) -> dict[str, list[str]]:
    found = {}
    for name, reason in differences.items():
        found.setdefault(reason, []).append(name)
    return found


def written() -> str:
    """The page, its upper part as it is."""
    by_hand, _, _ = _PAGE.read_text("utf-8").partition(_MARK)
    lines = [by_hand + _MARK]
    layers = {name: make() for name, make in layer_cases.LAYERS_EXACT.items()}
    for title, exact, *others in [
        (
            "Layers",
            layers,
            layer_cases.LAYERS_DIFFERENCES,
            layer_cases.LAYERS_CONSTANT,
            layer_cases.LAYERS_REFUSED,
        ),
        ("Activations", cases.ACTIVATIONS_EXACT, {}, {}, {}),
        (
            "`keras.ops.image`",
            cases.IMAGE_EXACT,
            cases.IMAGE_DIFFERENCES,
            cases.IMAGE_CONSTANT,
            {},
        ),
        (
            "`keras.ops`, with `nn`, `linalg` and `numpy`",
            cases.OPS_EXACT,
            cases.OPS_DIFFERENCES,
            cases.OPS_CONSTANT,
            {},
        ),
    ]:
        modes = {name: case.modes for name, case in exact.items()}
        lines += _section(title, exact, modes, *others)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    _PAGE.write_text(written(), "utf-8")
    print(f"Written: {_PAGE}")
