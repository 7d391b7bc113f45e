"""WideResNet: wide residual networks for small images."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_fisher._common import checks
from keras_fisher.applications import arguments
from keras_fisher.applications import blocks

_STAGES = (16, 32, 64)


def WideResNet(
    input_shape: Iterable[int],
    classes: int,
    *,
    depth: int = 16,
    widen_factor: int = 4,
    dropout: float = 0.0,
    activation: str | Callable | None = None,
    name: str = "wide_resnet",
) -> keras.Model:
    """Instantiates the WideResNet architecture, for small images.

    A 3x3 convolution with 16 filters, three stages of n residual blocks with
    16, 32 and 64 filters times `widen_factor`, batch normalization, ReLU,
    global average pooling and a dense layer. A block is twice batch
    normalization, ReLU and a 3x3 convolution; the first one of the second and
    third stage has stride 2. Where the number of channels changes, a 1x1
    convolution makes the shortcut. The weights are random.

    | depth-width | 40-4 | 16-8 | 28-10 |
    |---|---|---|---|
    | trainable parameters | 8.9M | 11.0M | 36.5M |

    Reference:

    - [Wide Residual Networks](https://arxiv.org/abs/1605.07146) (BMVC 2016).

    Args:
        input_shape: Shape of one example, `(height, width, channels)`.
            Channels come last, whatever the image data format of Keras.
        classes: Number of outputs.
        depth: Number of convolutions, 6n + 4, with one shortcut in a stage.
        widen_factor: How many times as many filters as in a ResNet.
        dropout: Share of the features that are dropped between the two
            convolutions of a block, in training. 0 leaves the layers out.
        activation: Activation of the outputs. `None` returns the logits.
        name: Name of the model.

    Returns:
        A functional `keras.Model`.

    Raises:
        ValueError: If `input_shape` has another rank or has an axis that is
            not a positive integer, if `classes` or `widen_factor` is not a
            positive integer, if `depth` is not 6n + 4, or if `dropout` is not
            in [0, 1).

    Example:
    ```pycon
    >>> model = keras_fisher.applications.WideResNet(
    ...     (32, 32, 3), classes=10, depth=28, widen_factor=10
    ... )
    >>> model.count_params()  # with the statistics of batch normalization
    36497146
    ```
    """
    shape = arguments.checked_shape(input_shape)
    classes = checks.integer("classes", classes, 1)
    blocks_per_stage = arguments.repetitions(depth, 6, 4)
    widen_factor = checks.integer("widen_factor", widen_factor, 1)
    dropout = checks.number(
        "dropout", dropout, lambda share: 0 <= share < 1, "a number in [0, 1)"
    )
    inputs = keras.Input(shape, name="inputs")
    x = blocks.conv(inputs, _STAGES[0], 3, name="conv")
    for stage, filters in enumerate(_STAGES, start=1):
        for block in range(1, blocks_per_stage + 1):
            x = _block(
                x,
                filters * widen_factor,
                2 if stage > 1 and block == 1 else 1,
                dropout,
                name=f"stage{stage}_block{block}",
            )
    x = blocks.norm_relu(x, name="last")
    outputs = blocks.classify(x, classes, activation)
    return keras.Model(inputs, outputs, name=name)


def _block(
    x: keras.KerasTensor,
    filters: int,
    strides: int,
    dropout: float,
    *,
    name: str,
) -> keras.KerasTensor:
    """Adds what two convolutions make of `x` to it, or to its projection."""
    y = blocks.norm_relu(x, name=f"{name}_conv1")
    if x.shape[-1] != filters:
        x = blocks.conv(y, filters, 1, strides, name=f"{name}_shortcut")
    y = blocks.conv(y, filters, 3, strides, name=f"{name}_conv1")
    y = blocks.norm_relu(y, name=f"{name}_conv2")
    if dropout:
        y = keras.layers.Dropout(dropout, name=f"{name}_dropout")(y)
    y = blocks.conv(y, filters, 3, name=f"{name}_conv2")
    return keras.layers.Add(name=f"{name}_add")([x, y])
