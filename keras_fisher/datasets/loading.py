"""Loading of data sets through TFDS."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import logging
import os
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher.datasets.random_state import borrowed_random_state

_EMBEDDED_NAMES = "'digits' and 'mnist1d'"

# What Debian and Ubuntu have a package of, and how to get it.
_PACKAGED = {
    "fashion_mnist": (
        "Debian and Ubuntu ship it, `apt-get install dataset-fashion-mnist` is "
        "enough. "
    )
}

# Import name and PyPI name of what `pip install keras_fisher[data]` brings.
_DATA_PACKAGES = {
    # Needed by tensorflow-datasets 4.9.10, which does not say so:
    # https://github.com/tensorflow/datasets/issues/11212
    "importlib_resources": "importlib_resources",
    "mnist1d": "mnist1d",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}


def load(
    name: str,
    split: Any = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    shuffle_files: bool = False,
    with_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a data set as `(x, y)` pairs that are ready to train on.

    `"mnist1d"` (signals of shape `(40, 1)`) and `"digits"` (images of shape
    `(8, 8, 1)`) are embedded: they are generated on the machine, once, and
    need no network. `"tiny_imagenet"` (images of shape `(64, 64, 3)`) is read
    from `manual_dir`, where you have unpacked
    http://cs231n.stanford.edu/tiny-imagenet-200.zip; its `"test"` split is the
    archive's `val`, since the images of the archive's `test` have no labels.
    `"fashion_mnist"` (images of shape `(28, 28, 1)`) is read from `manual_dir`,
    if its four files are there, or from the package `dataset-fashion-mnist` of
    Debian and Ubuntu, if that is installed, or else downloaded by TFDS.
    Any other name, such as `"cifar10"` or `"cifar100"`, goes to
    [TensorFlow Datasets](https://www.tensorflow.org/datasets/catalog), which
    downloads the data set on first use.

    `x` is float32: images are scaled to `[0, 1]`, other numbers are cast,
    text stays text. Integer `y` is int64. The global random state of Python
    and NumPy is the same after the call as before.

    Args:
        name: Name of the data set, `"mnist1d"`, `"digits"`,
            `"tiny_imagenet"` or any name that `tfds.load` accepts.
        split: What to load, as for `tfds.load`: a split expression such as
            `"train"` or `"train[:10%]"`, a list of them, or `None` for all
            splits.
        data_dir: Folder in which prepared data sets are kept. Defaults to
            the environment variable `TFDS_DATA_DIR`, or else to
            `~/tensorflow_datasets`.
        manual_dir: Folder of files that you have downloaded yourself: Tiny
            ImageNet, unpacked, the four files of Fashion-MNIST, or archives
            that TFDS shall not download.
            Defaults to `downloads/manual` in `data_dir`, as in TFDS.
        batch_size: Number of examples in a batch; the last batch may be
            smaller. `None` leaves single examples, to be shuffled first.
        shuffle_files: Whether to shuffle the files of a large data set.
        with_info: Whether to return the `tfds.core.DatasetInfo` as well.
        **kwargs: Further arguments of `tfds.load`, for example `download` or
            `read_config`.

    Returns:
        A `tf.data.Dataset` if `split` is one expression, a list of them if
        it is a list, a dict of them by split name if it is `None`; with
        `with_info=True` a pair of that and a `tfds.core.DatasetInfo`.

    Raises:
        FileNotFoundError: If Tiny ImageNet is not in `manual_dir`.
        ImportError: If a package of `keras_fisher[data]` is missing.
        RuntimeError: If the data set cannot be downloaded or written.
        ValueError: If there is no data set or split of that name, if the
            data set has no `(input, target)` pair, if files of Fashion-MNIST
            are damaged or some of them missing, if `batch_size` is not a
            positive integer, or if `as_supervised` is not true.

    Example:
    ```python
    train, test = keras_fisher.datasets.load("mnist1d", ["train", "test"])
    train = train.shuffle(4000).batch(128)
    ```
    """
    if batch_size is not None:
        batch_size = checks.integer(
            "batch_size",
            batch_size,
            1,
            "of at least 1, or None for single examples",
        )
    if not kwargs.pop("as_supervised", True):
        raise ValueError(
            "`as_supervised` must be True, since pairs `(x, y)` are what is "
            "made ready to train on. Received: as_supervised=False. For other "
            "features call `tfds.load`, which knows "
            f"{_EMBEDDED_NAMES} once they were loaded here."
        )
    if not isinstance(name, str) or not name.strip():
        raise _unknown(name)
    load_pairs = _folder_load if name == "tiny_imagenet" else _tfds_load
    datasets, info = load_pairs(
        name,
        split=split,
        data_dir=data_dir,
        manual_dir=manual_dir,
        shuffle_files=shuffle_files,
        **kwargs,
    )
    maximum = _input_maximum(info)

    def ready_example(x: Any, *targets: Any) -> tuple:
        return _ready_input(x, maximum), *map(_ready_target, targets)

    def ready(dataset: tf.data.Dataset[Any]) -> tf.data.Dataset[Any]:
        dataset = dataset.map(
            ready_example, num_parallel_calls=tf.data.AUTOTUNE
        )
        return dataset if batch_size is None else dataset.batch(batch_size)

    datasets = tf.nest.map_structure(ready, datasets)
    return (datasets, info) if with_info else datasets


