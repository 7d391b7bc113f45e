"""Second derivatives of single layers, compared with differences.

For a layer f with inputs and weights θ, and any cotangent u, let G(θ, u) be the
gradient of ⟨u, f(θ)⟩. Whoever differentiates a gradient again needs two things
of the layer: the derivative of G by θ, which is compared with a central
difference of G, and that by u, in which G is linear, so that

    ⟨∂⟨z, G(θ, u)⟩/∂u, u'⟩ = ⟨z, G(θ, u')⟩.

Kinks, as of ReLU, make G jump; so that no difference goes over many of them,
only a few entries of θ are moved at a time, and most of several comparisons
have to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import second_derivatives

_PROBES = 7
_MOVED = 8  # entries at a time
_ALLOWED = 0.05  # relative error of a right derivative, by differences
_STEPS = {"float64": 1e-5, "float32": 3e-3}


@dataclasses.dataclass(frozen=True)
class LayerDerivatives:
    """How the second derivatives of one layer compare.

    Attributes:
        path: Of the layer.
        verdict: `"exact"`; `"differs"` from differences; `"missing"` if
            TensorFlow has none; `"undecided"` where numbers are too rough to
            tell, as in 16 bits.
        exact: The second derivative in the direction where the two are
            farthest apart, as backpropagation gives it.
        difference: The same by differences.
        reason: What TensorFlow says where there is none.
    """

    path: str
    verdict: str
    exact: float = 0.0
    difference: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.verdict}"
        if self.verdict == "differs":
            text += f" ({self.exact:.3g}, by differences {self.difference:.3g})"
        return f"{text} ({self.reason})" if self.reason else text


def check(
    layer: keras.layers.Layer,
    x: Any,
    chosen: Sequence[keras.Operation],
    training: bool = True,
    examples: int | None = None,
) -> list[LayerDerivatives]:
    """Compares the second derivatives of some layers in a model.

    Changes nothing in it.

    Args:
        layer: The model, built.
        x: Inputs.
        chosen: Layers and operations in it.
        training: The mode of the call.
        examples: How many of the first examples to use; None for all. A
            model that does not take so few, as of a fixed size, gets all.

    Returns:
        One entry for each of `chosen` that is called and through which a
        gradient flows.
    """
    state = keras_layers.snapshot(layer)
    try:
        few = examples_lib.rows(x, 0, examples)
        calls = _recorded_calls(layer, few, chosen, training)
    except Exception:  # Of whatever the model is made of.
        calls = _recorded_calls(layer, x, chosen, training)
    found: dict[int, LayerDerivatives] = {}
    for call in calls:
        key = id(call.operation)
        if key in found and found[key].verdict != "exact":
            continue  # A layer that is shared fails if any of its calls does.
        sources = call.sources()
        if sources:
            function = _function_of(call, state)
            found[key] = _compared(_path(call.operation), function, sources)
    return list(found.values())


def _path(operation: keras.Operation) -> str:
    return getattr(operation, "path", None) or operation.name


# The calls.


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a layer, with the arguments that it got.

    Attributes:
        operation: The layer or operation.
        arguments: Its arguments, by position and by name.
        moving: Which of the tensors in them depend on a variable.
    """

    operation: keras.Operation
    arguments: tuple[tuple, dict]
    moving: list[bool]

    @property
    def variables(self) -> list[keras.Variable]:
        return getattr(self.operation, "trainable_variables", [])

    def sources(self) -> list[tf.Tensor]:
        """What to differentiate by: inputs, then trainable variables."""
        leaves = keras.tree.flatten(self.arguments)
        return [
            *(
                tf.convert_to_tensor(leaf)
                for leaf, moves in zip(leaves, self.moving)
                if moves
            ),
            *(tf.convert_to_tensor(v.value) for v in self.variables),
        ]

    def __call__(self, values: Sequence[tf.Tensor]) -> Any:
        given = iter(values)
        leaves = [
            next(given) if moves else leaf
            for leaf, moves in zip(
                keras.tree.flatten(self.arguments), self.moving
            )
        ]
        args, kwargs = keras.tree.pack_sequence_as(self.arguments, leaves)
        return self.operation(*args, **kwargs)


