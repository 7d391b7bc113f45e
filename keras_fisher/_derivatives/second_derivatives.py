"""Exact second derivatives where TensorFlow's own are not, and faster ones.

Three operations that Keras layers are made of have a wrong second derivative:

* Max pooling under XLA, whose kernel for the gradient of its gradient exists
  in `float32` alone and keeps eight bits of each value. Here the first
  gradient is written so that its own gradient needs no special kernel: it is
  linear in what comes from above, with the places of the maxima as constants.
  TensorFlow reads a replaced gradient from the graph, which `tf.gradients`
  does and tapes do not; hence `needs_graph_gradients`. Without XLA,
  TensorFlow's own kernels are exact, and several times faster, but for
* Max pooling that keeps the shape, in a graph; see `max_pooling`.
* Moments (batch and group normalization). `tf.nn.moments` holds the mean
  constant in the variance. That leaves the first derivative as it is, since
  Σ (x - mean) = 0, but drops a term of the second.

A fourth, the convolution, is replaced by one with faster derivatives where
there are any, see `convolutions`.

All are replaced while a forward pass is recorded, and only then. Keras has
no public way to do this: this module is the one that reaches into TensorFlow,
and its tests fail if that stops working.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import itertools
import threading

import tensorflow as tf

# TensorFlow has no public way to ask what it compiles for and runs on.
from tensorflow.python.ops import control_flow_util
from tensorflow.python.util import _pywrap_util_port

from keras_fisher._derivatives import convolutions
from keras_fisher._derivatives import max_pooling

_GRADIENT = "KerasFisherMaxPool"
_POOLS = ("MaxPool", "MaxPool3D")
# Differentiating one of these on the graph rewrites it behind the back of the
# tapes that have recorded it, so that second derivatives come out wrong.
_REWRITTEN = (
    "While",
    "StatelessWhile",
    "If",
    "StatelessIf",
    "Case",
    "StatelessCase",
    "PartitionedCall",
    "StatefulPartitionedCall",
)


@contextlib.contextmanager
def exact():
    """Context for a forward pass that will be differentiated twice."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exact_moments)
        if not compiles():
            for pool in _exact_pools:
                stack.enter_context(pool)
            if _runs_on_eigen():
                stack.enter_context(_fast_convolutions)
        else:
            graph = tf.compat.v1.get_default_graph()
            stack.enter_context(
                graph.gradient_override_map(dict.fromkeys(_POOLS, _GRADIENT))
            )
        yield


@contextlib.contextmanager
def explained():
    """Context of a second backward pass that says what its errors mean.

    Raises:
        ValueError: If a layer has no second derivative.
    """
    try:
        yield
    except (LookupError, NotImplementedError) as error:
        # The latter may come from a layer of the user's.
        is_own = isinstance(error, NotImplementedError)
        if is_own and "recompute_grad" not in str(error):
            raise
        raise ValueError(
            "A layer has no second derivative, which "
            '`method="exact"` needs. Give the penalty '
            '`method="finite_difference"`, which works with any layer but '
            "those that `tf.recompute_grad` is around: for these, use "
            "`keras_fisher.layers.Rematerialization` instead. "
            f"(TensorFlow says: {error})"
        ) from error


def needs_graph_gradients(outputs: tf.Tensor) -> bool:
    """Whether `tf.gradients` has to be used, and can be.

    Args:
        outputs: Tensor that was computed within `exact()`.
    """
    if (
        not compiles()
        or _has_many_replicas()
        # Seen from the body of a loop, `outputs` has no ancestors.
        or outputs.graph is not tf.compat.v1.get_default_graph()
    ):
        return False
    kinds = _kinds_of_ancestors(outputs.op)
    return not kinds.isdisjoint(_POOLS) and kinds.isdisjoint(_REWRITTEN)


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


def _has_many_replicas() -> bool:
    return tf.distribute.get_strategy().num_replicas_in_sync > 1


def _kinds_of_ancestors(operation: tf.Operation) -> set[str]:
    seen, waiting = {operation.name}, [operation]
    kinds = set()
    while waiting:
        current = waiting.pop()
        kinds.add(current.type)
        for tensor in current.inputs:
            if tensor.op.name not in seen:
                seen.add(tensor.op.name)
                waiting.append(tensor.op)
    return kinds


@tf.RegisterGradient(_GRADIENT)
def _max_pool_gradient(operation: tf.Operation, gradient: tf.Tensor):
    """Sends each gradient to the first maximum of its window."""
    inputs, outputs = operation.inputs[0], operation.outputs[0]
    window = operation.get_attr("ksize")
    strides = operation.get_attr("strides")
    padding = operation.get_attr("padding").decode()
    input_shape, output_shape = tf.shape(inputs), tf.shape(outputs)

    if padding == "SAME":
        paddings = max_pooling.same_paddings(input_shape, window, strides)
    else:
        paddings = tf.zeros([len(window), 2], tf.int32)
    padded = tf.pad(inputs, paddings, constant_values=inputs.dtype.min)
    padded_shape = tf.shape(padded)

    def end(offset):
        return offset + (output_shape - 1) * strides + 1

    def corner(offset):
        """The same corner of every window."""
        values = tf.strided_slice(padded, offset, end(offset), strides)
        return tf.ensure_shape(values, outputs.shape)

    offsets = list(itertools.product(*map(range, window)))
    # Corners are compared with each other, not with the outputs: a compiler
    # may compute these again with another rounding, and nothing would match.
    largest = corner(offsets[0])
    winner = tf.zeros_like(outputs, tf.int32)
    for k, offset in enumerate(offsets[1:], start=1):
        values = corner(offset)
        better = values > largest
        winner = tf.where(better, k, winner)
        largest = tf.where(better, values, largest)

    parts = [
        tf.raw_ops.StridedSliceGrad(
            shape=padded_shape,
            begin=tf.constant(offset),
            end=end(offset),
            strides=tf.constant(strides),
            dy=tf.where(winner == k, gradient, tf.zeros_like(gradient)),
        )
        for k, offset in enumerate(offsets)
    ]
    result = tf.slice(tf.add_n(parts), paddings[:, 0], input_shape)
    return tf.ensure_shape(result, inputs.shape)


def _moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, with the variance a function of the mean."""
    del shift  # of no effect in TensorFlow either
    with tf.name_scope(name or "moments"):
        precise = tf.cast(x, tf.float32) if x.dtype.size < 4 else x
        mean = tf.reduce_mean(precise, axes, keepdims=True)
        variance = tf.reduce_mean(
            tf.math.squared_difference(precise, mean), axes, keepdims=True
        )
        if not keepdims:
            mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


class _Replacement:
    """Context that replaces a function of `tf.nn`, in any number of threads."""

    def __init__(self, name: str, function: Callable):
        self._name, self._function = name, function
        self._lock = threading.Lock()
        self._entered = 0
        self._original = None

    def __enter__(self):
        with self._lock:
            if self._entered == 0:
                self._original = getattr(tf.nn, self._name)
                setattr(tf.nn, self._name, self._function)
            self._entered += 1

    def __exit__(self, *_):
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                setattr(tf.nn, self._name, self._original)


_exact_moments = _Replacement("moments", _moments)
_exact_pools = [
    _Replacement(name, max_pooling.exact(getattr(tf.nn, name)))
    for name in ("max_pool", "max_pool1d", "max_pool2d", "max_pool3d")
]
_fast_convolutions = _Replacement("convolution", convolutions.convolution)
