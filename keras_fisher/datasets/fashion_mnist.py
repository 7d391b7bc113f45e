"""Fashion-MNIST from files that are on the machine already."""

from __future__ import annotations

from collections.abc import Iterator
import gzip
import pathlib
from typing import Any
import zlib

import numpy as np
import tensorflow_datasets as tfds

# Where the package of Debian and Ubuntu puts the files.
SYSTEM_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"

_PREFIXES = {"train": "train", "test": "t10k"}
_SUFFIXES = {"image": "images-idx3-ubyte", "label": "labels-idx1-ubyte"}
_SHAPE = (28, 28)
_CLASSES = 10

# The third byte of an IDX file is the type of its numbers, the fourth the
# number of axes; their sizes follow, each as four bytes.
_UINT8 = 0x08

_ADVICE = (
    f"Install the package {PACKAGE!r} of Debian or Ubuntu again, or fetch the "
    "four files from https://github.com/zalandoresearch/fashion-mnist."
)


class FashionMnistFiles(
    tfds.image_classification.FashionMNIST, skip_registration=True
):
    """TFDS's builder, reading a local folder instead of a download.

    It prepares what TFDS prepares, under the same name and version, so TFDS
    reads it from then on. The checksums of TFDS do not count: Debian has
    compressed the same pictures anew.

    Source: [Fashion-MNIST](https://arxiv.org/abs/1708.07747) (Xiao, Rasul and
    Vollgraf, 2017).
    """

    name = "fashion_mnist"

    def __init__(self, *, folder: pathlib.Path, **kwargs: Any):
        """Creates a builder.

        Args:
            folder: Where the four IDX files are, compressed or not.
            **kwargs: Further arguments of `tfds.core.DatasetBuilder`.
        """
        super().__init__(**kwargs)
        self._folder = folder

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing to download.
        # Read before anything is written: files may be broken.
        read = {split: read_split(self._folder, split) for split in _PREFIXES}
        return {
            split: self._generate_examples(images, labels)
            for split, (images, labels) in read.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # The keys of TFDS, and so its order.
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image[..., np.newaxis], "label": int(label)}


def find(*folders: pathlib.Path) -> pathlib.Path | None:
    """Look for the four IDX files.

    Args:
        *folders: Where to look, best first. The folder of the system's package
            comes last by itself.

    Returns:
        The first folder that has all four files, `None` if none has any.

    Raises:
        ValueError: If the first folder that has any lacks others.
    """
    for folder in (*folders, SYSTEM_FOLDER):
        paths = {
            f"{prefix}-{suffix}": _path(folder, f"{prefix}-{suffix}")
            for prefix in _PREFIXES.values()
            for suffix in _SUFFIXES.values()
        }
        missing = [name for name, path in paths.items() if path is None]
        if not missing:
            return folder
        if len(missing) < len(paths):
            raise ValueError(
                f"Fashion-MNIST is four files, with or without '.gz'. {folder} "
                f"lacks {missing}. {_ADVICE}"
            )
    return None


def read_split(
    folder: pathlib.Path, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and labels of one split.

    Args:
        folder: Where the four IDX files are.
        split: `"train"` or `"test"`.

    Returns:
        Arrays of uint8, of shapes `(examples, 28, 28)` and `(examples,)`.

    Raises:
        ValueError: If a file is damaged or holds something else.
    """
    images, labels = (
        _read_idx(_path(folder, f"{_PREFIXES[split]}-{suffix}"), axes)
        for suffix, axes in zip(_SUFFIXES.values(), (3, 1), strict=True)
    )
    fits = images.shape[1:] == _SHAPE and len(images) == len(labels)
    if not fits or labels.max(initial=0) >= _CLASSES:
        raise ValueError(
            f"Fashion-MNIST is images of {_SHAPE[0]}x{_SHAPE[1]} pixels, each "
            f"with a label below {_CLASSES}. Received for {split!r} in "
            f"{folder}: images of shape {images.shape}, labels of shape "
            f"{labels.shape} up to {labels.max(initial=0)}. {_ADVICE}"
        )
    return images, labels


def _path(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the path of a file, compressed or not, if it is there."""
    paths = (folder / f"{name}.gz", folder / name)
    return next((path for path in paths if path.is_file()), None)


def _read_idx(path: pathlib.Path, axes: int) -> np.ndarray:
    """Returns the bytes of an IDX file as an array."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"Cannot decompress {path} of {len(content)} bytes: {error}. "
                f"{_ADVICE}"
            ) from error
    header = 4 + 4 * axes
    magic = bytes([0, 0, _UINT8, axes])
    if len(content) < header or content[:4] != magic:
        raise ValueError(
            f"{path} is no IDX file of bytes with {axes} axes, which begins "
            f"with {magic.hex(' ')} and their sizes. Received: "
            f"{content[:header].hex(' ') or 'nothing'}. {_ADVICE}"
        )
    shape = tuple(np.frombuffer(content, ">u4", axes, offset=4).tolist())
    expected = header + np.prod(shape, dtype=object)
    if len(content) != expected:
        raise ValueError(
            f"{path} says that it holds {shape}, which is {expected} bytes "
            f"with its header. Received: {len(content)} bytes. {_ADVICE}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
