"""Squared gradient norms of each example, without per-example gradients.

A forward pass is recorded, and read from the graph, not by layer: where each
variable meets the examples (`variable_uses`). One backward pass gives the
derivatives there for all examples, and these give the norms (`norm_rules`).
Variables whose uses are of another kind are differentiated example by
example. Before any of it is trusted, `untrusted` compares it with plain
backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._common import structures
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale
from keras_fisher._derivatives.independence import mixes_some_batches
from keras_fisher._measuring import norm_rules
from keras_fisher._measuring import variable_uses
from keras_fisher._measuring.recorded_call import call
from keras_fisher._measuring.recorded_call import recorded_call
from keras_fisher._measuring.variable_uses import Layout

# Examples that are compared with plain backpropagation, at most.
_MOST_COMPARED = 4

_NOT_ALONE = (
    "The outputs for one example depend on the other examples of the batch, so "
    "no example has a gradient of its own. Use "
    '`estimator="batch"`, which needs none.'
)


def layout_for(layer: keras.layers.Layer, x: Any, training: bool) -> Layout:
    """Traces the model with one more example, and runs nothing.

    Args:
        layer: A built model.
        x: Its inputs, with the batch as first axis of each, of known shapes
            unless they are ragged.
        training: The mode of the call.
    """
    batch_size = examples_lib.tensors(x)[0].shape[0]
    if examples_lib.has_ragged(x):
        return Layout(batch_size, {})  # Nothing is read off the graph.

    @tf.function(autograph=False)
    def traced(x):
        return recorded_call(layer, x, training).outputs

    more = examples_lib.apply(
        lambda t: tf.TensorSpec([batch_size + 1, *t.shape[1:]], t.dtype), x
    )
    graph = traced.get_concrete_function(more).graph
    return Layout(batch_size, variable_uses.shapes_by_operation(graph))


class Recording:
    """A forward pass, ready for the squared norms of its examples' gradients.

    To be made while a `tf.function` is traced.

    Args:
        layer: A built layer or model.
        x: Inputs of known shapes, with the batch as first axis of each.
        layout: From `layout_for` with inputs of the same shapes.
        training: The mode of the call.
        passes: How often `squared_norms` will be called, about. What can be
            shared is then computed once.
        one_by_one: Positions of trainable variables whose gradients are
            computed example by example whatever their uses.

    Attributes:
        structure: The outputs of the layer, a tensor or several.
        outputs: The same in one tensor.
        mask: The Keras masks of the outputs, or None, in their structure.
        dtype, shape: Of the squared norms of one pass.
        slow: Positions of the variables that are done example by example.

    Raises:
        ValueError: If the layer computes statistics over the batch.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        x: Any,
        layout: Layout,
        *,
        training: bool = False,
        passes: int = 1,
        one_by_one: frozenset[int] = frozenset(),
    ):
        self._layer, self._x = layer, x
        recorded = recorded_call(layer, x, training)
        self._weights, self._tape = recorded.weights, recorded.tape
        self.structure, self.outputs = recorded.structure, recorded.outputs
        self.mask = recorded.mask
        self._batch_size = layout.batch_size
        self.dtype = dtypes.at_least_single(layer.variable_dtype)
        self.shape = self._batch_size, len(self._weights)
        # Another call would draw other numbers.
        self._calls_once = training or not keras_layers.draws_nothing(
            self.outputs.graph
        )
        self._analyse(recorded, layout, passes, one_by_one)

    def _analyse(self, recorded, layout, passes, one_by_one):
        varying = variable_uses.dependent_on(
            # The values of ragged ones, and their splits.
            tf.nest.flatten(
                examples_lib.tensors(recorded.x), expand_composites=True
            ),
            self.outputs.graph.get_operations(),
        )
        _check_statistics(self._layer, recorded.scope, varying)
        operations = variable_uses.ancestors(self.outputs)
        self._uses, self._rules = [], []
        for i, weight in enumerate(self._weights):
            uses = None
            if i not in one_by_one:
                uses = variable_uses.find(weight, operations, varying, layout)
            # How a scaled variable was scaled, entry by entry.
            scale_of = functools.partial(self._tape.gradient, sources=weight)
            self._uses.append(uses)
            self._rules.append(
                norm_rules.norms_of(uses, layout, scale_of, passes)
            )
        self.slow = [
            i
            for i, (uses, rule) in enumerate(zip(self._uses, self._rules))
            # Without uses, the outputs do not depend on the variable.
            if rule is None and uses != []
        ]

    def gradients(self, cotangent: tf.Tensor) -> list:
        """Σ_i g_i for each variable, for `cotangent` as in `squared_norms`."""
        gradients = self._tape.gradient(
            self.outputs,
            self._weights,
            output_gradients=tf.cast(cotangent, self.outputs.dtype),
        )
        return gradients_lib.dense(gradients)

    def squared_norms(self, *cotangents: tf.Tensor) -> tf.Tensor:
        """‖g_i‖² of each example and variable, for each of the cotangents.

        Several at once share what they can, and take the memory of as many
        backward passes.

        Args:
            *cotangents: The derivatives of the examples' losses at the
                outputs, each of the shape of `outputs`.

        Returns:
            Tensor of shape `(cotangents, batch, variables)`, in `float32` or
            the wider dtype of the variables.
        """
        scales = [
            loss_scale.fitting(
                [cotangent],
                keras_layers.compute_dtype(self._layer),
                by_example=True,
            )
            for cotangent in cotangents
        ]
        cotangents = [
            tf.cast(cotangent * scale, self.outputs.dtype)
            for cotangent, scale in zip(cotangents, scales)
        ]
        norms = self._fast_norms(cotangents)
        if self.slow:
            slow = self._slow_norms(tf.stack(cotangents))
            for k, i in enumerate(self.slow):
                norms[i] = slow[:, :, k]
        norms = tf.stack([tf.cast(n, self.dtype) for n in norms], axis=-1)
        scales = tf.cast(tf.stack(scales), self.dtype)
        return tf.transpose(norms, [1, 0, 2]) / scales[:, None, None] ** 2

    def fast_norms(self, cotangent: tf.Tensor) -> tf.Tensor:
        """`squared_norms` for one cotangent; zero for variables in `slow`.

        Returns:
            Tensor of shape `(batch, variables)`.
        """
        cotangent = tf.cast(cotangent, self.outputs.dtype)
        norms = self._fast_norms([cotangent])
        return tf.stack([tf.cast(n[:, 0], self.dtype) for n in norms], axis=1)

    def _fast_norms(self, cotangents: list) -> list:
        """For each variable, of shape `(batch, cotangents)`; zero if slow."""
        fast = [i for i, rule in enumerate(self._rules) if rule is not None]
        targets = [use.output for i in fast for use in self._uses[i]]
        upstream = [
            iter(self._upstream(targets, cotangent)) for cotangent in cotangents
        ]
        shape = [self._batch_size, len(cotangents)]
        norms = [tf.zeros(shape, self.dtype)] * len(self._rules)
        for i in fast:
            own = [[next(one) for _ in self._uses[i]] for one in upstream]
            norms[i] = self._rules[i].squared_norms(own)
        return norms

    def _upstream(self, targets: list, cotangent: tf.Tensor) -> list:
        upstream = self._tape.gradient(
            self.outputs, targets, output_gradients=cotangent
        )
        return [
            tf.zeros_like(target)
            if d is None
            # The derivative of a loop, taken in another, loses its shape.
            else tf.ensure_shape(d, target.shape)
            # Picked positions have sparse derivatives.
            for target, d in zip(targets, gradients_lib.dense(upstream))
        ]

    def _slow_norms(self, cotangents: tf.Tensor) -> tf.Tensor:
        """Of the variables in `slow`, of shape `(batch, cotangents, slow)`.

        In loops, so that the model is traced once, however many there are.
        """
        one = self._one_in_batch if self._calls_once else self._one_alone
        count = cotangents.shape[0]

        def of_example(i):
            gradients = one(i)

            def norms(k):
                found = gradients_lib.dense(gradients(cotangents[k]))
                return tf.cast(gradients_lib.squared_norms(found), self.dtype)

            return norms(0)[None] if count == 1 else self._loop(norms, count)

        found = self._loop(of_example, self._batch_size)
        return tf.ensure_shape(found, [self._batch_size, count, len(self.slow)])

    def _loop(self, function: Callable, count: int) -> tf.Tensor:
        # One at a time in memory.
        return tf.map_fn(
            function,
            tf.range(count),
            fn_output_signature=self.dtype,
            parallel_iterations=1,
        )

    def _one_alone(self, i) -> Callable:
        """The gradients of example i, from a batch of it alone."""
        weights = [self._weights[k] for k in self.slow]
        x = examples_lib.one(self._x, i)
        with tf.GradientTape(
            persistent=True, watch_accessed_variables=False
        ) as tape:
            for weight in weights:
                tape.watch(weight)
            outputs, _ = call(self._layer, self._weights, x, training=False)
            outputs = structures.join(outputs)
        return lambda cotangent: tape.gradient(
            outputs, weights, output_gradients=cotangent[i][None]
        )

    def _one_in_batch(self, i) -> Callable:
        """The same from the recorded pass, so with its random numbers."""
        weights = [self._weights[k] for k in self.slow]

        def gradients(cotangent):
            chosen = tf.one_hot(i, self._batch_size, dtype=cotangent.dtype)
            shape = [-1] + [1] * (cotangent.shape.rank - 1)
            return self._tape.gradient(
                self.outputs,
                weights,
                output_gradients=cotangent * tf.reshape(chosen, shape),
            )

        return gradients


