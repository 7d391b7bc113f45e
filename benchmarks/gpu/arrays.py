"""Arrays made from seeds, and what is compared of results, in NumPy alone.

Both machines run this: the one with TensorFlow, where programs are exported,
and the one with a GPU, to which no weights and no batches travel.
"""

from __future__ import annotations

from typing import Any
import zlib

import numpy as np

_PROJECTIONS = 4
_SMALL = 16


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that go by the name, the same with every NumPy.

    From raw bits: what NumPy makes of them may change between versions.
    """
    return ((_bits(name, shape) >> np.uint64(40)) * 2.0**-24).reshape(shape)


def _bits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.PCG64(zlib.crc32(name.encode()))
    return generator.random_raw(int(np.prod(shape)))


def described(value: np.ndarray) -> dict[str, Any]:
    """How to make an array like this one: of its scale, not its values.

    Constants and a few integers are kept as they are.
    """
    if value.size and (value == value.flat[0]).all():
        return {"kind": "constant", "value": value.flat[0].item()}
    if value.dtype.kind in "iub" and value.size <= _SMALL:
        return {"kind": "values", "values": value.tolist()}
    if value.dtype.kind != "f":
        raise ValueError(f"Not known how to make {value.dtype}{value.shape}.")
    mean, std = float(value.mean()), float(value.std())
    return {"kind": "uniform", "mean": mean, "std": std}


def made(argument: dict[str, Any]) -> np.ndarray:
    """The array for an argument of a program.

    Args:
        argument: Its `name`, `shape`, `dtype`, and `make` from `described`,
            or `{"kind": "integers", "bound": ...}`.
    """
    make, shape = argument["make"], tuple(argument["shape"])
    if make["kind"] == "constant":
        return np.full(shape, make["value"], argument["dtype"])
    if make["kind"] == "values":
        return np.array(make["values"], argument["dtype"]).reshape(shape)
    drawn = uniform(argument["name"], shape)
    if make["kind"] == "integers":
        return (drawn * make["bound"]).astype(argument["dtype"])
    # A uniform distribution of width 1 has a variance of 1/12.
    drawn = (drawn - 0.5) * 12**0.5 * make["std"] + make["mean"]
    return drawn.astype(argument["dtype"])


def sketch(name: str, value: np.ndarray) -> list[float]:
    """The norm of an array, and its products with random vectors.

    The mean square of the latter, between two arrays, is the squared norm of
    their difference, so that arrays need not travel to be compared.
    """
    flat = np.asarray(value, "float64").ravel()
    bits, products = _bits(name, flat.shape), []
    for number in range(_PROJECTIONS):
        drawn = (bits >> np.uint64(63 - number)) & np.uint64(1)
        products.append(float(np.where(drawn, flat, -flat).sum()))
    return [float(np.linalg.norm(flat)), *products]


def difference(found: list[float], true: list[float]) -> float:
    """The norm of the difference of two arrays, estimated from sketches."""
    products = np.subtract(found[1:], true[1:])
    return float(np.sqrt(np.mean(products**2)))
