"""All that a traced function has taken from a model, to be compared later.

TensorFlow traces a function of a model once. Values of variables are read
each time it runs; everything else of the model (activations, rates,
regularizers, dtypes, which variables there are) is as it was then. A
fingerprint says what that was. It holds numbers by value and objects by weak
references, so that it keeps nothing alive.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from typing import Any
import weakref

import keras
import numpy as np
import tensorflow as tf

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, np.generic),
    *(tf.DType, tf.TensorShape, types.BuiltinFunctionType),
)
# What these refer to has no end, and no part in a forward pass.
_CLOSED = (
    *(keras.metrics.Metric, keras.optimizers.Optimizer),
    *(keras.callbacks.Callback, types.ModuleType, type),
)
_CLOSED_PACKAGES = {*sys.stdlib_module_names, "tensorflow", "numpy", "h5py"}
_OPEN_STANDARD_TYPES = (types.SimpleNamespace,)
# What `fit`, `evaluate` and `predict` leave on a model.
_SET_BY_FIT = frozenset(
    ("_eval_epoch_iterator", "history", "stop_evaluating", "stop_predicting")
)


def fingerprint(*things: Any) -> list:
    """What things are made of now.

    Args:
        *things: Models, layers, losses, functions, or anything in them.

    Returns:
        A list that is equal to another one as long as nothing was changed but
        the values of variables.
    """
    walk = _Walk()
    for thing in things:
        walk.visit(thing)
    settings = (
        keras.config.floatx(),
        keras.config.epsilon(),
        keras.config.image_data_format(),
    )
    return [settings, *walk.found]


class _Same:
    """Is equal to another one of the same object, while that lives."""

    def __init__(self, thing: Any):
        self._reference = weakref.ref(thing)

    def __eq__(self, other) -> bool:
        thing = self._reference()
        return (
            isinstance(other, _Same)
            and thing is not None
            and thing is other._reference()
        )


class _Walk:
    """Visits all that can be reached from a thing, each object once."""

    def __init__(self):
        self.found: list = []
        self._numbers: dict[int, int] = {}
        # As long as the walk lasts, no other object may get the same id.
        self._visited: list = []

    def visit(self, thing: Any) -> None:
        if isinstance(thing, _PLAIN):
            self.found.append((type(thing).__name__, repr(thing)))
            return
        number = self._numbers.setdefault(id(thing), len(self._numbers))
        if number < len(self._visited):
            self.found.append(("again", number))
            return
        self._visited.append(thing)
        self._visit_object(thing)

    def _visit_object(self, thing: Any) -> None:
        if isinstance(thing, dict):
            self._visit_all("dict", [x for item in thing.items() for x in item])
        elif isinstance(thing, (list, tuple)):
            self._visit_all("list", thing)
        elif isinstance(thing, (set, frozenset)):
            self._visit_all("set", sorted(thing, key=repr))
        elif isinstance(thing, np.ndarray):
            digest = hashlib.sha256(np.ascontiguousarray(thing)).hexdigest()
            self.found.append((str(thing.dtype), thing.shape, digest))
        elif isinstance(thing, keras.KerasTensor) or _is_symbolic(thing):
            # Left by a trace; the next one leaves others.
            self.found.append("symbolic")
        elif isinstance(thing, keras.Variable):
            self._identify(thing)
            self._visit_all(thing.dtype, [thing.trainable, thing.regularizer])
        elif isinstance(thing, types.MethodType):
            self._visit_all("method", [thing.__func__, thing.__self__])
        elif isinstance(thing, types.FunctionType):
            self._identify(thing.__code__)
            self._visit_all(
                "function",
                [
                    thing.__defaults__,
                    thing.__kwdefaults__,
                    [_content(cell) for cell in thing.__closure__ or ()],
                ],
            )
        elif isinstance(thing, functools.partial):
            self._visit_all("partial", [thing.func, thing.args, thing.keywords])
        elif isinstance(thing, keras.layers.Layer):
            self._visit_layer(thing)
        elif _is_closed(thing):
            self._identify(thing)
        else:
            self._identify(type(thing))
            self.visit(_attributes(thing))

    def _visit_all(self, kind: str, things: Any) -> None:
        self.found.append((kind, len(things)))
        for thing in things:
            self.visit(thing)

    def _visit_layer(self, layer: keras.layers.Layer) -> None:
        # The class too: it may be assigned.
        self._identify(layer)
        self._identify(type(layer))
        self._visit_all(
            "layer",
            [
                layer.dtype_policy,
                layer.activity_regularizer,
                layer.autocast,
                layer.variables,
                layer.trainable_variables,
                getattr(layer, "layers", None),
            ],
        )
        self.visit(
            {
                name: value
                for name, value in _attributes(layer).items()
                if name not in _names_of_keras()
            }
        )

    def _identify(self, thing: Any) -> None:
        try:
            self.found.append(_Same(thing))
        except TypeError:
            # No weak reference to it exists; a type of its own is at least
            # compared.
            self.found.append(type(thing).__qualname__)


def _is_symbolic(thing: Any) -> bool:
    return tf.is_symbolic_tensor(thing)


def _is_closed(thing: Any) -> bool:
    if isinstance(thing, _OPEN_STANDARD_TYPES):
        return False
    package = type(thing).__module__.partition(".")[0]
    return isinstance(thing, _CLOSED) or package in _CLOSED_PACKAGES


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is empty.
        return None


def _attributes(thing: Any) -> dict[str, Any]:
    """All attributes of an object, also those in slots, that are not None.

    Layers may set some to None as they are called first.
    """
    found = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                found[name] = getattr(thing, name)
    return {k: value for k, value in found.items() if value is not None}


@functools.cache
def _names_of_keras() -> frozenset[str]:
    """Attributes that Keras gives to every layer and model.

    What matters of them has a public name. The rest counts calls, tracks
    objects, and belongs to training.
    """
    # Named, so that Keras does not count them among those of the user.
    x = keras.Input((1,), name="x")
    layer = keras.layers.Layer(name="layer")
    sequential = keras.Sequential([x, layer], name="sequential")
    y = keras.layers.Identity(name="identity")(x)
    functional = keras.Model(x, y, name="functional")
    for model in (sequential, functional):
        model.compile(keras.optimizers.SGD(name="sgd"), "mse")
    things = (keras.layers.Layer(name="other"), sequential, functional)
    names = frozenset(name for thing in things for name in vars(thing))
    return names | _SET_BY_FIT
