"""ResNet: residual networks for small images."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_fisher._common import checks
from keras_fisher.applications import arguments
from keras_fisher.applications import blocks

_STAGES = (16, 32, 64)


def ResNet(
    input_shape: Iterable[int],
    classes: int,
    *,
    depth: int = 20,
    activation: str | Callable | None = None,
    name: str = "resnet",
) -> keras.Model:
    """Instantiates the ResNet architecture, for small images.

    The network that the paper trains on CIFAR-10: a 3x3 convolution, three
    stages of n residual blocks with 16, 32 and 64 filters, global average
    pooling and a dense layer. A block is two 3x3 convolutions with batch
    normalization; the first one of the second and third stage has stride 2.

    Shortcuts have no parameters (option A of the paper): where the shape
    changes they keep every second pixel and add channels of zeros. The
    weights are random.

    | depth | 20 | 32 | 44 | 56 | 110 |
    |---|---|---|---|---|---|
    | trainable parameters | 0.27M | 0.46M | 0.66M | 0.85M | 1.7M |

    Reference:

    - [Deep Residual Learning for Image
      Recognition](https://arxiv.org/abs/1512.03385) (CVPR 2016).

    Args:
        input_shape: Shape of one example, `(height, width, channels)`.
            Channels come last, whatever the image data format of Keras.
        classes: Number of outputs.
        depth: Number of layers with weights, 6n + 2.
        activation: Activation of the outputs. `None` returns the logits.
        name: Name of the model.

    Returns:
        A functional `keras.Model`.

    Raises:
        ValueError: If `input_shape` has another rank or has an axis that is
            not a positive integer, if `classes` is not a positive integer, or
            if `depth` is not 6n + 2.

    Example:
    ```pycon
    >>> model = keras_fisher.applications.ResNet((32, 32, 3), classes=10)
    >>> model.count_params()  # with the statistics of batch normalization
    271098
    ```
    """
    shape = arguments.checked_shape(input_shape)
    classes = checks.integer("classes", classes, 1)
    blocks_per_stage = arguments.repetitions(depth, 6, 2)
    inputs = keras.Input(shape, name="inputs")
    x = blocks.conv(inputs, _STAGES[0], 3, name="conv")
    x = blocks.norm_relu(x, name="conv")
    for stage, filters in enumerate(_STAGES, start=1):
        for block in range(1, blocks_per_stage + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = _block(x, filters, strides, name=f"stage{stage}_block{block}")
    outputs = blocks.classify(x, classes, activation)
    return keras.Model(inputs, outputs, name=name)


def _block(
    x: keras.KerasTensor, filters: int, strides: int, *, name: str
) -> keras.KerasTensor:
    """Adds what two convolutions make of `x` to it."""
    y = blocks.conv(x, filters, 3, strides, name=f"{name}_conv1")
    y = blocks.norm_relu(y, name=f"{name}_conv1")
    y = blocks.conv(y, filters, 3, name=f"{name}_conv2")
    y = blocks.norm(y, name=f"{name}_conv2")
    if strides > 1:
        x = _shortcut(x, filters, strides, name=f"{name}_shortcut")
    y = keras.layers.Add(name=f"{name}_add")([x, y])
    return keras.layers.ReLU(name=f"{name}_relu")(y)


def _shortcut(
    x: keras.KerasTensor, filters: int, strides: int, *, name: str
) -> keras.KerasTensor:
    """Keeps some of the pixels, and adds channels of zeros."""
    x = keras.layers.AveragePooling2D(
        1, strides, data_format="channels_last", name=f"{name}_pool"
    )(x)
    # The layer pads the last two axes of what it takes for channels first:
    # here those are the columns, with nothing, and the channels.
    return keras.layers.ZeroPadding2D(
        ((0, 0), (0, filters - x.shape[-1])),
        data_format="channels_first",
        name=f"{name}_pad",
    )(x)
