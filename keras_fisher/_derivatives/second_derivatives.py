"""Second derivatives where TensorFlow's own are wrong, missing or slow.

Functions that Keras layers are made of, and what is put in their place:

| function | what is wrong with its second derivative |
|---|---|
| `tf.nn.max_pool` under XLA | only in `float32`, and eight bits of each value |
| `tf.nn.max_pool` that keeps the shape | zero in a graph, see `max_pooling` |
| `tf.nn.moments` | a term is missing |
| `tf.nn.softsign` | there is none |
| `tf.image.resize` | there is none, or it counts as zero |
| `tf.slice` under XLA | there is none |
| `tf.nn.convolution` | slow without XLA, see `convolutions` |

All are replaced while a forward pass is recorded, and only then, each by a
function that can be differentiated any number of times. It decides when it is
called whether this is for XLA: threads may trace for both at once. Keras has no
public way to do this: this module is the one that reaches into TensorFlow, and
its tests fail if that stops working.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import threading
from types import ModuleType

import tensorflow as tf

# TensorFlow has no public way to ask for its gradients, and what it compiles
# for and runs on.
from tensorflow.python.framework import ops as framework_ops
from tensorflow.python.ops import control_flow_util
from tensorflow.python.util import _pywrap_util_port

from keras_fisher._derivatives import convolutions
from keras_fisher._derivatives import linear_maps
from keras_fisher._derivatives import max_pooling


@contextlib.contextmanager
def exact():
    """Context for a forward pass that will be differentiated twice."""
    with contextlib.ExitStack() as stack:
        for replacement in _REPLACEMENTS:
            stack.enter_context(replacement)
        yield


@contextlib.contextmanager
def complete():
    """Context of a second backward pass, in which nothing may get lost.

    Some gradients of operations are registered in TensorFlow as not
    differentiable, as those of fake quantization and of the addition of sparse
    tensors. Tapes take that for constant, and leave them out in silence.

    Raises:
        LookupError: If there is such an operation, as for one that has no
            second derivative at all.
    """
    with _COMPLETE:
        yield


def _complete_lookup(registry, name):
    """`lookup` of TensorFlow's registry, which finds all gradients or fails."""
    found = _LOOKUP(registry, name)
    if (
        found is None
        and registry is framework_ops.gradient_registry
        and "Grad" in name
        and name != "StopGradient"  # which is constant on purpose
    ):
        raise LookupError(
            f"The gradient operation {name} is registered as not "
            f"differentiable{_places_of(name)}."
        )
    return found


def _places_of(kind: str) -> str:
    """Where in the model a kind of operation stands, if a graph tells."""
    if tf.executing_eagerly():
        return ""
    names = [
        operation.name.removeprefix("gradient_tape/").rpartition("/")[0]
        for operation in tf.compat.v1.get_default_graph().get_operations()
        if operation.type == kind
    ]
    return f", in {', '.join(sorted(set(names)))}" if names else ""


@contextlib.contextmanager
def explained():
    """Context of a second backward pass that says what its errors mean.

    Raises:
        ValueError: If a layer has no second derivative.
    """
    try:
        with complete():
            yield
    except (LookupError, NotImplementedError) as error:
        # The latter may come from a layer of the user's.
        is_own = isinstance(error, NotImplementedError)
        if is_own and "recompute_grad" not in str(error):
            raise
        raise ValueError(
            "A layer has no second derivative, which "
            '`method="exact"` needs. Give the penalty '
            '`method="finite_difference"`, which works with any layer (and '
            "well with smooth ones, and with others in `float64`) but "
            "those that `tf.recompute_grad` is around: for these, use "
            "`keras_fisher.layers.Rematerialization` instead. "
            f"(TensorFlow says: {error})"
        ) from error


def compiles() -> bool:
    """Whether this is traced for XLA."""
    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and (
        control_flow_util.GraphOrParentsInXlaContext(graph)
    )


def _runs_on_eigen() -> bool:
    """Whether that is what computes convolutions, if XLA does not."""
    return not (
        _pywrap_util_port.IsMklEnabled()
        or tf.config.list_logical_devices("GPU")
    )


def _moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, with the variance a function of the mean."""
    del shift  # of no effect in TensorFlow either
    with tf.name_scope(name or "moments"):
        x = tf.convert_to_tensor(x)
        precise = tf.cast(x, tf.float32) if x.dtype.size < 4 else x
        mean = tf.reduce_mean(precise, axes, keepdims=True)
        variance = tf.reduce_mean(
            tf.math.squared_difference(precise, mean), axes, keepdims=True
        )
        if not keepdims:
            mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _softsign(features, name=None):
    """`tf.nn.softsign`, differentiable wherever |x| is."""
    x = tf.convert_to_tensor(features)
    return tf.divide(x, 1 + tf.abs(x), name=name)


class _Replacement:
    """Context that replaces a function, in any number of threads.

    Args:
        module: Where the function is, or a class that it is a method of.
        name: What it is called there.
        function: What to call instead.
    """

    def __init__(
        self, module: ModuleType | type, name: str, function: Callable
    ):
        self._module, self._name, self._function = module, name, function
        self._lock = threading.Lock()
        self._entered = 0
        self._original = None

    def __enter__(self):
        with self._lock:
            if self._entered == 0:
                self._original = getattr(self._module, self._name)
                setattr(self._module, self._name, self._function)
            self._entered += 1

    def __exit__(self, *_):
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                setattr(self._module, self._name, self._original)


def _either(
    condition: Callable[[], bool], function: Callable, otherwise: Callable
) -> Callable:
    """A function that is one or another by what holds when it is called."""

    @functools.wraps(otherwise)
    def chosen(*args, **kwargs):
        called = function if condition() else otherwise
        return called(*args, **kwargs)

    return chosen


def _pool(name: str) -> _Replacement:
    pool = getattr(tf.nn, name)
    for_xla = max_pooling.exact_for_xla(pool)
    function = _either(compiles, for_xla, max_pooling.exact(pool))
    return _Replacement(tf.nn, name, function)


def _slice() -> _Replacement:
    function = _either(compiles, linear_maps.slices(tf.slice), tf.slice)
    return _Replacement(tf, "slice", function)


def _convolution() -> _Replacement:
    function = _either(
        lambda: _runs_on_eigen() and not compiles(),
        convolutions.convolution,
        tf.nn.convolution,
    )
    return _Replacement(tf.nn, "convolution", function)


# One of each for all threads, so that the last to leave puts back what was
# there before the first came.
_REPLACEMENTS = [
    _Replacement(tf.nn, "moments", _moments),
    _Replacement(tf.nn, "softsign", _softsign),
    _Replacement(tf.nn, "pool", max_pooling.by_max_pool(tf.nn.pool)),
    _Replacement(tf.image, "resize", linear_maps.resize(tf.image.resize)),
    *map(_pool, ["max_pool", "max_pool1d", "max_pool2d", "max_pool3d"]),
    _slice(),
    _convolution(),
]
_REGISTRY = type(framework_ops.gradient_registry)
_LOOKUP = _REGISTRY.lookup
_COMPLETE = _Replacement(_REGISTRY, "lookup", _complete_lookup)