def _check_statistics(layer, scope, varying: set[str]) -> None:
    for variable in layer.non_trainable_variables:
        value = scope.get_current_value(variable)
        if tf.is_tensor(value) and value.op.name in varying:
            raise ValueError(
                "In training mode the model computes statistics over the "
                f"batch (they update {variable.path}), so the loss of one "
                "example depends on all others and no example has a gradient "
                "of its own. Use `training=False`, or "
                '`estimator="batch"`, which holds in training mode as well.'
            )


def untrusted(
    layer: keras.layers.Layer, x: Any, layout: Layout, training: bool
) -> frozenset[int]:
    """Finds variables whose fast norms are not those of backpropagation.

    Their gradients have to be computed example by example: the graph is not
    as `variable_uses` reads it.

    Args:
        layer: A built layer or model.
        x: Concrete inputs.
        layout: From `layout_for` with inputs of the same shapes.
        training: The mode of the call.

    Returns:
        Their positions among the trainable variables: all for ragged inputs,
        which are to be looked at by `check_alone`.

    Raises:
        ValueError: If examples of the batch depend on each other, so that
            none has a gradient of its own.
    """
    if examples_lib.has_ragged(x):
        return frozenset(range(len(layer.trainable_variables)))
    record = functools.partial(Recording, layer, x, layout, training=training)
    fast_and_plain = _fast_and_plain(record)
    disagreeing = functools.partial(
        _disagreeing, layer, layout, record, fast_and_plain
    )
    slow = frozenset()
    found = _spread(layer, layout, fast_and_plain) | disagreeing(slow)
    while found:
        if found <= slow:
            raise ValueError(_NOT_ALONE)
        slow |= found
        found = disagreeing(slow)
    return slow