def _folder_load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None,
    manual_dir: str | os.PathLike[str] | None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns the data sets of a local folder and their info."""
    with _missing_package_explained(name):
        from keras_fisher.datasets import tiny_imagenet
    data_path = _absolute(data_dir or _default_data_dir())
    return tiny_imagenet.load_tiny_imagenet(
        data_dir=data_path,
        manual_dir=_absolute(manual_dir or data_path / "downloads" / "manual"),
        **kwargs,
    )


def _tfds_load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None,
    manual_dir: str | os.PathLike[str] | None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns what `tfds.load` returns, and advice where it fails."""
    kwargs |= dict(data_dir=data_dir, as_supervised=True, with_info=True)
    with _missing_package_explained(name):
        tfds = _tfds_with_embedded_builders()
        if manual_dir is not None:
            config = tfds.download.DownloadConfig(
                manual_dir=_absolute(manual_dir)
            )
            kwargs["download_and_prepare_kwargs"] = {
                **kwargs.get("download_and_prepare_kwargs", {}),
                "download_config": config,
            }
        try:
            with borrowed_random_state(), _quiet_logger("absl"):
                if name == "fashion_mnist" and kwargs.get("download", True):
                    _prepare_fashion_mnist(data_dir, manual_dir)
                return _unless_taken(tfds.load, name, **kwargs)
        except tfds.core.DatasetNotFoundError:
            # Not chained: TFDS lists more than a thousand names.
            raise _unknown(name) from None
        except (OSError, tfds.download.DownloadError) as error:
            raise RuntimeError(
                f"Could not prepare the data set {name!r} in "
                f"{data_dir or _default_data_dir()}. "
                f"{type(error).__name__}: {error}. Check the network and "
                "the disk. Without a network, prepare it on another machine "
                "and pass that folder as `data_dir`, or in the environment "
                "variable TFDS_DATA_DIR; or pass the folder of an archive "
                "that you have downloaded as `manual_dir`. "
                f"{_PACKAGED.get(name, '')}"
                f"{_EMBEDDED_NAMES} need no network."
            ) from error


def _unknown(name: Any) -> ValueError:
    return ValueError(
        f"Unknown data set. Received: name={name!r}. Embedded are "
        f"{_EMBEDDED_NAMES}; 'tiny_imagenet' and any other name of "
        "TensorFlow Datasets work too: "
        "https://www.tensorflow.org/datasets/catalog."
    )


def _default_data_dir() -> str:
    """Returns where TFDS keeps its data sets."""
    return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def _absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(path).expanduser().absolute()


@contextlib.contextmanager
def _missing_package_explained(name: str) -> Iterator[None]:
    """Says how to install what the data set `name` could not import."""
    try:
        yield
    except ImportError as error:
        package = _DATA_PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise ImportError(
            f"The data set {name!r} needs the package {package!r}, which "
            f"cannot be imported ({error}). Install it with "
            '`pip install "keras_fisher[data]"`.',
            name=error.name,
        ) from error


def _tfds_with_embedded_builders() -> ModuleType:
    """Returns TFDS, which knows a builder once its class is defined."""
    import tensorflow_datasets as tfds

    from keras_fisher.datasets import digits  # noqa: F401
    from keras_fisher.datasets import mnist1d  # noqa: F401

    return tfds


def _prepare_fashion_mnist(
    data_dir: str | os.PathLike[str] | None,
    manual_dir: str | os.PathLike[str] | None,
) -> None:
    """Prepares it as TFDS does, if its files are on the machine."""
    from keras_fisher.datasets import fashion_mnist

    data_path = _absolute(data_dir or _default_data_dir())
    folder = fashion_mnist.find(
        _absolute(manual_dir or data_path / "downloads" / "manual")
    )
    if folder is not None:
        builder = fashion_mnist.FashionMnistFiles(
            folder=folder, data_dir=data_dir
        )
        _unless_taken(builder.download_and_prepare)


def _unless_taken(
    prepare: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Returns what `prepare` returns, also if others prepare the same."""
    try:
        return prepare(*args, **kwargs)
    except OSError as error:
        # Another process was first to put its copy in place: take that one.
        is_taken = isinstance(error, FileExistsError)
        if not is_taken and error.errno != errno.ENOTEMPTY:
            raise
        return prepare(*args, **kwargs)


@contextlib.contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """Keeps warnings of the logger `name` from the screen."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _input_maximum(info: Any) -> int | None:
    """Returns the value of white if the inputs are images of integers."""
    import tensorflow_datasets as tfds

    key = info.supervised_keys[0]
    feature = info.features[key] if isinstance(key, str) else None
    if not isinstance(feature, tfds.features.Image):
        return None
    if not np.issubdtype(feature.np_dtype, np.integer):
        return None
    metadata = info.metadata if isinstance(info.metadata, dict) else {}
    return metadata.get("max_pixel", np.iinfo(feature.np_dtype).max)


def _ready_input(x: Any, maximum: int | None) -> Any:
    """Returns `x` with numbers as float32, integers from 0 to 1 if images."""

    def ready(value: tf.Tensor) -> tf.Tensor:
        if value.dtype.is_integer and maximum is not None:
            return tf.cast(value, tf.float32) / maximum
        if value.dtype.is_integer or value.dtype.is_floating:
            return tf.cast(value, tf.float32)
        return value

    return tf.nest.map_structure(ready, x)


def _ready_target(y: Any) -> Any:
    """Returns `y` with integers as int64."""

    def ready(value: tf.Tensor) -> tf.Tensor:
        return tf.cast(value, tf.int64) if value.dtype.is_integer else value

    return tf.nest.map_structure(ready, y)
