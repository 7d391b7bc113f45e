"""What the example scripts share: data and networks."""

from __future__ import annotations

import keras
import tensorflow as tf

import keras_fisher

MODELS = ("simple_cnn", "mlp")


def load_data(
    name: str,
    batch_size: int,
    *,
    label_noise: float = 0.0,
    seed: int = 0,
) -> tuple[tf.data.Dataset, tf.data.Dataset, int]:
    """Loads the training and the test set of a data set, batched.

    Args:
        name: `"mnist1d"`, `"digits"`, or any TFDS name with a `"train"` and a
            `"test"` split.
        batch_size: Number of examples in a batch.
        label_noise: Share of training labels to draw anew.
        seed: Seed of the noise and of the order.

    Returns:
        The training set, shuffled each epoch; the test set; the number of
        classes.
    """
    train, info = keras_fisher.datasets.load(name, "train", with_info=True)
    test = keras_fisher.datasets.load(name, "test")
    classes = info.features["label"].num_classes
    if label_noise:
        train = keras_fisher.datasets.add_label_noise(
            train, label_noise, classes, seed
        )
    size = info.splits["train"].num_examples
    train = train.cache().shuffle(min(size, 50_000), seed=seed)
    return (
        # A smaller last batch would be penalized more: alpha acts as alpha/B.
        train.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE),
        test.batch(batch_size).cache().prefetch(tf.data.AUTOTUNE),
        classes,
    )


def build_network(
    name: str, input_shape: tuple[int, ...], classes: int
) -> keras.Model:
    """Builds one of `MODELS`, with logits as outputs."""
    if name == "simple_cnn":
        return keras_fisher.applications.SimpleCNN(input_shape, classes)
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(classes),
        ],
        name="mlp",
    )