def check_alone(layer: keras.layers.Layer, x: Any) -> None:
    """Looks whether some examples are, alone, what they are in a batch.

    Ragged ones that a layer pads to the length of others, and does not mask,
    are not: the shortest show it. Of others, the first and the last; all of
    them where one that is loud may drown another.

    Raises:
        ValueError: If so.
    """
    leaves = examples_lib.tensors(x)
    chosen = {
        int(tf.argmin(leaf.row_lengths()))
        for leaf in leaves
        if isinstance(leaf, tf.RaggedTensor)
    } or {0, int(examples_lib.number(leaves)) - 1}
    if mixes_some_batches(layer):
        chosen = range(int(examples_lib.number(leaves)))

    def alone(i):
        outputs = keras_layers.outputs_of(layer, examples_lib.one(x, i))
        return _float64(structures.join(outputs)[0])

    together = structures.join(keras_layers.outputs_of(layer, x))
    for i in chosen:
        if not (
            _are_near(layer, alone(i), _float64(together[i]))
            or _draws(layer, x)
        ):
            raise ValueError(_NOT_ALONE)


def _draws(layer, x) -> bool:
    """Whether another call has other numbers, as some have in inference."""
    outputs_of = functools.partial(keras_layers.outputs_of, layer)
    traced = tf.function(outputs_of, autograph=False)
    return not keras_layers.draws_nothing(traced.get_concrete_function(x).graph)


