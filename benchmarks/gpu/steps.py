"""The steps that are exported: networks, sides, and plans of the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import dataclasses
import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from workers import networks
from workers import sides

import keras_fisher
from keras_fisher._measuring import fisher_trace
from keras_fisher._training import schedule
from keras_fisher.applications import ResNet
from keras_fisher.applications import WideResNet
from keras_fisher.likelihoods.lookup import of_model

PLAIN = sides.PLAIN
TRACE = "fisher_trace"
_KINDS = {
    schedule.NOTHING: "measured",
    schedule.FRESH: "fresh",
    schedule.REUSED: "reused",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with the batches that it is timed and checked on.

    Attributes:
        build: Makes the `keras.Model`, with logits.
        input_shape: Of one example.
        classes: Number of labels.
        timed, checked: Examples in a batch on a GPU, and where values are
            compared.
        vocabulary: Number of tokens, if inputs are tokens.
    """

    build: Callable[[], keras.Model]
    input_shape: tuple[int, ...]
    classes: int
    timed: int
    checked: int
    vocabulary: int | None = None

    def specs(self, batch_size: int) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        """Of the inputs and of the labels."""
        dtype = tf.float32 if self.vocabulary is None else tf.int32
        return (
            tf.TensorSpec((batch_size, *self.input_shape), dtype),
            tf.TensorSpec((batch_size,), tf.int32),
        )

    def makes(self) -> list[dict[str, Any]]:
        """How to make the inputs and the labels."""
        numbers = {"kind": "uniform", "mean": 0.0, "std": 1.0}
        tokens = {"kind": "integers", "bound": self.vocabulary}
        return [
            numbers if self.vocabulary is None else tokens,
            {"kind": "integers", "bound": self.classes},
        ]


def _of_workers(name: str, timed: int, checked: int = 8, **kwargs) -> Network:
    found = networks.find(name)
    return Network(found.build, found.input_shape, 10, timed, checked, **kwargs)


def _resnet50() -> keras.Model:
    return keras.applications.ResNet50(weights=None, classifier_activation=None)


def _wide_resnet() -> keras.Model:
    return WideResNet((32, 32, 3), 10, depth=16, widen_factor=8)


NETWORKS = {
    "SimpleCNN": _of_workers("SimpleCNN 32x32x3", 128),
    "VGG11": _of_workers("VGG11 32x32x3", 256),
    "ResNet-50": Network(_resnet50, (224, 224, 3), 1000, 128, 4),
    "WideResNet-16-8": Network(_wide_resnet, (32, 32, 3), 10, 256, 4),
    "Transformer": _of_workers(
        "Transformer 64 tokens", 512, vocabulary=networks.VOCABULARY
    ),
    "MLP": _of_workers("MLP 784-512-512-512-10", 512),
}
# Those that do not fill a large card, with batches that do.
LARGE = {
    f"{name}, large": dataclasses.replace(NETWORKS[name], timed=size)
    for name, size in [("SimpleCNN", 4096), ("VGG11", 2048), ("MLP", 16384)]
}
PRECISIONS = ("float32", "mixed_bfloat16", "float64")
_WANTED = (
    *(PLAIN, "FP every 1", "FP every 10", "FP fraction 1/8"),
    *("FP bounded", "FP finite difference", "GP", "FP 4 micro-batches"),
    *("trace every 10", TRACE),
)
# What this version of the library has of it; what people use most is first.
SIDES = tuple(s for s in _WANTED if s in (*sides.NAMES, TRACE))
# What `train.py` trains.
EVALUATION = "evaluation"
_HAS_BOUND = "bound" in inspect.signature(keras_fisher.FisherPenalty).parameters
_UNBOUNDED = {"bound": None} if _HAS_BOUND else {}
_TRAINED_SIDES = {
    "no penalty": dict(trace_every=10),
    "FP 0.1": dict(penalty=keras_fisher.FisherPenalty(0.1, **_UNBOUNDED)),
    "FP 1": dict(penalty=keras_fisher.FisherPenalty(1.0, **_UNBOUNDED)),
}
if _HAS_BOUND:
    _TRAINED_SIDES["FP bounded"] = dict(penalty=keras_fisher.FisherPenalty(1.0))
TRAINED_SIDES = (*_TRAINED_SIDES, EVALUATION)
_FASHION = (28, 28, 1)
TRAINED = {
    "ResNet-20": Network(lambda: ResNet(_FASHION, 10), _FASHION, 10, 128, 4),
    "WideResNet-16-4": Network(
        lambda: WideResNet(_FASHION, 10), _FASHION, 10, 128, 4
    ),
}


@dataclasses.dataclass
class Step:
    """A function to be exported.

    Attributes:
        function: A `tf.function` that XLA compiles.
        reference: The same, not compiled.
        names: Of the variables that it may use, by `id` of the handle.
        share: How many of the steps of a side are this one.
    """

    function: Callable
    reference: Callable
    names: dict[int, str]
    share: float