def _recorded_calls(layer, x, chosen, training) -> list[_Call]:
    variables = [v.value for v in layer.trainable_variables]
    calls: list[tuple] = []
    with tf.GradientTape(persistent=True) as tape, keras.StatelessScope():
        tape.watch(variables)
        with contextlib.ExitStack() as stack:
            for operation in chosen:
                stack.enter_context(_spied_on(operation, calls))
            layer(x, training=training)

    def depends(leaf) -> bool:
        if isinstance(leaf, keras.Variable):
            return any(leaf is v for v in layer.trainable_variables)
        if not _is_floating(leaf):
            return False
        found = tape.gradient(leaf, variables)
        return any(gradient is not None for gradient in found)

    return [
        _Call(
            operation,
            arguments,
            [depends(leaf) for leaf in keras.tree.flatten(arguments)],
        )
        for operation, arguments in calls
    ]


@contextlib.contextmanager
def _spied_on(operation: keras.Operation, calls: list):
    """Notes the calls of a layer; in between, it has a `call` of its own."""
    own = vars(operation).get("call")
    call = operation.call

    def noting(*args, **kwargs):
        calls.append((operation, (args, kwargs)))
        return call(*args, **kwargs)

    operation.call = noting
    try:
        yield
    finally:
        del operation.call
        if own is not None:
            operation.call = own


def _function_of(call: _Call, state: list) -> Callable:
    """The floating outputs of a call, from its sources."""
    count = sum(call.moving)

    def function(values):
        fixed = zip(call.variables, values[count:])
        with (
            keras_layers.FixedScope(fixed, state),
            second_derivatives.exact(),
        ):
            outputs = call(values[:count])
        leaves = [
            tf.convert_to_tensor(leaf)
            if isinstance(leaf, keras.Variable)
            else leaf
            for leaf in keras.tree.flatten(outputs)
        ]
        return [*filter(_is_floating, leaves)]

    return function