def _are_near(layer, found: np.ndarray, expected: np.ndarray) -> bool:
    # Where shapes differ, as of padded positions, nothing compares.
    if found.shape != expected.shape:
        return False
    least = _tolerance(layer) * np.abs(expected).max(initial=0.0)
    return not np.any(abs(found - expected) > least)


def _tolerance(layer: keras.layers.Layer) -> float:
    dtype = tf.as_dtype(keras_layers.compute_dtype(layer))
    return 1e-3 if dtype.size >= 4 else 0.1


def _float64(tensor: tf.Tensor) -> np.ndarray:
    return tensor.numpy().astype("float64")


def _fast_and_plain(record: Callable[..., Recording]) -> Callable:
    """Function of weights of the examples, with what is to be compared.

    The fast norms of each example, and those of backpropagation through all.
    """

    @tf.function(autograph=False)
    def fast_and_plain(weights):
        recording = record()
        cotangent = _weighted_cotangent(recording.outputs.shape, weights)
        return (
            recording.fast_norms(cotangent),
            gradients_lib.squared_norms(recording.gradients(cotangent)),
        )

    return lambda weights: [*map(_float64, fast_and_plain(weights))]


def _spread(layer, layout, fast_and_plain) -> frozenset[int]:
    """Variables of which what belongs to some examples turns up in others."""
    wrong = np.zeros(len(layer.trainable_variables), bool)
    for chosen in _separating(layout.batch_size):
        norms, _ = fast_and_plain(tf.constant(chosen, tf.float32))
        inside, outside = norms[chosen].sum(axis=0), norms[~chosen].sum(axis=0)
        wrong |= outside > _allowed(layer, inside)
    return _positions(wrong)


def _disagreeing(layer, layout, record, fast_and_plain, slow) -> frozenset[int]:
    """Variables whose norms are wrong, with those in `slow` one by one."""

    @tf.function(autograph=False)
    def all_norms(weights):
        recording = record(one_by_one=slow)
        cotangent = _weighted_cotangent(recording.outputs.shape, weights)
        return recording.squared_norms(cotangent)[0]

    def norms_and_plain(weights):
        norms, plain = fast_and_plain(weights)
        return (_float64(all_norms(weights)) if slow else norms), plain

    wrong = np.zeros(len(layer.trainable_variables), bool)
    norms, _ = norms_and_plain(tf.ones([layout.batch_size]))
    for i in _representative(norms):
        norms, plain = norms_and_plain(tf.one_hot(i, layout.batch_size))
        # Comparisons are false for NaN, which is nothing to judge by.
        wrong |= abs(norms[i] - plain) > _allowed(layer, plain)
    return _positions(wrong)


def _allowed(layer, norms: np.ndarray) -> np.ndarray:
    return _tolerance(layer) * (norms + 1e-4 * norms.sum())


def _positions(wrong: np.ndarray) -> frozenset[int]:
    return frozenset(int(i) for i in wrong.nonzero()[0])


def _weighted_cotangent(shape: tf.TensorShape, weights: tf.Tensor) -> tf.Tensor:
    """Any numbers, none of them zero and no two the same, times weights."""
    numbers = tf.sin(1.0 + tf.range(shape.num_elements(), dtype=tf.float32))
    weights = tf.reshape(weights, [-1] + [1] * (shape.rank - 1))
    return tf.reshape(numbers, shape) * weights


def _separating(size: int) -> np.ndarray:
    """Choices of examples, some with each and without each other one.

    Example i is in those choices that are in a set of half of them, another
    set for each i: no set of half contains another (Sperner, 1928).

    Returns:
        Booleans of shape `(choices, size)`, about log2(size) choices.
    """
    count = next(n for n in itertools.count() if math.comb(n, n // 2) >= size)
    sets = itertools.combinations(range(count), count // 2)
    choices = np.zeros([count, size], bool)
    for i, members in enumerate(itertools.islice(sets, size)):
        choices[list(members), i] = True
    return choices


def _representative(norms: np.ndarray) -> list[int]:
    """A few examples in which, together, as many variables as can be count.

    Args:
        norms: Of shape `(examples, variables)`.
    """
    chosen, missing = [], np.ones(norms.shape[1], bool)
    while not chosen or (missing.any() and len(chosen) < _MOST_COMPARED):
        i = int(norms[:, missing].sum(axis=1).argmax())
        if i in chosen:
            break
        chosen.append(i)
        missing &= norms[i] <= 1e-3 * norms.max(axis=0)
    return chosen
