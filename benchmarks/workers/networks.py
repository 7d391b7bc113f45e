"""The networks that steps are measured on, in Keras.

`steps_torch.py` has the same in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import keras
from keras import layers
import numpy as np

from keras_fisher.applications import SimpleCNN

VOCABULARY, WIDTH = 1000, 64


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with the batch that it trains on.

    Attributes:
        build: Makes the `keras.Model`, with logits of 10 classes.
        input_shape: Of one example.
        batch_size: Examples in a step.
        jit: Whether XLA makes it faster on CPUs.
        steps: Steps in a turn, about half a second, or more if a side asks
            for them.
        has_tokens: Whether inputs are tokens, not numbers.
    """

    build: Callable[[], keras.Model]
    input_shape: tuple[int, ...]
    batch_size: int
    jit: bool
    steps: int
    has_tokens: bool = False

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs and labels, the same in every process."""
        random = np.random.default_rng(0)
        size = (self.batch_size, *self.input_shape)
        if self.has_tokens:
            x = random.integers(0, VOCABULARY, size=size)
        else:
            x = random.normal(size=size).astype("float32")
        return x, random.integers(0, 10, size=self.batch_size)


def mlp(sizes=(784, 512, 512, 512), classes: int = 10) -> keras.Model:
    """Dense layers with ReLU."""
    inputs = x = keras.Input([sizes[0]])
    for size in sizes[1:]:
        x = layers.Dense(size, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def vgg11() -> keras.Model:
    """VGG11 for 32x32 pixels, without batch normalization."""
    inputs = x = keras.Input([32, 32, 3])
    for filters, count in [(64, 1), (128, 1), (256, 2), (512, 2), (512, 2)]:
        for _ in range(count):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def resnet14() -> keras.Model:
    """A residual network of 14 layers, with batch normalization."""

    def normalized(x, filters, size, strides=1):
        x = layers.Conv2D(
            filters, size, strides, padding="same", use_bias=False
        )(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input([32, 32, 3])
    x = layers.ReLU()(normalized(inputs, 16, 3))
    for filters, first in [(16, 1), (32, 2), (64, 2)]:
        for strides in (first, 1):
            short = x
            if x.shape[-1] != filters:
                short = normalized(x, filters, 1, strides)
            x = layers.ReLU()(normalized(x, filters, 3, strides))
            x = layers.ReLU()(layers.Add()([short, normalized(x, filters, 3)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


class _Positions(layers.Layer):
    """Adds an embedding of the position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="positions")

    def call(self, x):
        return x + self.table


def transformer() -> keras.Model:
    """Two blocks of an encoder, normalized before each part."""
    inputs = keras.Input([64], dtype="int32")
    x = _Positions()(layers.Embedding(VOCABULARY, WIDTH)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, WIDTH // 4)(y, y)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * WIDTH, activation="relu")(y)
        x = x + layers.Dense(WIDTH)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


NETWORKS = {
    "SimpleCNN 40x1": Network(
        lambda: SimpleCNN((40, 1), 10), (40, 1), 128, True, 124
    ),
    "SimpleCNN 32x32x3": Network(
        lambda: SimpleCNN((32, 32, 3), 10), (32, 32, 3), 128, False, 8
    ),
    "VGG11 32x32x3": Network(vgg11, (32, 32, 3), 64, False, 2),
    "ResNet-14 32x32x3": Network(resnet14, (32, 32, 3), 64, False, 6),
    "MLP 784-512-512-512-10": Network(mlp, (784,), 256, True, 62),
    "Transformer 64 tokens": Network(transformer, (64,), 32, True, 24, True),
}


def sized(batch: int, width: int, depth: int, classes: int) -> str:
    """Name of a network of dense layers, for `find`."""
    return f"MLP {batch} {width} {depth} {classes}"


def find(name: str) -> Network:
    """The network with a name, of `NETWORKS` or from `sized`."""
    if name in NETWORKS:
        return NETWORKS[name]
    batch, width, depth, classes = map(int, name.split()[1:])
    return Network(
        lambda: mlp([width] * (depth + 1), classes), (width,), batch, True, 1
    )