def _is_floating(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and leaf.dtype.is_floating


# The comparison.


class _Gradient:
    """G(θ, u) of a function, its derivatives and its differences."""

    def __init__(self, function: Callable, at: list[tf.Tensor]):
        self._function, self.at = function, at
        self._random = np.random.default_rng(0)
        outputs = function(at)
        self.u = [self.normal(y) for y in outputs]
        self.z = [self.normal(t) for t in at]

    def normal(self, like: tf.Tensor) -> tf.Tensor:
        return tf.constant(self._random.normal(size=like.shape), like.dtype)

    def along_z(self, at: list, u: list) -> tf.Tensor:
        """⟨z, G(θ, u)⟩, in double precision."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            outputs = self._function(at)
        gradients = tape.gradient(
            outputs, at, output_gradients=u, unconnected_gradients="zero"
        )
        return _inner(self.z, gradients)

    def noise(self) -> float:
        """How far rounding moves ⟨z, G⟩, about."""
        unit = max(np.finfo(t.dtype.as_numpy_dtype).eps for t in self.at)
        nearby = [t + tf.cast(unit, t.dtype) * t for t in self.at]
        change = self.along_z(nearby, self.u) - self.along_z(self.at, self.u)
        return float(4 * unit * self._size() + 4 * abs(change))

    def _size(self) -> float:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.at)
            outputs = self._function(self.at)
        gradients = tape.gradient(
            outputs,
            self.at,
            output_gradients=self.u,
            unconnected_gradients="zero",
        )
        return float(
            sum(_inner(z * g, z * g) for z, g in zip(self.z, gradients)) ** 0.5
        )

    def derivatives(self) -> tuple[list, list]:
        """Of ⟨z, G⟩, by θ and by u.

        Raises:
            LookupError: If TensorFlow has none.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([self.at, self.u])
            value = self.along_z(self.at, self.u)
        with second_derivatives.complete():
            by_theta, by_u = tape.gradient(
                value, [self.at, self.u], unconnected_gradients="zero"
            )
        return gradients_lib.dense(by_theta), gradients_lib.dense(by_u)

    def difference(self, moved: list, share: float = 1.0) -> float:
        """Of ⟨z, G⟩ along a direction of θ, a share of the way."""
        ahead, behind = (
            self.along_z([t + s * m for t, m in zip(self.at, moved)], self.u)
            for s in (share, -share)
        )
        return float(ahead - behind) / (2 * share)

    def directions(self, derivatives: list) -> list[list]:
        """Where to go from θ: a few entries of one tensor at a time.

        Half of them are among those with the largest derivatives. Zeros stay,
        which activations leave where the next one may have a kink.
        """
        found = []
        for k, (value, derivative) in enumerate(zip(self.at, derivatives)):
            step = _STEPS[value.dtype.name]
            size = float(tf.sqrt(tf.reduce_mean(tf.square(value)))) or 1.0
            count = value.shape.num_elements()
            movable = np.flatnonzero(value)
            movable = movable if movable.size else np.arange(count)
            largest = movable[
                np.argsort(-np.abs(np.ravel(derivative)[movable]))
            ]
            for probe in range(_PROBES):
                entries = self._random.integers(0, largest.size, _MOVED)
                entries = largest[entries // 20 if probe % 2 else entries]
                moved = np.zeros(count)
                moved[entries] = step * size * self._random.normal(size=_MOVED)
                direction = [tf.zeros_like(t) for t in self.at]
                direction[k] = tf.constant(
                    moved.reshape(value.shape), value.dtype
                )
                found.append(direction)
        return found


def _compared(
    path: str, function: Callable, sources: list[tf.Tensor]
) -> LayerDerivatives:
    gradient = _Gradient(function, sources)
    try:
        by_theta, by_u = gradient.derivatives()
    except (LookupError, NotImplementedError) as error:
        return LayerDerivatives(path, "missing", reason=str(error))
    if any(t.dtype.size < 4 for t in (*sources, *gradient.u)):
        return LayerDerivatives(path, "undecided", reason="16 bits")
    groups = [[_of_cotangents(gradient, by_u) for _ in range(_PROBES)]]
    triples = [
        (
            float(_inner(by_theta, direction)),
            gradient.difference(direction),
            gradient.difference(direction, 0.25),
        )
        for direction in gradient.directions(by_theta)
    ]
    # Those of one tensor belong together.
    groups += [
        triples[k : k + _PROBES] for k in range(0, len(triples), _PROBES)
    ]
    return _judged(path, groups, gradient.noise())


def _of_cotangents(gradient: _Gradient, by_u: list) -> tuple:
    other = [gradient.normal(u) for u in gradient.u]
    value = float(gradient.along_z(gradient.at, other))
    return float(_inner(by_u, other)), value, value


def _judged(path: str, groups: list, noise: float) -> LayerDerivatives:
    """The verdict on groups of (exact, difference, that of a smaller step)."""
    worst, decided = None, False
    for triples in groups:
        exact, difference, smaller = np.array(triples).T
        sizes = np.maximum(np.abs(exact), np.abs(difference))
        decided |= bool((sizes > 5 * noise).any())
        wrong = ~(np.abs(exact - difference) <= _ALLOWED * sizes + 5 * noise)
        # Where the two steps disagree there is a kink in between.
        wrong &= np.abs(difference - smaller) <= 0.3 * sizes + 4 * noise
        k = int(np.argmax(wrong * sizes))
        if wrong.sum() > _PROBES / 2 and (
            worst is None or sizes[k] > max(map(abs, worst))
        ):
            worst = float(exact[k]), float(difference[k])
    if worst is not None:
        return LayerDerivatives(path, "differs", *worst)
    return LayerDerivatives(path, "exact" if decided else "undecided")


def _inner(a: list, b: list) -> tf.Tensor:
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(x, tf.float64) * tf.cast(y, tf.float64))
            for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b))
        ]
    )
