"""Normalization and augmentation of images, as steps of a `tf.data` pipeline.

The usual order puts what is the same in every epoch before the cache, and
what is random after it:

```python
train = keras_fisher.datasets.load("cifar10", "train")
train = keras_fisher.datasets.normalize(train, "cifar10")
train = train.cache().shuffle(50_000, seed=0)
train = keras_fisher.datasets.augment(train, seed=0)
train = train.batch(128).prefetch(tf.data.AUTOTUNE)
```
"""

from __future__ import annotations

from collections.abc import Sequence
import operator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fisher._common import checks

# Mean and standard deviation of each channel over all pixels of the training
# images, in [0, 1]. Many programs divide by something smaller, the standard
# deviation within an image, averaged over the images.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}

_FILL_MODES = ("constant", "reflect")


def normalize(
    dataset: tf.data.Dataset[Any],
    statistics: str | tuple[Sequence[float], Sequence[float]],
) -> tf.data.Dataset[Any]:
    """Give every channel of the images mean 0 and standard deviation 1.

    Args:
        dataset: A `tf.data.Dataset` of tuples `(x, ...)`, where `x` is one
            floating point image of shape `(height, width, channels)`, or a
            batch of them, with values from 0 to 1 as `load` gives them.
        statistics: `"cifar10"`, `"cifar100"`, `"fashion_mnist"` or
            `"tiny_imagenet"` for those of its training images, or a pair
            `(mean, std)` with one number for each channel.

    Returns:
        A `tf.data.Dataset` with `(x - mean) / std` in place of `x`, of the same
        dtype, and everything else as it was.

    Raises:
        ValueError: If the elements are not as described above, if the name is
            unknown, or if the statistics do not fit the channels.

    Example:
    ```python
    test = keras_fisher.datasets.load("cifar10", "test")
    test = keras_fisher.datasets.normalize(test, "cifar10").batch(256)
    ```
    """
    images = _images_spec(dataset)
    if not images.dtype.is_floating:
        raise ValueError(
            "Images must be floating point, from 0 to 1. Received: "
            f"x={images}. Load them with `keras_fisher.datasets.load`, or "
            "scale them in `dataset.map()`."
        )
    mean, std = _mean_and_std(statistics, images)

    def normalized(x: tf.Tensor, *rest: Any) -> tuple:
        return (x - mean) / std, *rest

    return dataset.map(
        normalized, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


def augment(
    dataset: tf.data.Dataset[Any],
    *,
    padding: int = 4,
    flip: bool = True,
    fill_mode: str = "constant",
    seed: int = 0,
) -> tf.data.Dataset[Any]:
    """Shift images at random, and mirror half of them.

    An image gets a border of `padding` pixels and is cut back to its size at
    a random place, and, with `flip`, mirrored left to right with probability
    one half. Labels, and whatever else an element holds, stay as they are.

    The draws belong to a position in the order of the elements. Each
    iteration over the data set draws anew, from one sequence that `seed`
    fixes: a second program that makes the same passes sees the same images,
    however many are worked on in parallel. As for `tf.data.Dataset.shuffle`,
    the global seed of TensorFlow counts too, where it is set.

    Call it after `cache`, which would keep the draws of the first epoch;
    after `shuffle`, whose buffer then holds no images in the making; after
    `add_label_noise`, which tells examples apart by their content. Every
    image of a batch is drawn for alone as well, but single examples take a
    third less time.

    Args:
        dataset: A `tf.data.Dataset` of tuples `(x, ...)`, where `x` is one
            image of shape `(height, width, channels)`, or a batch of them, of
            any dtype.
        padding: Largest shift in pixels, up, down, left and right. The usual
            value is 4 for images of 32x32 and 8 for images of 64x64.
        flip: Whether to mirror.
        fill_mode: What the border is made of: `"constant"` for zeros, which
            is the mean colour after `normalize` and black without, or
            `"reflect"` for the image, mirrored at its edge.
        seed: Any integer of 64 bits.

    Returns:
        A `tf.data.Dataset` of the same specification and length as `dataset`.

    Raises:
        ValueError: If the elements are not as described above, if `padding`
            is negative or too large to reflect, or if `fill_mode` or `seed` is
            not one of those above.

    Example:
    ```python
    train = keras_fisher.datasets.load("tiny_imagenet", "train")
    train = train.shuffle(10_000, seed=0)
    train = keras_fisher.datasets.augment(train, padding=8).batch(128)
    ```
    """
    images = _images_spec(dataset)
    _check_border(padding, fill_mode, images)
    border = [[padding, padding], [padding, padding], [0, 0]]

    # Not Keras's RandomCrop, which shifts a batch as one, and whose draws
    # depend on which thread is first in a parallel map.
    def augmented_image(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
        size = tf.shape(image)
        image = tf.pad(image, border, fill_mode)
        image = tf.image.stateless_random_crop(image, size, crop_seed)
        if flip:
            image = tf.image.stateless_random_flip_left_right(image, flip_seed)
        return tf.ensure_shape(image, images.shape[-3:])

    def augmented(element: tuple, seed: tf.Tensor) -> tuple:
        x, *rest = element
        if images.shape.rank == 3:
            return augmented_image(x, seed), *rest
        seeds = tf.random.split(seed, tf.shape(x)[0])
        x = tf.map_fn(
            lambda image_and_seed: augmented_image(*image_and_seed),
            (x, seeds),
            fn_output_signature=x.dtype,
        )
        return tf.ensure_shape(x, images.shape), *rest

    return tf.data.Dataset.zip(dataset, _seeds(seed)).map(
        augmented, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


def _seeds(seed: int) -> tf.data.Dataset[Any]:
    """Returns endless seeds for stateless draws, others in each iteration."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ValueError(
            f"`seed` must be an integer. Received: seed={seed!r}."
        ) from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"`seed` must be an integer of 64 bits. Received: seed={seed}."
        )
    draws = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    return draws.batch(2, drop_remainder=True)


def _images_spec(dataset: tf.data.Dataset[Any]) -> tf.TensorSpec:
    """Returns what the images of `dataset` look like."""
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "`dataset` must be a tf.data.Dataset. Received: "
            f"{type(dataset).__name__}. Make arrays into one with "
            "`tf.data.Dataset.from_tensor_slices((x, y))`."
        )
    spec = dataset.element_spec
    images = spec[0] if isinstance(spec, tuple) and spec else None
    if isinstance(images, tf.TensorSpec) and images.shape.rank in (3, 4):
        return images
    raise ValueError(
        "The elements must be tuples (x, ...) with x an image of shape "
        "(height, width, channels) or a batch of them. Received: "
        f"element_spec={spec}. Rearrange them with `dataset.map()`."
    )


def _mean_and_std(
    statistics: Any, images: tf.TensorSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Returns arrays that fit the dtype and the channels of `images`."""
    if isinstance(statistics, str) and statistics not in _STATISTICS:
        raise ValueError(
            f"No statistics of {statistics!r} are known. Received: "
            f"statistics={statistics!r}. Pass one of {list(_STATISTICS)}, or "
            "a pair (mean, std) of its training images."
        )
    if isinstance(statistics, str):
        statistics = _STATISTICS[statistics]
    dtype = images.dtype.as_numpy_dtype
    try:
        mean, std = (np.asarray(value, dtype) for value in statistics)
    except (TypeError, ValueError):
        mean = std = np.asarray(np.nan, dtype)
    fits = mean.shape == std.shape
    fits = fits and images.shape[-1:].is_compatible_with(mean.shape)
    # NaN is greater than nothing.
    if not (fits and np.isfinite(mean).all() and (std > 0).all()):
        raise ValueError(
            "`statistics` must be a name or a pair (mean, std) with one number "
            "for each channel, and every std positive. Received: "
            f"statistics={statistics!r} with x={images}."
        )
    return mean, std


def _check_border(padding: int, fill_mode: str, images: tf.TensorSpec) -> None:
    checks.integer("padding", padding, 0, "of at least 0, in pixels")
    checks.choice("fill_mode", fill_mode, _FILL_MODES)
    smallest = min(side or np.inf for side in images.shape[-3:-1])
    if fill_mode == "reflect" and padding >= smallest:
        raise ValueError(
            "An image is reflected over less than its own size. Received: "
            f"padding={padding} with x={images}. Use fewer pixels, or "
            "fill_mode='constant'."
        )