def compiled_model(
    network: Network, side: str, batch_size: int, precision: str
) -> keras.Model:
    """The model of a side, ready for `fit`.

    Args:
        network: What to train.
        side: Name of the side.
        batch_size: Examples in a batch.
        precision: Dtype policy.
    """
    keras.backend.clear_session()
    # Which that forgets.
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(0)
    model = network.build()
    if side in _TRAINED_SIDES:
        arguments = _TRAINED_SIDES[side]
    elif side in (TRACE, EVALUATION):
        arguments = None
    else:
        arguments = sides.arguments(side, batch_size)
    if arguments is not None:
        model = keras_fisher.FisherModel(model, seed=0, **arguments)
    model.compile(
        keras.optimizers.SGD(0.001, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def steps(
    network: Network, side: str, batch_size: int, precision: str
) -> dict[str, Step]:
    """The steps of a side, by what they do.

    Args:
        network: What to train.
        side: Name of the side.
        batch_size: Examples in a batch.
        precision: Dtype policy.
    """
    model = compiled_model(network, side, batch_size, precision)
    if side == TRACE:
        return {"compiled function": _trace(network, model, batch_size)}
    if side == EVALUATION:

        def evaluate(x, y):
            return model(x, training=False), y

        return {"outputs": _step(evaluate, model, 1.0)}
    if side == PLAIN:

        def plain(x, y):
            return model.train_step((x, y))

        return {"plain": _step(plain, model, 1.0)}
    period, counts = 10, Counter()
    for number in range(period):
        model._schedule.choose(lambda plan: counts.update([plan]), number)

    def planned(plan):
        return lambda x, y: model._planned_step((x, y), None, plan)

    return {
        "plain" if plan.is_plain else _KINDS[plan.penalize]: _step(
            planned(plan), model, count / period
        )
        for plan, count in counts.items()
    }


def _step(function: Callable, model: keras.Model, share: float) -> Step:
    # As `_training.train_function` and Keras do.
    return Step(
        tf.function(
            function, jit_compile=True, reduce_retracing=True, autograph=False
        ),
        tf.function(function, reduce_retracing=True, autograph=False),
        _names(model),
        share,
    )


def _trace(network: Network, model: keras.Model, batch_size: int) -> Step:
    """The function that `fisher_trace` compiles."""
    x, _ = network.specs(batch_size)
    example = tf.zeros(x.shape, x.dtype)
    function, reference = (
        _compiled_trace(model, example, jit) for jit in (True, False)
    )
    return Step(function, reference, _names(model), 1.0)


def _compiled_trace(model: keras.Model, x: tf.Tensor, jit: bool) -> Callable:
    model.jit_compile = jit
    measure = fisher_trace._Measure(
        model, of_model("auto", model), "monte_carlo", False
    )
    # Looks at layers with real inputs; a few do as well.
    measure._inspect(x[:2])
    measure._recorder(x[:2], 1, True)
    found = measure._compiled(x, 1, True)

    def traced(x, seed, position):
        return found(x, None, seed, position)

    function = tf.function(traced, jit_compile=jit, autograph=False)
    # Refers to the model weakly itself.
    function.model = model
    return function


def _names(model: keras.Model) -> dict[int, str]:
    """Names of variables by handle, the same for every side."""
    base = getattr(model, "model", model)
    named = [(f"model {i}", v) for i, v in enumerate(base.variables)]
    named += [
        (f"optimizer {i} {v.path.rpartition('_')[2]}", v)
        for i, v in enumerate(model.optimizer.variables)
    ]
    state = getattr(model, "state", None)
    named += [(v.name, v) for v in (state.weights if state else [])]
    return {id(v.value.handle): name for name, v in named}


def batch(network: Network, batch_size: int) -> list[dict[str, Any]]:
    """Arguments of a step that are the batch."""
    return [
        {
            "name": f"{name} {batch_size}",
            "shape": list(spec.shape),
            "dtype": spec.dtype.name,
            "make": make,
            "role": "batch",
        }
        for name, spec, make in zip(
            ["x", "y"], network.specs(batch_size), network.makes()
        )
    ]


def arguments(
    network: Network, side: str, batch_size: int
) -> list[dict[str, Any]]:
    """Descriptions of what a step is called with."""
    x, y = batch(network, batch_size)
    if side != TRACE:
        return [x, y]
    seed = {"kind": "values", "values": [0, 0]}
    position = {"kind": "constant", "value": 0}
    drawn = {"dtype": "int64", "role": "batch"}
    return [
        x,
        {"name": "seed", "shape": [2], "make": seed, **drawn},
        {"name": "position", "shape": [], "make": position, **drawn},
    ]


def value_of(variable: tf.Variable, name: str) -> np.ndarray:
    """What a variable begins with; a stored gradient as if it were one."""
    value = variable.numpy()
    if name.startswith("gradient_"):
        width = 1e-3 * np.random.default_rng(0).normal(size=value.shape)
        return width.astype(value.dtype)
    return value
