"""The hyperparameters of a run, collected without asking."""

from __future__ import annotations

from collections.abc import Mapping
import numbers
from typing import Any

import keras

from keras_fisher._common import keras_layers

# What callbacks and users change while a run trains.
MOVING = ("learning_rate", "alpha")

_OF_AVERAGING = ("use_ema", "ema_momentum", "ema_overwrite_frequency")


def of(model: keras.Model, batch_size: int | None = None) -> dict[str, Any]:
    """Hyperparameters of the model, its penalty and its optimizer.

    Args:
        model: A compiled `FisherModel`.
        batch_size: Number of examples in a batch, if known.

    Returns:
        Numbers, booleans and strings by name: `learning_rate`, `batch_size`,
        `alpha` (0 without a penalty), `penalty` and its other arguments,
        `optimizer` and its other arguments, `model`, `parameters` (of a
        network that is built),
        `loss_function` and `loss_weights`, of several outputs by their names,
        `precision`, `trace_every`, `seed`.
    """
    network = model.model
    weights = keras_layers.loss_weights(model)
    found = {
        "model": network.name,
        # Layers that were never called have none yet.
        "parameters": network.count_params() if network.built else None,
        "precision": network.dtype_policy.name,
        "loss_function": _name(model.loss),
        "loss_weights": None if weights is None else _name(weights),
        "trace_every": model.trace_every,
        "seed": model.seed,
        "batch_size": batch_size,
        **_of_optimizer(model.optimizer),
        "penalty": "none",
        "alpha": 0.0,
    }
    if model.penalty is not None:
        found |= model.penalty.get_config()
        found["penalty"] = model.penalty.name
    return simple(found)


def without_moving(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that stay what they were when the run began."""
    return {key: value for key, value in values.items() if key not in MOVING}


def has(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether those that are wanted were written so; others do not count."""
    return all(written.get(name) == wanted[name] for name in wanted)


def as_begun(
    found: Mapping[str, Any], written: Mapping[str, Any]
) -> dict[str, Any]:
    """Those that may have moved, as they were written when the run began.

    Args:
        found: Hyperparameters as they are.
        written: As they were; of another run, or none, where others differ.
    """
    source = written if has(written, without_moving(found)) else found
    return {name: source[name] for name in MOVING if name in source}


def simple(values: Mapping[str, Any]) -> dict[str, Any]:
    """As the HParams page takes them, without those that are not set."""
    return {
        key: _simple(value)
        for key, value in values.items()
        if value is not None and not (isinstance(value, list) and not value)
    }


def _of_optimizer(optimizer) -> dict[str, Any]:
    # Mixed precision puts another around it.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    config = optimizer.get_config()
    config.pop("name", None)
    if not config.get("use_ema"):
        for key in _OF_AVERAGING:
            config.pop(key, None)
    return {"optimizer": type(optimizer).__name__, **config}


def _name(thing: Any) -> str:
    """The name of a loss, a weight as text; of several, by their outputs."""
    if thing is None:
        return "none"
    if isinstance(thing, (str, numbers.Real)):
        return str(thing)
    if isinstance(thing, Mapping):
        named = sorted(thing.items())
        return ", ".join(f"{output}: {_name(own)}" for output, own in named)
    if isinstance(thing, (list, tuple)):
        return ", ".join(map(_name, thing))
    return getattr(thing, "name", None) or getattr(
        thing, "__name__", type(thing).__name__
    )


def _simple(value: Any) -> bool | float | str:
    if getattr(value, "shape", None) == ():  # a scalar, whoever's it is
        value = keras.ops.convert_to_numpy(value).item()
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, dict) and "class_name" in value:
        return value["class_name"]  # a learning-rate schedule
    return str(value)
