"""What the networks with batch normalization have in common.

Convolutions are initialized as He et al. (2015) propose, as the authors of all
of them did, and have no bias, since a normalization follows. `name` is the
convolution's: its normalization and ReLU are called after it, whether they
come before or after.
"""

from __future__ import annotations

from collections.abc import Callable

import keras


def conv(
    x: keras.KerasTensor,
    filters: int,
    kernel_size: int,
    strides: int = 1,
    *,
    name: str,
) -> keras.KerasTensor:
    """Convolves around every pixel, or around every second one."""
    padding = "same"
    if strides > 1 and kernel_size > 1:
        # "same" would move the windows off the pixels that shortcuts keep.
        padding = "valid"
        x = keras.layers.ZeroPadding2D(
            kernel_size // 2, data_format="channels_last", name=f"{name}_pad"
        )(x)
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        data_format="channels_last",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)


def norm(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    """Normalizes every channel over the batch."""
    # The constants of Torch, in which the papers' authors published code:
    # with Keras's own, short runs are evaluated on stale statistics.
    return keras.layers.BatchNormalization(
        axis=-1, momentum=0.9, epsilon=1e-5, name=f"{name}_norm"
    )(x)


def norm_relu(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    """Normalizes every channel and drops what is negative."""
    return keras.layers.ReLU(name=f"{name}_relu")(norm(x, name=name))


def norm_relu_conv(
    x: keras.KerasTensor, filters: int, kernel_size: int, *, name: str
) -> keras.KerasTensor:
    """Convolves what is normalized and positive."""
    return conv(norm_relu(x, name=name), filters, kernel_size, name=name)


def classify(
    x: keras.KerasTensor, classes: int, activation: str | Callable | None
) -> keras.KerasTensor:
    """Returns the outputs, from the mean of the features over all pixels."""
    x = keras.layers.GlobalAveragePooling2D(
        data_format="channels_last", name="pool"
    )(x)
    return keras.layers.Dense(
        classes, activation=activation, name="predictions"
    )(x)
