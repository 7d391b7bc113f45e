"""Second derivatives of single layers, compared with differences.

For a layer f with inputs and weights θ, and any cotangent u, let G(θ, u) be the
gradient of ⟨u, f(θ)⟩. Whoever differentiates a gradient again needs two things
of the layer: the derivative of G by θ, which is compared with a central
difference of G, and that by u, in which G is linear, so that

    ⟨∂⟨z, G(θ, u)⟩/∂u, u'⟩ = ⟨z, G(θ, u')⟩.

Kinks, as of ReLU, make G jump; so that no difference goes over many of them,
only a few entries of θ are moved at a time, and most of several comparisons
have to fail, in the same way on each part of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import layer_calls
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives import way

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
            tell, as in 16 bits, or the layer failed.
        exact: The second derivative in the direction where the two are
            farthest apart, as backpropagation gives it.
        difference: The same by differences.
        reason: What TensorFlow says where there is none, or where it failed.
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
    repeats: bool = True,
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
        repeats: Whether to look at a layer that does the same as one before,
            as each block of a transformer does.

    Returns:
        One entry for each of `chosen` that is called and through which a
        gradient flows.
    """
    state = keras_layers.snapshot(layer)
    try:
        few = examples_lib.rows(x, 0, examples)
        calls = layer_calls.record(layer, few, chosen, training)
    except Exception:  # Of whatever the model is made of.
        calls = layer_calls.record(layer, x, chosen, training)
    found: dict[int, LayerDerivatives] = {}
    kinds = set()
    for call in calls:
        key = id(call.operation)
        if key in found and found[key].verdict != "exact":
            continue  # A layer that is shared fails if any of its calls does.
        if not repeats:
            kind = call.kind()
            if kind in kinds:
                continue
            kinds.add(kind)
        compared = _looked_at(call, state)
        if compared is not None:
            found[key] = compared
    return list(found.values())


def _looked_at(
    call: layer_calls.LayerCall, state: list
) -> LayerDerivatives | None:
    """What is found of a call; None if no gradient flows through it."""
    path, sources = _path(call.operation), call.sources()
    if not sources:
        return None
    try:
        gradient = _Gradient(_function_of(call, state), sources)
        return _compared(path, gradient) if gradient.flows() else None
    except Exception as error:  # Which should not end a training.
        reason = f"{type(error).__name__}: {error}"
        return LayerDerivatives(path, "undecided", reason=reason)


def _path(operation: keras.Operation) -> str:
    return getattr(operation, "path", None) or operation.name


def _function_of(call: layer_calls.LayerCall, state: list) -> Callable:
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
        return [*filter(layer_calls.is_floating, leaves)]

    return function


# The comparison.


