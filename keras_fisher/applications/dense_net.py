"""DenseNet: densely connected networks for small images."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_fisher._common import checks
from keras_fisher.applications import arguments
from keras_fisher.applications import blocks

_BLOCKS = 3


def DenseNet(
    input_shape: Iterable[int],
    classes: int,
    *,
    depth: int = 40,
    growth_rate: int = 12,
    bottleneck: bool = False,
    reduction: float = 1.0,
    activation: str | Callable | None = None,
    name: str = "dense_net",
) -> keras.Model:
    """Instantiates the DenseNet architecture, for small images.

    The network that the paper trains on CIFAR: a 3x3 convolution, three dense
    blocks, and between two of them a transition, a 1x1 convolution and 2x2
    average pooling; at the end global average pooling and a dense layer. In a
    block, every layer adds `growth_rate` channels to those it received. Batch
    normalization and ReLU come before every convolution but the first. There
    is no dropout. The weights are random.

    `bottleneck=True, reduction=0.5` makes it a DenseNet-BC, whose first
    convolution has twice `growth_rate` filters instead of 16.

    | depth, growth rate | 40, 12 | BC 100, 12 | BC 250, 24 |
    |---|---|---|---|
    | trainable parameters | 1.0M | 0.8M | 15.3M |

    Reference:

    - [Densely Connected Convolutional
      Networks](https://arxiv.org/abs/1608.06993) (CVPR 2017).

    Args:
        input_shape: Shape of one example, `(height, width, channels)`, of at
            least 4x4 pixels. Channels come last, whatever the image data
            format of Keras.
        classes: Number of outputs.
        depth: Number of layers with weights, 3n + 4, or 6n + 4 with
            `bottleneck`.
        growth_rate: Number of channels that a layer adds, the paper's k.
        bottleneck: Whether a 1x1 convolution with four times `growth_rate`
            filters comes before every 3x3 convolution.
        reduction: Share of the channels that a transition keeps, rounded
            down, the paper's θ.
        activation: Activation of the outputs. `None` returns the logits.
        name: Name of the model.

    Returns:
        A functional `keras.Model`.

    Raises:
        ValueError: If `input_shape` has another rank, has an axis that is not
            a positive integer or is too small an image, if `classes` or
            `growth_rate` is not a positive integer, if `depth` is not 3n + 4
            or, with `bottleneck`, 6n + 4, or if `reduction` is not in (0, 1].

    Example:
    ```pycon
    >>> model = keras_fisher.applications.DenseNet(
    ...     (32, 32, 3), 10, depth=100, bottleneck=True, reduction=0.5
    ... )
    >>> model.count_params()  # with the statistics of batch normalization
    793150
    ```
    """
    shape = arguments.checked_shape(input_shape, poolings=_BLOCKS - 1)
    classes = checks.integer("classes", classes, 1)
    layers_per_block = arguments.repetitions(depth, 6 if bottleneck else 3, 4)
    growth_rate = checks.integer("growth_rate", growth_rate, 1)
    reduction = checks.number(
        "reduction",
        reduction,
        lambda share: 0 < share <= 1,
        "a number in (0, 1]",
    )
    is_bc = bottleneck and reduction < 1
    inputs = keras.Input(shape, name="inputs")
    x = blocks.conv(inputs, 2 * growth_rate if is_bc else 16, 3, name="conv")
    for block in range(1, _BLOCKS + 1):
        for index in range(1, layers_per_block + 1):
            x = _layer(
                x, growth_rate, bottleneck, name=f"block{block}_layer{index}"
            )
        if block < _BLOCKS:
            x = _transition(x, reduction, name=f"transition{block}")
    x = blocks.norm_relu(x, name="last")
    outputs = blocks.classify(x, classes, activation)
    return keras.Model(inputs, outputs, name=name)


def _layer(
    x: keras.KerasTensor, growth_rate: int, bottleneck: bool, *, name: str
) -> keras.KerasTensor:
    """Appends new channels to those of `x`."""
    y = x
    if bottleneck:
        y = blocks.norm_relu_conv(
            y, 4 * growth_rate, 1, name=f"{name}_bottleneck"
        )
    y = blocks.norm_relu_conv(y, growth_rate, 3, name=f"{name}_conv")
    return keras.layers.Concatenate(axis=-1, name=f"{name}_concat")([x, y])


def _transition(
    x: keras.KerasTensor, reduction: float, *, name: str
) -> keras.KerasTensor:
    """Halves the image and reduces the number of channels."""
    filters = max(1, int(x.shape[-1] * reduction))
    x = blocks.norm_relu_conv(x, filters, 1, name=f"{name}_conv")
    return keras.layers.AveragePooling2D(
        2, data_format="channels_last", name=f"{name}_pool"
    )(x)
