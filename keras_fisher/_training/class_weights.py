"""Class weights of labels that carry noise flags, which Keras refuses.

Keras takes targets that are a dictionary for those of several outputs. So the
weights of the classes become those of the examples, as in Keras itself.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import preprocessing
from keras_fisher._common.noisy_targets import LABEL
from keras_fisher._common.noisy_targets import has_noise_flags


def become_sample_weights(
    call: inspect.BoundArguments, output_names: Collection[str]
) -> None:
    """Replaces class weights where targets carry flags; others stay.

    Args:
        call: Arguments of `fit` or `train_on_batch`; changed.
        output_names: As for `has_noise_flags`.

    Raises:
        ValueError: If targets with flags come from a `PyDataset`.
    """
    arguments = call.arguments
    if not arguments.get("class_weight"):
        return
    x, y = arguments.get("x"), arguments.get("y")
    if isinstance(x, tf.data.Dataset):
        _, spec, _ = keras.utils.unpack_x_y_sample_weight(x.element_spec)
        if has_noise_flags(spec, output_names):
            weights = arguments.pop("class_weight")
            arguments["x"] = x.map(
                lambda x, y, given=None: (x, y, _weights(y, weights, given))
            )
    elif isinstance(x, keras.utils.PyDataset):
        _, y, _ = keras.utils.unpack_x_y_sample_weight(x[0])
        if has_noise_flags(y, output_names):
            raise ValueError(
                "`class_weight` does not reach labels with noise flags in a "
                f"`PyDataset`. Received: {type(x).__name__} with y of the keys "
                f"{[*y]}. Return `(x, y, sample_weight)` from it instead."
            )
    elif has_noise_flags(y, output_names):
        weights = arguments.pop("class_weight")
        given = arguments.pop("sample_weight", None)
        share = arguments.pop("validation_split", 0.0)
        if share and arguments.get("validation_data") is None:
            # What is held out is not weighted.
            (x, y, given), held_out = preprocessing.split((x, y, given), share)
            arguments["validation_data"] = held_out
        arguments["x"], arguments["y"] = x, y
        arguments["sample_weight"] = _weights(y, weights, given).numpy()


def _weights(y: Any, class_weight: Mapping[int, float], given: Any):
    """Weights of examples, by their labels: integers, or one-hot."""
    label = tf.convert_to_tensor(y[LABEL])
    if label.shape.rank > 1:
        is_one_hot = label.shape[-1] != 1
        label = tf.argmax(label, -1) if is_one_hot else label[..., 0]
    index = tf.cast(label, tf.int32)
    # A class that is not named has weight 1, and is the last here.
    last = 1 + max(class_weight)
    table = [float(class_weight.get(k, 1.0)) for k in range(last)] + [1.0]
    is_named = (index >= 0) & (index < last)
    found = tf.gather(tf.constant(table), tf.where(is_named, index, last))
    return found if given is None else found * tf.cast(given, found.dtype)
