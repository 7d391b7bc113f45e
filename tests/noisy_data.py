"""Small data sets with noisy labels."""

import numpy as np
import tensorflow as tf

from keras_fisher.datasets import add_label_noise

RATE = 0.4
CLASSES = 10


def small(count=200, classes=CLASSES):
    """Returns a data set whose example number i is ([i, -i], i % classes)."""
    index = np.arange(count, dtype=np.float32)
    x = np.stack([index, -index], axis=1)
    return tf.data.Dataset.from_tensor_slices((x, np.arange(count) % classes))


def columns(dataset, batched=False):
    """Returns labels, noise flags and true labels as arrays."""
    join = np.concatenate if batched else np.stack
    targets = [target for _, target, *_ in dataset.as_numpy_iterator()]
    return tuple(
        join([target[key] for target in targets])
        for key in ("label", "is_noisy", "true_label")
    )


def add(dataset):
    return add_label_noise(dataset, RATE, CLASSES)
