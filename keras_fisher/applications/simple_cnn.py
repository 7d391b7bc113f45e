"""SimpleCNN: small convolutional networks for signals and images."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_fisher._common import checks
from keras_fisher.applications import arguments


def SimpleCNN(
    input_shape: Iterable[int],
    classes: int,
    *,
    activation: str | Callable | None = None,
    name: str = "simple_cnn",
) -> keras.Model:
    """Instantiates the SimpleCNN architecture, for signals or for images.

    The shape of the input decides which network it is:

    - images: two 3x3 convolutions with 32 filters, 2x2 max pooling, two 3x3
      convolutions with 64 filters, 2x2 max pooling, and a hidden dense layer
      of 128 units: the SimpleCNN of the paper;
    - signals: three convolutions with 64 filters, of sizes 5, 3 and 3 and
      stride 2, for quick experiments on MNIST-1D.

    All of them have "same" padding and ReLU, and a dense layer on the
    flattened features gives the outputs. There is neither dropout nor batch
    normalization: the trace of the Fisher Information Matrix belongs to the
    function that the weights define. The weights are random.

    Reference:

    - [Catastrophic Fisher Explosion: Early Phase Fisher Matrix Impacts
      Generalization](https://arxiv.org/abs/2012.14193) (ICML 2021), whose
      experiments name it.
    - [The Break-Even Point on Optimization Trajectories of Deep Neural
      Networks](https://arxiv.org/abs/2002.09572) (ICLR 2020), which
      introduces it, after an example of Keras for CIFAR-10.

    Args:
        input_shape: Shape of one example, `(length, channels)` for signals
            or `(height, width, channels)` for images of at least 4x4 pixels.
            Channels come last, whatever the image data format of Keras.
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
    >>> model = keras_fisher.applications.SimpleCNN((32, 32, 3), classes=10)
    >>> model.count_params()
    591274
    ```
    """
    shape = arguments.checked_shape(input_shape, ranks=(2, 3), poolings=2)
    classes = checks.integer("classes", classes, 1)
    features = _signal_features if len(shape) == 2 else _image_features
    inputs = keras.Input(shape, name="inputs")
    outputs = keras.layers.Dense(
        classes, activation=activation, name="predictions"
    )(features(inputs))
    return keras.Model(inputs, outputs, name=name)


def _signal_features(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features that the network for signals computes."""
    for index, kernel_size in enumerate((5, 3, 3), start=1):
        x = keras.layers.Conv1D(
            64,
            kernel_size,
            strides=2,
            padding="same",
            data_format="channels_last",
            activation="relu",
            name=f"conv{index}",
        )(x)
    return keras.layers.Flatten(data_format="channels_last", name="flatten")(x)


def _image_features(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features that the network for images computes."""
    for block, filters in enumerate((32, 64), start=1):
        for index in (1, 2):
            x = keras.layers.Conv2D(
                filters,
                3,
                padding="same",
                data_format="channels_last",
                activation="relu",
                name=f"block{block}_conv{index}",
            )(x)
        x = keras.layers.MaxPooling2D(
            2, data_format="channels_last", name=f"block{block}_pool"
        )(x)
    x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
    return keras.layers.Dense(128, activation="relu", name="hidden")(x)