class _Gradient:
    """G(θ, u) of a function, its derivatives and its differences."""

    def __init__(self, function: Callable, at: list[tf.Tensor]):
        self._function, self.at = function, at
        self._random = np.random.default_rng(0)
        outputs = function(at)
        self.u = [self.normal(y) for y in outputs]
        self.z = [self.normal(t) for t in at]
        # The coarsest dtype in it, which need be none of its tensors'.
        self.precision = max(
            (t.dtype for t in (*self.at, *self.u)), key=dtypes.rounding_unit
        )
        self._fast_along_z = self._traced()

    def normal(self, like: tf.Tensor) -> tf.Tensor:
        return tf.constant(self._random.normal(size=like.shape), like.dtype)

    def along_z(self, at: list, u: list) -> tf.Tensor:
        """⟨z, G(θ, u)⟩, in double precision."""
        return _inner(self.z, self._gradients(at, u))

    def flows(self) -> bool:
        """Whether G is of anything: not of integers, nor past a stop."""
        return bool(self.u) and any(
            g is not None for g in self._gradients(self.at, self.u, "none")
        )

    def _gradients(self, at: list, u: list, unconnected: str = "zero") -> list:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            outputs = self._function(at)
        return tape.gradient(
            outputs, at, output_gradients=u, unconnected_gradients=unconnected
        )

    def _traced(self) -> Callable:
        """`along_z` as a graph, which is many times as fast, if it can be."""
        traced = tf.function(self.along_z, autograph=False)
        try:
            graph = traced.get_concrete_function(self.at, self.u)
            traced(self.at, self.u)
        except Exception:  # Whatever a layer does that graphs do not.
            return self.along_z
        sources = graph.inputs[: len(self.at)]
        inside = way.of_graph(sources, graph.outputs).precision
        self.precision = max(self.precision, inside, key=dtypes.rounding_unit)
        return traced

    def noise(self) -> float:
        """How far rounding moves ⟨z, G⟩, about."""
        unit = dtypes.rounding_unit(self.precision)
        nearby = [t + tf.cast(unit, t.dtype) * t for t in self.at]
        here, there = (
            self._fast_along_z(at, self.u) for at in (self.at, nearby)
        )
        return float(4 * unit * self._size() + 4 * abs(there - here))

    def _size(self) -> float:
        gradients = self._gradients(self.at, self.u)
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

    def on_the_way(self, moved: list, shares: Iterable[float]) -> list[float]:
        """⟨z, G⟩ where θ has been moved by shares of a direction."""
        return [
            float(
                self._fast_along_z(
                    [t + s * m for t, m in zip(self.at, moved)], self.u
                )
            )
            for s in shares
        ]

    def of_cotangent(self, by_u: list) -> tuple[float, float]:
        """The derivative along a random u, in two ways."""
        other = [self.normal(u) for u in self.u]
        value = float(self._fast_along_z(self.at, other))
        return float(_inner(by_u, other)), value

    def directions(self, derivatives: list) -> Iterator[Iterator[list]]:
        """Where to go from θ: a few entries of one tensor at a time.

        Half of them are among those with the largest derivatives. Zeros stay,
        which activations leave where the next one may have a kink.
        """
        for k, (value, derivative) in enumerate(zip(self.at, derivatives)):
            if value.shape.num_elements():
                yield self._directions_of(k, value, derivative)

    def _directions_of(self, k, value, derivative) -> Iterator[list]:
        step = _STEPS[self.precision.name]
        count = value.shape.num_elements()
        movable = np.flatnonzero(value)
        # Of a normal distribution about its deviation, and not of what masks
        # have put in, -1e9 for example.
        sizes = np.abs(np.ravel(value)[movable])
        size = 3 * np.quantile(sizes, 0.25) if sizes.size else 1.0
        movable = movable if movable.size else np.arange(count)
        largest = movable[np.argsort(-np.abs(np.ravel(derivative)[movable]))]
        for probe in range(_PROBES):
            entries = self._random.integers(0, largest.size, _MOVED)
            entries = largest[entries // 20 if probe % 2 else entries]
            moved = np.zeros(count)
            moved[entries] = step * size * self._random.normal(size=_MOVED)
            direction = [tf.zeros_like(t) for t in self.at]
            direction[k] = tf.constant(moved.reshape(value.shape), value.dtype)
            yield direction


def _compared(path: str, gradient: _Gradient) -> LayerDerivatives:
    try:
        by_theta, by_u = gradient.derivatives()
    except (LookupError, NotImplementedError) as error:
        return LayerDerivatives(path, "missing", reason=str(error))
    if gradient.precision.size < 4:
        return LayerDerivatives(path, "undecided", reason="16 bits")
    noise = gradient.noise()

    def of_cotangents():
        for _ in range(_PROBES):
            exact, value = gradient.of_cotangent(by_u)
            yield _Probe(exact, value, list)  # which is linear in u

    def along(directions):
        for moved in directions:
            behind, ahead = gradient.on_the_way(moved, (-1, 1))
            yield _Probe(
                float(_inner(by_theta, moved)),
                (ahead - behind) / 2,
                functools.partial(slopes, moved, behind, ahead),
            )

    def slopes(moved, behind, ahead):
        near = gradient.on_the_way(moved, (-0.25, 0.25))
        values = [behind, *near, ahead]
        return np.diff(values) / np.diff([-1, -0.25, 0.25, 1])

    groups = [_Group.of(of_cotangents(), noise)]
    groups += [
        _Group.of(along(each), noise) for each in gradient.directions(by_theta)
    ]
    worst = max((g.worst for g in groups if g.worst), default=None)
    if worst is not None:
        return LayerDerivatives(path, "differs", *worst[1:])
    decided = any(group.is_decided for group in groups)
    return LayerDerivatives(path, "exact" if decided else "undecided")


class _Probe(NamedTuple):
    """A derivative by backpropagation, and by differences.

    Attributes:
        exact: By backpropagation.
        difference: By a difference.
        slopes: Gives those on parts of the way, and is not called unless it
            has to be.
    """

    exact: float
    difference: float
    slopes: Callable[[], Sequence[float]]

    @property
    def size(self) -> float:
        return max(abs(self.exact), abs(self.difference))

    def is_wrong(self, noise: float) -> bool:
        error = abs(self.exact - self.difference)
        if error <= _ALLOWED * self.size + 5 * noise:
            return False
        # Where they disagree there is a kink or a jump, as where the experts
        # change that a router chooses: several, and they may cancel.
        spread = np.ptp([self.difference, *self.slopes()])
        return spread <= 0.3 * self.size + 5 * noise


class _Group(NamedTuple):
    """What the probes of one tensor say.

    Attributes:
        is_decided: Whether any derivative is more than noise.
        worst: Size, exact derivative and difference where most are wrong.
    """

    is_decided: bool
    worst: tuple[float, float, float] | None

    @classmethod
    def of(cls, probes: Iterable[_Probe], noise: float) -> _Group:
        is_decided, wrong, right = False, [], 0
        for probe in probes:
            is_decided |= probe.size > 5 * noise
            if probe.is_wrong(noise):
                wrong.append((probe.size, probe.exact, probe.difference))
            else:
                right += 1
            if right > _PROBES / 2:
                return cls(is_decided, None)
        return cls(is_decided, max(wrong))


def _inner(a: list, b: list) -> tf.Tensor:
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(x, tf.float64) * tf.cast(y, tf.float64))
            for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b))
        ]
    )
