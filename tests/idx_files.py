"""Small files in the format of Fashion-MNIST."""

from __future__ import annotations

import gzip
import pathlib
import struct

import numpy as np

SIZES = {"train": 12, "t10k": 5}


def write(folder: pathlib.Path) -> None:
    """Writes the four files, compressed as the published ones are."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, size in SIZES.items():
        images = generator.integers(0, 256, (size, 28, 28), np.uint8)
        labels = generator.integers(0, 10, size, np.uint8)
        images[0, 0, :2] = 0, 255
        write_array(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_array(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an array of bytes."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))
