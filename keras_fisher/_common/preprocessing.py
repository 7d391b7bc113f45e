"""What a model does to its data before it computes with them.

Tasks of KerasHub take images of any size, or strings: their `fit`, `evaluate`
and `predict` map the public `preprocess_samples(x, y, sample_weight)` over the
data. Whatever else calls the model has to do so as well.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import examples


def of_model(model: Any) -> Callable | None:
    """`preprocess_samples` of a model, if it has one."""
    found = getattr(model, "preprocess_samples", None)
    return found if callable(found) else None


def preprocessed(
    model: Any,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
) -> tf.data.Dataset:
    """Batches of what a model that preprocesses its data computes with.

    Args:
        model: A model with `preprocess_samples`.
        x: Tensors or arrays of examples, or a `tf.data.Dataset` of batches.
        y: Labels, unless they are in the data set.
        sample_weight: Likewise.
        batch_size: Examples in a batch, unless `x` is a data set; 32 by
            default.

    Raises:
        ValueError: If `x` is neither.
    """
    if not isinstance(x, tf.data.Dataset):
        if isinstance(x, (Iterator, keras.utils.PyDataset)):
            raise ValueError(
                f"{type(model).__name__} preprocesses its data, which takes "
                "arrays or a `tf.data.Dataset`. Received: "
                f"x of type {type(x).__name__}. Preprocess it yourself, and "
                "set `preprocessor = None`."
            )
        data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        x = tf.data.Dataset.from_tensor_slices(data).batch(batch_size or 32)
    return x.map(of_model(model), num_parallel_calls=tf.data.AUTOTUNE).prefetch(
        tf.data.AUTOTUNE
    )


def split(data: Any, share: float) -> tuple[Any, Any]:
    """The first examples, and the last share of them, as Keras divides them.

    Args:
        data: Structures of tensors or arrays, of equal lengths, or None.
        share: Of the examples in the second part, between 0 and 1.

    Raises:
        ValueError: If one part has no example, or if the data are others.
    """
    leaves = examples.tensors(data)
    others = {type(x).__name__ for x in leaves if not hasattr(x, "shape")}
    if others:
        raise ValueError(
            "`validation_split` takes arrays and tensors. Received: leaves of "
            f"type {', '.join(sorted(others))}. Convert them by `np.asarray`, "
            "or give `validation_data`."
        )
    number = len(leaves[0])
    begin = int(number * (1 - share))
    if not 0 < begin < number:
        raise ValueError(
            "`validation_split` has to leave examples to train on, and to "
            f"validate on. Received: validation_split={share} of {number} "
            "examples."
        )
    return examples.rows(data, 0, begin), examples.rows(data, begin, None)
