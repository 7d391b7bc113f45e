"""The one forward pass that the loss and the penalty share.

A penalty may look at a random subset of the batch. Where no layer lets
examples see each other, the subset and the rest run through the model one
after the other and the outputs are joined, so that a small subset costs
little; otherwise (batch normalization) the whole batch runs at once and the
outputs of the subset are picked from it. Both give the same quantities.

Micro-batches are parts of it that may run once more, each by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_layers
from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives import way as way_lib
from keras_fisher._derivatives.independence import examples_are_independent

# Of the draws from one integer; labels are in stream 0.
_SUBSET_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Subset:
    """Neighbours in a batch, from a random place on.

    Neighbours can be cut out and put back without a gather, whose gradient
    would be a scatter.

    Attributes:
        size: Number of examples in it.
        first: Position in the batch of the first of them, which the others
            follow, past the end of the batch from its beginning; None if the
            subset is all of the batch.
    """

    size: int | tf.Tensor
    first: tf.Tensor | None = None

    def of(self, values: Any) -> Any:
        """The rows of `values`, one per example, that belong to it."""
        if self.first is None:
            return values
        return structures.apply(
            lambda x: examples_lib.turned(x, self.first)[: self.size],
            values,
        )


@dataclasses.dataclass(frozen=True)
class Forward:
    """A recorded forward pass in training mode.

    Attributes:
        outputs: Outputs for the whole batch, in the order of the batch: a
            tensor, or a list or dict of tensors.
        subset_outputs: Outputs for the examples that the penalty looks at.
        subset: Which examples these are.
        mask: Keras mask of `subset_outputs`, or None; in their structure.
        batch_size: Number of examples in the batch.
        layer: The layer that ran.
        inputs: What it ran on to give `subset_outputs`.
        targets: What penalties are differentiated by: the values of the
            layer's trainable variables, then the watched inputs, flat.
        tape: Persistent tape from `targets` to `subset_outputs`.
        second_tape: Another one, for second derivatives; None if not asked
            for.
        way: What lies between `targets` and the outputs; None if the pass is
            not replayable.
        is_divisible: Whether `part` gives what the whole has given.
    """

    outputs: Any
    subset_outputs: Any
    subset: Subset
    mask: Any
    batch_size: int | tf.Tensor
    layer: keras.layers.Layer
    inputs: Any
    targets: list[Any]
    tape: tf.GradientTape
    second_tape: tf.GradientTape | None
    way: way_lib.Way | None
    is_divisible: bool
    _state_before: list[Any]
    _was_picked: bool
    _is_differentiable: bool

    @property
    def num_variables(self) -> int:
        """Number of targets that are trainable variables."""
        return len(self.layer.trainable_variables)

    @property
    def layer_outputs(self) -> Any:
        """What the layer itself has returned, of which the others are made."""
        is_all = self.subset.first is None or self._was_picked
        return self.outputs if is_all else self.subset_outputs

    @property
    def dtype(self) -> tf.DType:
        """The dtype of the outputs, the narrowest if there are several."""
        dtypes = [t.dtype for t in structures.leaves(self.subset_outputs)]
        return min(dtypes, key=lambda dtype: dtype.size)

    def replay(self, targets: list[Any]) -> tuple[tf.GradientTape, Any]:
        """Runs the subset again on other values, and changes nothing.

        Random layers draw the same numbers as the first time.

        Args:
            targets: A tensor in place of each of `self.targets`.

        Returns:
            A tape from `targets` to the outputs for the subset, and these.
        """
        tape = _tape()
        # Of the same functions as the first time, to round alike.
        with _recording([tape], targets, self._is_differentiable):
            outputs = _call_on(
                self.layer, self.inputs, targets, self._state_before
            )
            if self._was_picked:
                outputs = self.subset.of(outputs)
        return tape, outputs

    def part(self, first: int | tf.Tensor, size: int | tf.Tensor) -> Forward:
        """Runs neighbours in the subset by themselves.

        Args:
            first: Position in the subset of the first of them.
            size: How many they are.

        Returns:
            A `Forward` of a batch of these alone.
        """
        inputs = examples_lib.neighbours(self.inputs, first, size)
        tape, second_tape = _tape(), _tape() if self.way is None else None
        tapes = [second_tape, tape]
        with _recording(tapes, self.targets, self._is_differentiable):
            outputs = self.layer(inputs, training=True)
        return dataclasses.replace(
            self,
            outputs=outputs,
            subset_outputs=outputs,
            subset=Subset(size),
            mask=None,
            batch_size=size,
            inputs=inputs,
            tape=tape,
            second_tape=second_tape,
        )


def run(
    layer: keras.layers.Layer,
    inputs: Any,
    *,
    fraction: float = 1.0,
    seed: int | keras.random.SeedGenerator = 0,
    watch_inputs: bool = False,
    differentiable: bool = True,
    replayable: bool = False,
    part_size: int | None = None,
) -> Forward:
    """Runs a layer in training mode, once for each example.

    Args:
        layer: A built layer or model.
        inputs: Its inputs, with the batch as first axis of each.
        fraction: Share of the batch that makes up the subset: neighbours from
            a random place on, one example at least.
        seed: Where the draw of the subset comes from; not touched if
            `fraction` is 1.
        watch_inputs: Whether inputs of floating point are among the targets.
        differentiable: Whether the gradient of the outputs will be
            differentiated again. If not, the pass is the same to the last bit
            as without a recording.
        replayable: Whether `Forward.replay` will be called.
        part_size: Number of examples that `Forward.part` will be called with,
            if that is possible: where examples are independent, and nothing is
            drawn or watched. None for no such call.

    Returns:
        A `Forward`.
    """
    state_before = keras_layers.snapshot(layer) if replayable else []
    subset, run_on, rest = _apart(layer, inputs, fraction, seed)
    is_divisible = (
        not watch_inputs
        and (fraction == 1 or rest is not None)
        and _is_divisible(layer, run_on, part_size)
    )

    targets = _targets(layer, run_on if watch_inputs else [])
    way = None
    if replayable and tf.executing_eagerly():
        # Before the pass: layers may keep what they were called with last.
        with _recording([], [], differentiable):
            way = _traced_way(layer, run_on, targets)
    tape = _tape()
    # Parts have tapes of their own, and differences need none.
    is_twice = part_size is not None and not (is_divisible or replayable)
    second_tape = _tape() if is_twice else None
    with _recording([second_tape, tape], targets, differentiable):
        outputs = subset_outputs = layer(run_on, training=True)
        mask = structures.apply(keras_layers.mask_of, outputs)
        # A graph network has other rows in its inputs.
        batch_size = number_of_examples(outputs if subset is None else inputs)
        subset = subset or _draw_subset(fraction, batch_size, seed)
        if rest is None:
            subset_outputs, mask = subset.of(outputs), subset.of(mask)
    if rest is not None:
        outputs = _joined(
            subset_outputs, layer(rest, training=True), subset, batch_size
        )
    if replayable and way is None:
        way = way_lib.of_graph(targets, subset_outputs)
    return Forward(
        outputs=outputs,
        subset_outputs=subset_outputs,
        subset=subset,
        mask=mask,
        batch_size=batch_size,
        layer=layer,
        inputs=run_on,
        targets=targets,
        tape=tape,
        second_tape=second_tape,
        way=way,
        is_divisible=is_divisible,
        _state_before=state_before,
        _was_picked=subset.first is not None and rest is None,
        _is_differentiable=differentiable,
    )


def _targets(layer, watched_inputs: Any) -> list:
    """What gradients are taken by: variables, and inputs that are watched."""
    return [
        *keras_layers.values_of(layer.trainable_variables),
        *filter(is_differentiable, keras.tree.flatten(watched_inputs)),
    ]


def is_differentiable(x: Any) -> bool:
    """Whether an input can be watched: it is dense, and of floating point."""
    return isinstance(x, tf.Tensor) and x.dtype.is_floating


def _is_divisible(layer, inputs: Any, part_size: int | None) -> bool:
    """Whether parts of the inputs give what all of them give together."""
    leaves = examples_lib.tensors(inputs)
    are_dense = all(isinstance(leaf, tf.Tensor) for leaf in leaves)
    if part_size is None or not are_dense or _has_tables(layer):
        return False
    sizes = {leaf.shape[0] for leaf in leaves}
    return (
        sizes == {None} or (len(sizes) == 1 and min(sizes) > part_size)
    ) and examples_are_independent(layer, inputs, may_draw=False)


def _has_tables(layer) -> bool:
    """Whether it looks things up.

    Where a persistent tape sees a loop, TensorFlow asks how the gradients of
    all that is used in it are shaped, and those of a table are not.
    """
    tables = keras.layers.IntegerLookup, keras.layers.StringLookup
    return any(
        isinstance(each, (*tables, keras.layers.TextVectorization))
        for each in keras_layers.operations_in(layer)
    )


def _call_on(layer, inputs: Any, targets: list, state: list) -> Any:
    """Calls a layer on other values of targets, and changes nothing.

    Args:
        layer: The layer.
        inputs: Its inputs.
        targets: Tensors in place of the values of its trainable variables,
            and then, if there are more, of the inputs of floating point.
        state: Pairs of other variables and values, as in `snapshot`.
    """
    variables = layer.trainable_variables
    others = iter(targets[len(variables) :])
    if len(targets) > len(variables):
        inputs = keras.tree.map_structure(
            lambda x: next(others) if is_differentiable(x) else x, inputs
        )
    with keras_layers.FixedScope(zip(variables, targets), state):
        return layer(inputs, training=True)


def _traced_way(layer, inputs: Any, targets: list) -> way_lib.Way:
    """What a pass that runs eagerly has on it."""
    return way_lib.of_function(
        lambda tensors: _call_on(layer, inputs, tensors, []),
        targets,
        otherwise=[
            keras_layers.compute_dtype(layer),
            *(t.dtype for t in targets),
        ],
    )


def _apart(layer, inputs: Any, fraction: float, seed) -> tuple:
    """A subset that may run by itself, its inputs, and those of the rest."""
    if fraction == 1 or not examples_are_independent(layer, inputs):
        return None, inputs, None
    batch_size = number_of_examples(inputs)
    subset = _draw_subset(fraction, batch_size, seed)
    # Not every layer takes a rest without an example.
    if tf.is_tensor(subset.size) or subset.size < batch_size:
        return subset, *_split(inputs, subset)
    return subset, inputs, None


def _draw_subset(fraction: float, batch_size, seed) -> Subset:
    if fraction == 1:
        return Subset(batch_size)
    if tf.is_tensor(batch_size):
        share = tf.round(fraction * tf.cast(batch_size, tf.float32))
        size = tf.minimum(batch_size, tf.maximum(1, tf.cast(share, tf.int32)))
    else:
        size = min(batch_size, max(1, round(fraction * batch_size)))
    # Not the bits that labels are drawn from.
    seed = random_draws.draw(seed, stream=_SUBSET_STREAM)
    first = random_draws.integers([], batch_size, seed)
    return Subset(size, first)


def _split(inputs: Any, subset: Subset) -> tuple[Any, Any]:
    """Inputs of the subset, and of the other examples."""
    turned = examples_lib.apply(
        lambda x: examples_lib.turned(x, subset.first), inputs
    )
    return (
        examples_lib.rows(turned, 0, subset.size),
        examples_lib.rows(turned, subset.size, None),
    )


def _joined(subset_outputs: Any, others: Any, subset: Subset, batch_size):
    """Outputs of the whole batch, in its order."""
    size = None if tf.is_tensor(batch_size) else batch_size

    def whole(ours, theirs):
        joined = examples_lib.turned(
            tf.concat([ours, theirs], axis=0), -subset.first
        )
        return tf.ensure_shape(joined, [size, *ours.shape[1:]])

    return keras.tree.map_structure(whole, subset_outputs, others)


def _tape() -> tf.GradientTape:
    return tf.GradientTape(persistent=True, watch_accessed_variables=False)


@contextlib.contextmanager
def _recording(
    tapes: list[tf.GradientTape | None], targets: list, differentiable: bool
):
    with contextlib.ExitStack() as stack:
        for tape in filter(None, tapes):
            stack.enter_context(tape)
            for target in targets:
                tape.watch(target)
        if differentiable:
            stack.enter_context(second_derivatives.exact())
        yield


def number_of_examples(tensors: Any) -> int | tf.Tensor:
    """The rows of tensors, an integer if it is known.

    Raises:
        ValueError: If they are known to differ.
    """
    leaves = examples_lib.tensors(tensors)
    known = {t.shape[0] for t in leaves if t.shape.rank} - {None}
    if len(known) > 1:
        raise ValueError(
            "Examples are counted by the rows of the outputs (and, with a "
            "`fraction`, of the inputs), which must be as many in all of "
            f"them. Received: shapes {[tuple(t.shape) for t in leaves]}. Wrap "
            "a model whose outputs have a row for each example."
        )
    return int(*known) if known else examples_lib.number(leaves)
