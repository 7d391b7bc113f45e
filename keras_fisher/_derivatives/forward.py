"""The one forward pass that the loss and the penalty share.

A penalty may look at a random part of the batch. Where no layer lets examples
see each other, the part and the rest run through the model one after the
other and the outputs are joined, so that a small part costs little; otherwise
(batch normalization) the whole batch runs at once and the part's outputs are
picked from it. Both give the same quantities.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher._derivatives import second_derivatives


@dataclasses.dataclass(frozen=True)
class Forward:
    """A recorded forward pass in training mode.

    Attributes:
        outputs: Outputs for the whole batch, in the order of the batch: a
            tensor, or a list or dict of tensors.
        part_outputs: Outputs for the part that the penalty looks at.
        start: Position in the batch of the part's first example, which the
            others follow, past the end of the batch from its beginning; None
            if the part is all of it.
        mask: Keras mask of `part_outputs`, or None; in their structure.
        batch_size: Number of examples in the batch.
        part_size: Number of examples in the part.
        layer: The layer that ran.
        inputs: What it ran on to give `part_outputs`.
        targets: What penalties are differentiated by: the values of the
            layer's trainable variables, then the watched inputs, flat.
        tape: Persistent tape from `targets` to `part_outputs`.
        second_tape: Another one, for second derivatives; None if not asked
            for.
    """

    outputs: Any
    part_outputs: Any
    start: tf.Tensor | None
    mask: Any
    batch_size: int | tf.Tensor
    part_size: int | tf.Tensor
    layer: keras.layers.Layer
    inputs: Any
    targets: list
    tape: tf.GradientTape
    second_tape: tf.GradientTape | None
    _state_before: list
    _picked: bool

    @property
    def dtype(self) -> tf.DType:
        """The dtype of the outputs, the narrowest if there are several."""
        dtypes = [t.dtype for t in structures.leaves(self.part_outputs)]
        return min(dtypes, key=lambda dtype: dtype.size)

    def of_part(self, values: Any) -> Any:
        """The rows of `values`, one per example, that belong to the part."""
        if self.start is None:
            return values
        return _part(values, self.start, self.part_size)

    def replay(self, targets: list) -> tuple[tf.GradientTape, Any]:
        """Runs the part again on other values, and changes nothing.

        Random layers draw the same numbers as the first time.

        Args:
            targets: A tensor in place of each of `self.targets`.

        Returns:
            A tape from `targets` to the outputs for the part, and these.
        """
        variables = self.layer.trainable_variables
        inputs = iter(targets[len(variables) :])
        watched = {id(t) for t in self.targets[len(variables) :]}
        inputs = keras.tree.map_structure(
            lambda x: next(inputs) if id(x) in watched else x, self.inputs
        )
        state = [*zip(variables, targets), *self._state_before]
        tape = _tape()
        with (
            keras.StatelessScope(state_mapping=state),
            _recording([tape], targets, differentiable=False),
        ):
            outputs = self.layer(inputs, training=True)
            if self._picked:
                outputs = self.of_part(outputs)
        return tape, outputs


def run(
    layer: keras.layers.Layer,
    inputs: Any,
    *,
    fraction: float = 1.0,
    seed: int | keras.random.SeedGenerator = 0,
    watch_inputs: bool = False,
    differentiable: bool = True,
    twice: bool = False,
    replayable: bool = False,
) -> Forward:
    """Runs a layer in training mode, once for each example.

    Args:
        layer: A built layer or model.
        inputs: Its inputs, with the batch as first axis of each.
        fraction: Share of the batch that makes up the part: neighbours from
            a random place on, one example at least.
        seed: Where the draw of the part comes from; not touched if
            `fraction` is 1.
        watch_inputs: Whether inputs of floating point are among the targets.
        differentiable: Whether the gradient of the outputs will be
            differentiated again. If not, the pass is the same to the last bit
            as without a recording.
        twice: Whether `Forward.second_tape` is wanted.
        replayable: Whether `Forward.replay` will be called.

    Returns:
        A `Forward`.
    """
    state_before = _state(layer) if replayable else []
    batch_size = _batch_size(inputs)
    part_size, start = batch_size, None
    if fraction < 1:
        part_size = _part_size(fraction, batch_size)
        # Neighbours can be cut out and put back without a gather, whose
        # gradient would be a scatter.
        start = random_draws.integers([], batch_size, random_draws.draw(seed))
    # Not every layer takes a rest without an example.
    has_rest = tf.is_tensor(part_size) or part_size < batch_size
    split = start is not None and has_rest and examples_are_independent(layer)
    run_on, rest = inputs, None
    if split:
        turned = keras.tree.map_structure(lambda x: _turned(x, start), inputs)
        run_on = keras.tree.map_structure(lambda x: x[:part_size], turned)
        rest = keras.tree.map_structure(lambda x: x[part_size:], turned)

    targets = values_of(layer.trainable_variables)
    if watch_inputs:
        targets += [
            x for x in keras.tree.flatten(run_on) if x.dtype.is_floating
        ]
    tape, second_tape = _tape(), _tape() if twice else None
    tapes = [second_tape, tape] if twice else [tape]
    with _recording(tapes, targets, differentiable):
        outputs = layer(run_on, training=True)
        mask = structures.apply(keras_mask, outputs)
        part_outputs = outputs
        if start is not None and not split:
            part_outputs = _part(outputs, start, part_size)
            mask = _part(mask, start, part_size)
    if split:
        others = structures.leaves(layer(rest, training=True))
        size = None if tf.is_tensor(batch_size) else batch_size

        def whole(part):
            joined = _turned(tf.concat([part, others.pop(0)], axis=0), -start)
            return tf.ensure_shape(joined, [size, *part.shape[1:]])

        outputs = keras.tree.map_structure(whole, part_outputs)
    return Forward(
        outputs=outputs,
        part_outputs=part_outputs,
        start=start,
        mask=mask,
        batch_size=batch_size,
        part_size=part_size,
        layer=layer,
        inputs=run_on,
        targets=targets,
        tape=tape,
        second_tape=second_tape,
        _state_before=state_before,
        _picked=start is not None and not split,
    )


def values_of(variables) -> list:
    """The TensorFlow variables behind Keras variables."""
    return [variable.value for variable in variables]


def keras_mask(outputs: tf.Tensor) -> tf.Tensor | None:
    """The mask that Keras layers have left on their outputs."""
    # Keras has no public name for it.
    return getattr(outputs, "_keras_mask", None)


def with_keras_mask(tensor: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """`tensor`, with a mask that Keras layers will find on it."""
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def compute_dtype(layer: keras.layers.Layer) -> str:
    """The dtype that a layer computes in, or what it only passes on to."""
    while _is_transparent(layer):
        layer = layer.layer
    return layer.compute_dtype


def examples_are_independent(layer: keras.layers.Layer) -> bool:
    """Whether a layer is known to treat each example on its own.

    True only for Keras's own layers and for Sequential and functional models
    made of them and of elementwise operations such as `x + y`, none of which
    mixes the batch, keeps state from call to call (but for seeds), adds a loss
    or makes a mask. Code that cannot be looked into counts as dependent.
    """
    if not (_is_keras_own(layer) or _is_transparent(layer)):
        return False
    if isinstance(layer, keras.Model):
        return all(
            examples_are_independent(operation)
            if isinstance(operation, keras.layers.Layer)
            else _is_elementwise(operation)
            for operation in getattr(layer, "operations", layer.layers)
        )
    if isinstance(layer, keras.layers.BatchNormalization):
        return not layer.trainable
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        return False
    if isinstance(layer, keras.layers.RNN):
        return _is_keras_own(layer.cell)
    if isinstance(layer, _DEPENDENT) or layer.activity_regularizer:
        return False
    if isinstance(layer, keras.layers.Bidirectional):
        return all(
            map(
                examples_are_independent,
                (layer.forward_layer, layer.backward_layer),
            )
        )
    if isinstance(layer, keras.layers.Wrapper):
        return examples_are_independent(layer.layer)
    return not getattr(layer, "mask_zero", False)


# Layers with other people's code, with state or losses, or that mask.
_DEPENDENT = (
    keras.layers.Lambda,
    keras.layers.Masking,
    keras.layers.ActivityRegularization,
    keras.layers.SpectralNormalization,
    keras.layers.TFSMLayer,
    keras.layers.TorchModuleWrapper,
    keras.layers.JaxLayer,
)


# What `keras.ops` and the operators on its tensors are called in a functional
# model. Keras has no public names for them; with others they would count as
# dependent, which costs time only.
_ELEMENTWISE = {
    *("Absolute", "Add", "Divide", "Maximum", "Minimum", "Multiply"),
    *("Negative", "Power", "Square", "Subtract", "TrueDivide"),
    *("Elu", "Exp", "Gelu", "LeakyRelu", "Relu", "Relu6", "Selu", "Sigmoid"),
    *("Silu", "Softplus", "Softsign", "Tanh"),
}


def _is_elementwise(operation) -> bool:
    """Whether an operation of a functional model is, with no broadcast batch.

    An operand of lower rank would be aligned by its last axes, and a constant
    may have an axis for the examples of one batch.
    """
    name = type(operation).__name__
    if not _is_keras_own(operation) or name not in _ELEMENTWISE:
        return False
    inputs = keras.tree.flatten(operation.input)
    rank = len(operation.output.shape)
    return operation.output.shape[0] is None and all(
        x.shape[0] is None and len(x.shape) == rank for x in inputs
    )


def _is_keras_own(layer) -> bool:
    return type(layer).__module__.split(".")[0] == "keras"


def _is_transparent(layer) -> bool:
    """Whether a wrapper of this package only runs the layer in it."""
    return getattr(layer, "is_transparent", False)


def _tape() -> tf.GradientTape:
    return tf.GradientTape(persistent=True, watch_accessed_variables=False)


@contextlib.contextmanager
def _recording(tapes: list[tf.GradientTape], targets: list, differentiable):
    with contextlib.ExitStack() as stack:
        for tape in tapes:
            stack.enter_context(tape)
            for target in targets:
                tape.watch(target)
        if differentiable:
            stack.enter_context(second_derivatives.exact())
        yield


def _state(layer: keras.layers.Layer) -> list:
    """The values now of all that a call may change: statistics and seeds."""
    return [
        (variable, tf.identity(variable.value))
        for variable in layer.non_trainable_variables
    ]


def _batch_size(inputs: Any) -> int | tf.Tensor:
    first = keras.tree.flatten(inputs)[0]
    static = first.shape[0]
    return tf.shape(first)[0] if static is None else int(static)


def _part_size(fraction: float, batch_size):
    if not tf.is_tensor(batch_size):
        return min(batch_size, max(1, round(fraction * batch_size)))
    share = tf.round(fraction * tf.cast(batch_size, tf.float32))
    return tf.minimum(batch_size, tf.maximum(1, tf.cast(share, tf.int32)))


def _turned(x: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """The examples in their order from `start` on, the first after the last."""
    return tf.roll(x, -start, axis=0)


def _part(values: Any, start: tf.Tensor, size) -> Any:
    return structures.apply(lambda x: _turned(x, start)[:size], values)
