"""Methods that take data, for networks that preprocess theirs first."""

from __future__ import annotations

from collections.abc import Callable
import functools
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import preprocessing


def _taking_raw_data(name: str, prepare: Callable) -> Callable:
    """A method of `keras.Model` whose arguments are prepared before.

    Args:
        name: Of the method.
        prepare: Function of the model and a dictionary of the arguments by
            their names, which it changes.
    """
    method = getattr(keras.Model, name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if preprocessing.of_model(self.model) is None:
            return method(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        before = self._prepared  # `fit` calls `evaluate`
        try:
            prepare(self, bound.arguments)
            return method(*bound.args, **bound.kwargs)
        finally:
            self._prepared = before

    return wrapper


def _take(arguments: dict[str, Any]) -> tuple:
    """What of the arguments the preprocessing decides on."""
    names = ("x", "y", "sample_weight", "batch_size")
    return tuple(arguments.pop(name, None) for name in names)


def _prepare_fit(model: RawData, arguments: dict[str, Any]) -> None:
    share = arguments.pop("validation_split", 0.0)
    validation = arguments.get("validation_data")
    x, y, sample_weight, batch_size = _take(arguments)
    if share and validation is None:
        (x, y, sample_weight), validation = preprocessing.split(
            (x, y, sample_weight), share
        )
    arguments["x"] = preprocessing.preprocessed(
        model.model, x, y, sample_weight, batch_size
    )
    arguments["shuffle"] = False  # which Keras does to arrays alone
    if validation is None:
        return
    if not isinstance(validation, tf.data.Dataset):
        validation = keras.utils.unpack_x_y_sample_weight(validation)
    else:
        validation = (validation,)
    size = arguments.pop("validation_batch_size", None) or batch_size
    # Keras hands it to `evaluate`, as it is.
    arguments["validation_data"] = preprocessing.preprocessed(
        model.model, *validation, batch_size=size
    )
    model._prepared = arguments["validation_data"]


def _prepare_batches(model: RawData, arguments: dict[str, Any]) -> None:
    x = arguments.get("x")
    if x is None or x is not model._prepared:
        arguments["x"] = preprocessing.preprocessed(
            model.model, *_take(arguments)
        )


def _prepare_batch(model: RawData, arguments: dict[str, Any]) -> None:
    x, y, sample_weight, _ = _take(arguments)
    data = preprocessing.of_model(model.model)(x, y, sample_weight)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    arguments["x"] = x
    if y is not None:
        arguments["y"] = y
    if sample_weight is not None:
        arguments["sample_weight"] = sample_weight


class RawData(keras.Model):
    """Takes what its `model` takes, which may be data to be preprocessed."""

    _prepared: Any = None  # validation data that are preprocessed already

    @property
    def preprocess_samples(self) -> Callable | None:
        """What the wrapped model does to its data; None if nothing."""
        return preprocessing.of_model(self.model)

    fit = _taking_raw_data("fit", _prepare_fit)
    evaluate = _taking_raw_data("evaluate", _prepare_batches)
    predict = _taking_raw_data("predict", _prepare_batches)
    train_on_batch = _taking_raw_data("train_on_batch", _prepare_batch)
    test_on_batch = _taking_raw_data("test_on_batch", _prepare_batch)
    predict_on_batch = _taking_raw_data("predict_on_batch", _prepare_batch)
