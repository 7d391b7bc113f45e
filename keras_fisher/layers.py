"""Layers: the Fisher Penalty in any Keras model, and memory for it."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_fisher import checks
from keras_fisher import forward as forward_lib
from keras_fisher import gradients as gradients_lib
from keras_fisher import likelihoods
from keras_fisher import penalties
from keras_fisher import rematerialization
from keras_fisher.state import FisherState


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherRegularization(keras.layers.Wrapper):
    """Adds the Fisher Penalty of the layers that it wraps to the loss.

    Around the part of a model whose outputs are logits, it works in a stock
    `keras.Model` with the stock `train_step`. In training it draws
    ŷ ~ p_θ(y|x) from the outputs and adds α ‖ĝ‖² to the losses (`add_loss`),
    where ĝ is the gradient of the mean negative log-likelihood of ŷ with
    respect to the trainable variables of the wrapped layer; out of training
    it is the wrapped layer alone. The logs of the model get `fisher_trace`,
    the last unbiased estimate B ‖ĝ‖² of Tr(F) of the wrapped part, and its
    loss includes the penalty, as with any Keras regularizer.

    Around a whole model it is the same penalty as `FisherModel`'s, which is
    faster: it shares one more backward pass, and compiles steps with and
    without the penalty separately under XLA.

    A penalty whose value, or the squared norm of whose gradient, is not finite
    makes the loss of the batch NaN, so that `keras.callbacks.TerminateOnNaN`
    sees it; its gradient is left out, and the weights get that of the loss
    alone.

    The layer sees neither weights of examples, which are of the loss alone,
    nor the optimizer: where that accumulates the gradients of N batches, each
    of them is penalized by itself. Divide α by N to get `FisherModel`'s
    penalty of all N together.

    With `every > 1`, steps are counted by calls in training mode; the reused
    gradient is with respect to the wrapped variables alone.

    Source: Jastrzebski et al., *Catastrophic Fisher Explosion: Early Phase
    Fisher Matrix Impacts Generalization*, ICML 2021, section 4.

    Args:
        layer: A layer or model.
        penalty: α, a name, or a penalty that needs no labels of the data set:
            `FisherPenalty` or `UniformLabelPenalty`.
        likelihood: p_θ(y|x) given the outputs, as `likelihoods.of_model`
            takes it; by default the softmax of logits.
        seed: Integer that the sampling of labels starts from.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: What `layer` takes.
        training: Whether the penalty is added.

    Raises:
        ValueError: If the penalty needs labels of the data set.

    Example:
    ```python
    model = keras.Sequential([
        keras.Input((32, 32, 3)),
        keras_fisher.layers.FisherRegularization(network, penalty=0.1),
    ])
    ```
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        penalty: float | str | penalties.Penalty = 0.1,
        *,
        likelihood: Any = "categorical",
        seed: int | None = None,
        **kwargs,
    ):
        # Wrapped layers cast for themselves; variables are read uncast here.
        kwargs.setdefault("dtype", layer.variable_dtype)
        super().__init__(layer, autocast=False, **kwargs)
        self.penalty = penalties.get(penalty)
        if self.penalty is None or self.penalty.needs_labels:
            raise ValueError(
                "A layer does not see the labels of the data set, so it takes "
                "`FisherPenalty` or `UniformLabelPenalty`. Received: "
                f"penalty={penalty!r}. Use `FisherModel` for the others."
            )
        self.likelihood = likelihoods.of_model(likelihood, layer)
        if seed is not None:
            checks.integer("seed", seed, 0)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        # Replicas may not meet in a call: it may be within a condition, and
        # they would find each other's losses in the one list of them.
        self.state = FisherState(
            likelihoods.compute_dtype(self.variable_dtype).name,
            synchronization="on_read",
        )
        self.state.carry(self.seed_generator, layer)
        self.step = self.add_weight(
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            name="step",
        )
        self._trace_metric = _LastValue(self.state)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "penalty": keras.saving.serialize_keras_object(self.penalty),
            "likelihood": keras.saving.serialize_keras_object(self.likelihood),
            "seed": self.seed,
        }

    def build(self, input_shape=None):
        if not self.layer.built:
            # Calling builds subclassed layers as well, which `build` does not.
            self.layer(
                keras.tree.map_shape_structure(keras.KerasTensor, input_shape)
            )
        if self.penalty.stores_gradient:
            self.state.create_gradients(self.layer)
        self.built = True

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def call(self, inputs, training=None):
        if not training or not self.layer.trainable_variables:
            return self.layer(inputs, training=training)
        second_tape = tf.GradientTape(
            persistent=True, watch_accessed_variables=False
        )
        with second_tape:
            for variable in self.layer.trainable_variables:
                second_tape.watch(variable.value)
            for leaf in keras.tree.flatten(inputs):
                if leaf.dtype.is_floating:
                    second_tape.watch(leaf)
            forward = self.penalty.forward(
                self.layer,
                inputs,
                seed=self.seed_generator,
                watch_inputs=True,
            )
        value, gradients = self._scheduled(forward, second_tape)
        self.add_loss(
            gradients_lib.with_gradient(value, forward.targets, gradients)
        )
        self.step.assign_add(1)
        return forward.outputs

    def _fresh(self, forward, second_tape):
        """The penalty of this step and its gradient."""
        dtype = forward_lib.compute_dtype(self.layer)
        scale = 2.0**10 if dtype == "float16" else 1.0
        context = tf.distribute.get_replica_context()
        replicas = 1 if context is None else context.num_replicas_in_sync
        with second_tape:
            term = self.penalty(
                forward,
                self.likelihood,
                seed=self.seed_generator,
                loss_scale=scale,
                batches=replicas,
            )
        with penalties.explained():
            gradients = second_tape.gradient(
                term.value,
                forward.targets,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        is_finite = gradients_lib.are_usable(term.value, gradients)
        gradients = gradients_lib.replaced_unless(is_finite, gradients)
        if term.traces is not None:
            self.state.fisher_trace.assign(tf.reduce_sum(term.traces))
        value = tf.cast(term.value, self.state.dtype)
        value = tf.where(is_finite, value, float("nan"))
        self.state.fisher_penalty.assign(value)
        if self.penalty.stores_gradient:
            stored = self.state.gradients(self.layer)
            for variable, gradient in zip(stored, gradients):
                variable.assign(gradient)
        return value, gradients

    def _scheduled(self, forward, second_tape):
        """The penalty to add at this step, with its gradient."""

        def fresh():
            return self._fresh(forward, second_tape)

        def stale():
            return self._stale(forward)

        def nothing():
            zeros = [tf.zeros_like(target) for target in forward.targets]
            return tf.zeros([], self.state.dtype), zeros

        penalty, step = self.penalty, tf.convert_to_tensor(self.step)
        if penalty.every == 1 and penalty.start == 0 and penalty.stop is None:
            return fresh()
        between = stale if penalty.stores_gradient else nothing
        return tf.cond(
            penalty.is_fresh(step),
            fresh,
            lambda: tf.cond(penalty.is_active(step), between, nothing),
        )

    def _stale(self, forward):
        """The last penalty again, with the gradient it had."""
        stored = [
            tf.convert_to_tensor(g) for g in self.state.gradients(self.layer)
        ]
        inputs = forward.targets[len(stored) :]
        return (
            tf.convert_to_tensor(self.state.fisher_penalty),
            stored + [tf.zeros_like(x) for x in inputs],
        )


class _LastValue(keras.metrics.Metric):
    """The trace in the logs: no mean, and kept from epoch to epoch."""

    def __init__(self, state: FisherState):
        super().__init__(name="fisher_trace", dtype=state.dtype)
        self._trace = state.fisher_trace

    def update_state(self, *args, **kwargs):
        pass

    def result(self):
        return tf.convert_to_tensor(self._trace)

    def reset_state(self):
        pass


@keras.saving.register_keras_serializable(package="keras_fisher")
class Rematerialization(keras.layers.Wrapper):
    """Keeps no activations of the layer that it wraps: gradient checkpointing.

    Outputs, variables, gradients and gradients of gradients are those of the
    layer. What it computes on its way is not kept for the backward passes but
    computed again, with the same random numbers: less memory for more time.
    Wrap blocks of several layers. What a block starts from is kept, and one
    block at a time is recomputed.

    It works where `tf.recompute_grad` and `keras.RematScope` do not: within
    the penalties, which differentiate twice.

    Statistics and random states are updated once, as by the layer itself.

    Source: Chen, Xu, Zhang, Guestrin, *Training deep nets with sublinear
    memory cost*, 2016.

    Args:
        layer: A layer or model, of Keras variables alone. Random numbers have
            to come from `keras.random.SeedGenerator`s of its own, as in
            Keras's layers: `tf.random` draws others when it is called again.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Call arguments:
        inputs, *args, **kwargs: What `layer` takes. Keras wants all or none of
            the keyword arguments to be tensors: with `use_causal_mask=True`,
            the tensors have to go by position.
        training: What `layer` takes as `training`.

    Raises:
        ValueError: In a call, if the layer changes variables that are
            trainable (`SpectralNormalization` does) or not its own.

    Example:
    ```python
    block = keras.Sequential([
        keras.layers.Conv2D(64, 3, padding="same"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
    ])
    x = keras_fisher.layers.Rematerialization(block)(x)
    ```
    """

    is_transparent = True  # for `forward`

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        # Wrapped layers cast for themselves; variables are read uncast here.
        kwargs.setdefault("dtype", layer.variable_dtype)
        super().__init__(layer, autocast=False, **kwargs)

    def build(self, input_shape=None):
        parameters = inspect.signature(self.layer.call).parameters.values()
        required = [
            p
            for p in parameters
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        # A layer of several arguments is built when these are known.
        if len(required) <= 1:
            self._build_layer(
                keras.tree.map_shape_structure(keras.KerasTensor, input_shape)
            )
        self.built = True

    def _build_layer(self, *args, **kwargs):
        if not self.layer.built:
            # Calling builds subclassed layers as well, which `build` does not.
            self.layer(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs, previous_mask):
        if self.layer.supports_masking:
            return self.layer.compute_mask(inputs, previous_mask)
        return None

    def call(self, inputs, *args, training=None, **kwargs):
        layer = self.layer
        arguments = ((inputs, *args), kwargs)
        symbolic = keras.tree.map_structure(_symbolic, arguments)
        self._build_layer(*symbolic[0], **symbolic[1])
        variables = layer.trainable_variables
        state = [
            (variable, tf.identity(variable.value))
            for variable in layer.non_trainable_variables
        ]
        leaves = keras.tree.flatten(arguments)
        values = [tf.convert_to_tensor(v.value) for v in variables]

        def function(tensors):
            tensors = iter(tensors)
            mapping = [*zip(variables, tensors), *state]
            args, kwargs = keras.tree.pack_sequence_as(
                arguments, _replaced(leaves, tensors)
            )
            scope = keras.StatelessScope(mapping, collect_losses=True)
            before = dict(scope.state_mapping)
            with scope:
                outputs = layer(*args, training=training, **kwargs)
            changes = {
                key: value
                for key, value in scope.state_mapping.items()
                if value is not before.get(key)
            }
            floating = _floating(keras.tree.flatten(outputs))
            return [*floating, *scope.losses], (outputs, changes)

        tensors, (outputs, changes) = rematerialization.checkpoint(
            function, [*values, *_floating(leaves)]
        )
        tensors = iter(tensors)
        outputs = keras.tree.pack_sequence_as(
            outputs, _replaced(keras.tree.flatten(outputs), tensors)
        )
        for loss in tensors:
            self.add_loss(loss)
        for variable, _ in state:
            if id(variable) in changes:
                variable.assign(changes.pop(id(variable)))
        if changes:
            raise ValueError(
                f"The layer {layer.name!r} in a `Rematerialization` changes "
                "variables in its call that are trainable or not its own, so "
                "that it would compute something else when it is called "
                "again. Leave it outside. If it draws random numbers, give it "
                "a `keras.random.SeedGenerator` as an attribute to draw from."
            )
        return outputs


def _is_floating(x) -> bool:
    return isinstance(x, tf.Tensor) and x.dtype.is_floating


def _floating(leaves) -> list:
    return [x for x in leaves if _is_floating(x)]


def _replaced(leaves, tensors) -> list:
    """The leaves, those of floating point from the iterator `tensors`."""
    return [
        forward_lib.with_keras_mask(next(tensors), forward_lib.keras_mask(x))
        if _is_floating(x)
        else x
        for x in leaves
    ]


def _symbolic(x):
    if not tf.is_tensor(x):
        return x
    return keras.KerasTensor(x.shape, dtype=x.dtype.name)
