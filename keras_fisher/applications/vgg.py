"""VGG11: eight convolutions and no normalization, for small images."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_fisher._common import checks
from keras_fisher.applications import arguments

# The filters of the convolutions between one max pooling and the next.
_BLOCKS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def VGG11(
    input_shape: Iterable[int],
    classes: int,
    *,
    activation: str | Callable | None = None,
    name: str = "vgg11",
) -> keras.Model:
    """Instantiates the VGG11 architecture, for small images.

    Eight 3x3 convolutions with "same" padding and ReLU, of 64, 128, 256, 256,
    512, 512, 512 and 512 filters, with 2x2 max pooling after the first,
    second, fourth, sixth and eighth: configuration A of the paper. Its three
    dense layers, made for images of 224x224 pixels, are one here, on the
    flattened features, as is usual for CIFAR.

    There is neither dropout nor batch normalization: the trace of the Fisher
    Information Matrix belongs to the function that the weights define. The
    weights are random, by Glorot's rule, which the paper found to suffice. With
    He's, the trace would be thousands of times as large before training.

    Reference:

    - [Very Deep Convolutional Networks for Large-Scale Image
      Recognition](https://arxiv.org/abs/1409.1556) (ICLR 2015).

    Args:
        input_shape: Shape of one example, `(height, width, channels)`, of at
            least 32x32 pixels. Channels come last, whatever the image data
            format of Keras.
        classes: Number of outputs.
        activation: Activation of the outputs. `None` returns the logits.
        name: Name of the model.

    Returns:
        A functional `keras.Model`.

    Raises:
        ValueError: If `input_shape` has another rank, has an axis that is not
            a positive integer or is too small an image, or if `classes` is
            not a positive integer.

    Example:
    ```pycon
    >>> model = keras_fisher.applications.VGG11((32, 32, 3), classes=10)
    >>> model.count_params()
    9225610
    ```
    """
    shape = arguments.checked_shape(input_shape, poolings=len(_BLOCKS))
    classes = checks.integer("classes", classes, 1)
    inputs = x = keras.Input(shape, name="inputs")
    for block, convolutions in enumerate(_BLOCKS, start=1):
        for index, filters in enumerate(convolutions, start=1):
            x = keras.layers.Conv2D(
                filters,
                3,
                padding="same",
                data_format="channels_last",
                activation="relu",
                kernel_initializer="glorot_uniform",
                name=f"block{block}_conv{index}",
            )(x)
        x = keras.layers.MaxPooling2D(
            2, data_format="channels_last", name=f"block{block}_pool"
        )(x)
    x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
    outputs = keras.layers.Dense(
        classes, activation=activation, name="predictions"
    )(x)
    return keras.Model(inputs, outputs, name=name)
