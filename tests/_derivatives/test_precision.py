"""The lowest precision on the way, and how good differences are by it."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import cases
import evaluation
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import GradientPenalty
from keras_fisher._derivatives import way

_DIFFERENCE = GradientPenalty(0.7, method="finite_difference")


class _Case(NamedTuple):
    """A network, in what it computes, and how far a penalty's gradient is off.

    Attributes:
        policy: Of all layers that have none of their own.
        make: Function that returns the layers in front of the head.
        shape: Of an example.
        lowest: The lowest precision on the way.
        error: Most that the gradient may be off, relative to its norm.
        head: The policy of the head, or None.
        lora: Whether the first layer gets two ranks of LoRA.
    """

    policy: str
    make: Callable[[], list]
    shape: tuple
    lowest: str
    error: float
    head: str | None = None
    lora: bool = False


def _dense(own=None):
    return lambda: [
        layers.Dense(7, activation="tanh"),
        layers.Dense(6, activation="tanh", dtype=own),
    ]


def _conv(*between):
    return lambda: [
        layers.Conv2D(4, 3, activation="tanh"),
        *[layer() for layer in between],
    ]


def _batch_norm():
    return [
        layers.Conv2D(4, 3),
        layers.BatchNormalization(),
        layers.Activation("tanh"),
    ]


def _resizing(interpolation):
    return _conv(
        lambda: layers.Resizing(7, 7, interpolation=interpolation),
        lambda: layers.Conv2D(3, 2, activation="tanh"),
    )


def _upsampling(**kwargs):
    return _conv(lambda: layers.UpSampling2D(2, **kwargs))


def _lstm(own=None):
    return lambda: [layers.LSTM(3, dtype=own)]


_IMAGE, _SERIES = (6, 6, 2), (3, 2)
_CASES = {
    "bfloat16": _Case("mixed_bfloat16", _dense(), (5,), "bfloat16", 0.3),
    "bfloat16 below a head": _Case(
        "mixed_bfloat16", _dense(), (5,), "bfloat16", 0.3, "float32"
    ),
    "bfloat16 convolution": _Case(
        "mixed_bfloat16", _conv(), _IMAGE, "bfloat16", 0.4, "float32"
    ),
    "float16": _Case("mixed_float16", _dense(), (5,), "float16", 0.1),
    "float16 below a head": _Case(
        "mixed_float16", _dense(), (5,), "float16", 0.1, "float32"
    ),
    "float16 batch norm": _Case(
        "mixed_float16", _batch_norm, _IMAGE, "float16", 0.15, "float32"
    ),
    "float32": _Case("float32", _dense(), (5,), "float32", 5e-3),
    "float32 loop": _Case("float32", _lstm(), _SERIES, "float32", 5e-3),
    "bilinear": _Case(
        "float64", _resizing("bilinear"), _IMAGE, "float32", 5e-3
    ),
    "bicubic": _Case("float64", _resizing("bicubic"), _IMAGE, "float32", 5e-3),
    "nearest": _Case("float64", _resizing("nearest"), _IMAGE, "float64", 1e-6),
    "upsampling": _Case("float64", _upsampling(), _IMAGE, "float64", 1e-6),
    "bilinear upsampling": _Case(
        *("float64", _upsampling(interpolation="bilinear")),
        *(_IMAGE, "float32", 5e-3),
    ),
    "lora": _Case("float64", _dense(), (5,), "float32", 5e-3, lora=True),
    "float32 inside": _Case(
        "float64", _dense("float32"), (5,), "float32", 5e-3
    ),
    "bfloat16 inside": _Case(
        "float64", _dense("mixed_bfloat16"), (5,), "bfloat16", 0.3
    ),
    "float32 loop inside": _Case(
        "float64", _lstm("float32"), _SERIES, "float32", 5e-3
    ),
    "float64": _Case("float64", _dense(), (5,), "float64", 1e-6),
    "float64 loop": _Case("float64", _lstm(), _SERIES, "float64", 1e-6),
}


def _built(case: _Case):
    """The network with fixed weights, and a batch for it."""
    keras.utils.set_random_seed(1)  # Frozen ones are drawn.
    keras.config.set_dtype_policy(case.policy)
    dtype = keras.config.dtype_policy().compute_dtype
    model = keras.Sequential(
        [
            keras.Input(case.shape, dtype=dtype),
            *case.make(),
            layers.Flatten(),
            layers.Dense(networks.CLASSES, dtype=case.head),
        ]
    )
    if case.lora:
        model.layers[0].enable_lora(2)
    random = np.random.default_rng(7)
    x = random.normal(size=(networks.BATCH, *case.shape)).astype("float32")
    model(x)
    for variable in model.trainable_variables:
        value = 0.5 * random.normal(size=variable.shape)
        variable.assign(value.astype("float32"))
    return model, tf.constant(x, tf.float64)


@functools.cache
def _expected(name: str) -> list:
    """The gradient of the penalty in `float64`, or as near as there is."""
    case = _CASES[name]
    if case.policy != "float64":
        case = case._replace(policy="float64", head=None)
    penalty = GradientPenalty(0.7)
    return evaluation.run("graph", penalty, *_built(case))[2]


@pytest.mark.few(6)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", _CASES)
@pytest.mark.impossible("no kernel", name=["bicubic", "nearest"], mode="xla")
def test_differences_are_as_good_as_the_lowest_precision_allows(name, mode):
    found = evaluation.run(mode, _DIFFERENCE, *_built(_CASES[name]))[2]
    error = evaluation.relative(found, _expected(name))
    assert error < _CASES[name].error, error


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("is_eager", [True, False])
def test_the_lowest_precision_on_the_way(name, is_eager):
    model, x = _built(_CASES[name])
    lowest = _CASES[name].lowest
    if _CASES[name].lora and not cases.has_keras("3.15"):
        lowest = "float64"  # as the policy says; from then on it does not
    assert _found(model, x, is_eager) == lowest


def _found(model, x, is_eager=False, **kwargs) -> str:
    found = []

    def run(x):
        forward = _DIFFERENCE.forward(model, x, **kwargs)
        found.append(forward.way.precision.name)

    if is_eager:
        run(x)
    else:
        tf.function(run, autograph=False).get_concrete_function(x)
    return found[0]


class _Custom(keras.Model):
    """A function between two layers, in double precision."""

    def __init__(self, function, head="float64"):
        super().__init__(dtype="float64", name="custom")
        self.first = layers.Dense(4, dtype="float64")
        self.last = layers.Dense(networks.CLASSES, dtype=head)
        self.function = function

    def build(self, shape):
        self.first.build(shape)
        self.last.build((None, 4))

    def call(self, x):
        return self.last(self.function(self, self.first(x)))


def _rounded(h):
    return tf.cast(tf.cast(h, "float32"), "float64")


_CONTROL = {
    "function": lambda f, h: tf.function(f, autograph=False)(h),
    "compiled": lambda f, h: tf.function(f, jit_compile=True)(h),
    "condition": lambda f, h: tf.cond(
        tf.shape(h)[0] > 3, lambda: f(h), lambda: 2 * h
    ),
    "switch": lambda f, h: tf.switch_case(
        tf.shape(h)[0] % 2, [lambda: f(h), lambda: 2 * h]
    ),
    # What is computed in a turn is used in the next one.
    "loop": lambda f, h: tf.while_loop(
        lambda i, a, b, c: i < 3,
        lambda i, a, b, c: (i + 1, f(b), c, 0.5 * c),
        [tf.constant(0), *[tf.ones([4, 4], h.dtype)] * 2, h],
    )[1],
    "map": lambda f, h: tf.map_fn(f, h),
    "loop in a function": lambda f, h: tf.function(
        lambda h: tf.map_fn(f, h), autograph=False
    )(h),
}


@pytest.mark.parametrize("control", _CONTROL)
@pytest.mark.parametrize("is_eager", [True, False])
def test_functions_and_loops_are_looked_into(control, is_eager):
    x = tf.ones([4, 3], tf.float64)
    for f, expected in ((tf.tanh, "float64"), (_rounded, "float32")):
        model = _Custom(lambda _, h, f=f: _CONTROL[control](f, h))
        model(x)
        assert _found(model, x, is_eager) == expected


def _beside(model, h):
    """Coarse numbers that are not on the way."""
    model.add_loss(tf.reduce_sum(tf.cast(h, "float16")))
    count = tf.cast(tf.shape(h)[0], "float32")
    mask = tf.cast(tf.argmax(h, axis=1), "bfloat16")[:, None] + 1
    noise = tf.random.uniform(tf.shape(h), dtype="float16")
    for each in (1 / count, mask, noise, tf.constant(0.5, "float32")):
        h *= tf.cast(each, h.dtype)
    return h


@pytest.mark.parametrize("is_eager", [True, False])
def test_what_is_beside_the_way_does_not_count(is_eager):
    x = tf.ones([4, 3], tf.float64)
    model = _Custom(_beside)
    model(x)
    assert _found(model, x, is_eager) == "float64"
    # A batch is the start of a way only if it is differentiated by.
    coarse = tf.cast(x, "float16")
    assert _found(model, coarse, is_eager) == "float64"
    found = _found(model, coarse, is_eager, watch_inputs=True)
    assert found == "float16"


def test_spectra_have_the_precision_of_their_parts():
    def spectrum(h):
        return tf.cast(tf.abs(tf.signal.rfft(tf.cast(h, "float32"))), h.dtype)

    x = tf.ones([4, 3], tf.float64)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="float64"),
            layers.Dense(4, dtype="float64"),
            layers.Lambda(spectrum, dtype="float64"),
            layers.Dense(networks.CLASSES, dtype="float64"),
        ]
    )
    assert _found(model, x) == "float32"


def test_code_that_cannot_be_traced_goes_by_its_dtypes():
    def eager_only(_, h):
        return 2 * h if float(tf.reduce_sum(h)) > 0 else h

    x = tf.ones([4, 3], tf.float64)
    model = _Custom(eager_only)
    model(x)
    assert _found(model, x, is_eager=True) == "float64"
    model = _Custom(eager_only, head="float32")
    model(x)
    assert _found(model, x, is_eager=True) == "float32"


def test_it_is_found_where_functions_run_eagerly():
    model, x = _built(_CASES["bilinear"])
    tf.config.run_functions_eagerly(True)
    try:
        assert _found(model, x, is_eager=True) == "float32"
    finally:
        tf.config.run_functions_eagerly(False)


def test_variables_are_found_by_what_reads_them():
    x, found = tf.Variable(tf.ones([], tf.bfloat16)), []

    def read():
        found.append(way.of_graph([x], tf.cast(x, tf.float32)).precision)

    tf.function(read).get_concrete_function()
    assert found == [tf.bfloat16]
