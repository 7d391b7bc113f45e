"""The Fisher Penalty as a layer, for any Keras model."""

from __future__ import annotations

from typing import Any
import warnings
import weakref

import keras
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_3
from keras_fisher._common import keras_layers
from keras_fisher._common import random_draws
from keras_fisher._common.read_once import ReadOnce
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives.forward import Forward
from keras_fisher._derivatives.forward import is_differentiable
from keras_fisher._training import model_checks
from keras_fisher._training import schedule
from keras_fisher._training.bounded_sum import shortening
from keras_fisher._training.guarded_gradient import GuardedGradient
from keras_fisher._training.guarded_gradient import guarded_gradient
from keras_fisher._training.schedule import Plan
from keras_fisher._training.schedule import Schedule
from keras_fisher._training.state import FisherState
from keras_fisher.likelihoods import output_checks
from keras_fisher.likelihoods.lookup import of_model
from keras_fisher.penalties import kinds
from keras_fisher.penalties.base import Penalty


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherRegularization(ReadOnce, keras.layers.Wrapper):
    """Adds the Fisher Penalty of the layers that it wraps to the loss.

    Around the part of a model whose outputs are logits, it works in a stock
    `keras.Model` with the stock `train_step`. In training it draws
    ŷ ~ p_θ(y|x) from the outputs and adds α ‖ĝ‖² to the losses (`add_loss`),
    where ĝ is the gradient of the mean negative log-likelihood of ŷ with
    respect to the trainable variables of the wrapped layer; out of training
    it is the wrapped layer alone. The logs of the model get `fisher_trace`,
    the last unbiased estimate B ‖ĝ‖² of Tr(F) of the wrapped part, and its
    loss includes the penalty, as with any Keras regularizer.

    Around a whole model, with `bound=None`, it is the same penalty as
    `FisherModel`'s, which is faster: it shares one more backward pass, and
    compiles steps with and without the penalty separately under XLA. A bound
    takes ‖ĝ‖ for ‖∇L‖ and its mean m, since the layer sees no gradient of the
    loss.

    A penalty whose value, or the squared norm of whose gradient, is not finite
    makes the loss of the batch NaN, so that `keras.callbacks.TerminateOnNaN`
    sees it; its gradient is left out, and the weights get that of the loss
    alone.

    The layer sees neither weights of examples, which are of the loss alone,
    nor the optimizer: where that accumulates the gradients of N batches, each
    of them is penalized by itself. With `bound=None`, divide α by N to get
    `FisherModel`'s penalty of all N together.

    A `train_step` of your own has to call the model with `training=True`, and
    to add `self.losses` to the loss, as Keras's does. Where one of them is
    missing the penalty has no effect: a `UserWarning` says so at the end of the
    epoch, unless the model's own `metrics` leave out those of its layers.

    Several of them in a model write the same entry of the logs, of which the
    last is seen; `fisher_trace(layer.layer, ...)` measures each by itself.

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
        ValueError: If the penalty needs labels of the data set; in training,
            if the outputs are not what the likelihood expects, as those of a
            softmax are no logits.

    Example:
    ```python
    network = keras.Sequential([
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ])
    model = keras.Sequential([
        keras.Input((28, 28)),
        keras_fisher.layers.FisherRegularization(network),
    ])
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(x, y)
    ```
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        penalty: float | str | Penalty = "fisher",
        *,
        likelihood: Any = "categorical",
        seed: int | None = None,
        **kwargs: Any,
    ):
        keras_3.check_layer(layer)
        # Wrapped layers cast for themselves; variables are read uncast here.
        kwargs.setdefault("dtype", layer.variable_dtype)
        super().__init__(layer, autocast=False, **kwargs)
        self.penalty = kinds.get(penalty)
        if self.penalty is None or self.penalty.needs_labels:
            raise ValueError(
                "A layer does not see the labels of the data set, so it takes "
                "`FisherPenalty` or `UniformLabelPenalty`. Received: "
                f"penalty={penalty!r}. Use `FisherModel` for the others."
            )
        self.likelihood = of_model(likelihood, layer)
        if self.likelihood.reads_labels:
            raise ValueError(
                "A layer does not see the labels of the data set, so it "
                "cannot leave out positions that have none. Received: "
                f"likelihood={self.likelihood}. Leave out `ignore_class`, and "
                "hide these positions by a Keras mask "
                "(`keras.layers.Masking`), or use `FisherModel`."
            )
        if seed is not None:
            seed = checks.integer("seed", seed, 0)
        self.seed = seed
        self._is_checked = False
        self._output_look = model_checks.output_look(layer, self.likelihood)
        self.seed_generator = random_draws.generator(seed)
        # Replicas may not meet in a call: it may be within a condition, and
        # they would find each other's losses in the one list of them.
        self.state = FisherState(
            dtypes.at_least_single(self.variable_dtype).name,
            synchronization="on_read",
        )
        self.state.carry(self.seed_generator, layer)
        self.state.begin_penalty(self.penalty.alpha_variable)
        self.step = self.add_weight(
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            name="step",
        )
        self._trace_metric = _LastValue(self.state, _Use(self))

    _instead = "Assign `penalty.alpha`, or make another `FisherRegularization`."

    def _is_read_once(self, name: str) -> bool:
        return name in ("layer", "penalty", "likelihood", "seed")

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "penalty": keras.saving.serialize_keras_object(self.penalty),
            "likelihood": keras.saving.serialize_keras_object(self.likelihood),
            "seed": self.seed,
        }

    def build(self, input_shape=None):
        keras_layers.build_by_call(
            self.layer,
            keras.tree.map_shape_structure(keras.KerasTensor, input_shape),
        )
        if self.penalty.stores_gradient:
            self.state.create_gradients(self.layer)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs, previous_mask):
        # The outputs of the wrapped layer bring their own.
        return None

    def call(self, inputs, training=None):
        variables = self.layer.trainable_variables
        if (
            not training
            or not variables
            or not keras_layers.have_values(variables)
        ):
            return self.layer(inputs, training=training)
        if self.penalty.stores_gradient:  # of what was unfrozen since, too
            self.state.create_gradients(self.layer)
        looked = self._checked_outputs(inputs)
        if looked:  # The update of the weights is to wait as well.
            with tf.control_dependencies(looked):
                inputs = examples_lib.apply(_identity, inputs)
        tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        with tape:
            for variable in variables:
                tape.watch(variable.value)
            for leaf in keras.tree.flatten(inputs):
                if is_differentiable(leaf):
                    tape.watch(leaf)
            forward = self.penalty.forward(
                self.layer,
                inputs,
                seed=self.seed_generator,
                watch_inputs=True,
            )
        value, gradients = Schedule(self.penalty, trace_every=None).choose(
            lambda plan: self._planned(plan, forward, tape), self.step
        )
        use = self._trace_metric.use
        self.add_loss(
            gradients_lib.with_gradient(
                value, forward.targets, gradients, use.differentiated
            )
        )
        use.is_called = True
        self.step.assign_add(1)
        return forward.outputs

    def _checked_outputs(self, inputs) -> list:
        """Raises a `ValueError` if they are not what is expected, once.

        Returns:
            Operations to wait for, which look at values where that takes a
            graph; under XLA nothing does.
        """
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync > 1:
            return []
        if not self._is_checked:
            model_checks.check_trainable(self.layer)
            model_checks.check_excluded(self.penalty, self.layer)
            output_checks.check(self.likelihood, self.layer, inputs)
        self._is_checked = True
        if second_derivatives.compiles():
            return []
        return self._output_look.step(self.step.value, 0, inputs)

    def _planned(self, plan: Plan, forward: Forward, tape: tf.GradientTape):
        """The value to add at a step of this plan, and its gradient."""
        if plan.penalize == schedule.FRESH:
            return self._fresh(forward, tape)
        gradients = [tf.zeros_like(target) for target in forward.targets]
        if plan.penalize == schedule.NOTHING:
            return tf.zeros([], self.state.dtype), gradients
        # The last one again; of the variables alone, not of the inputs.
        stored = self.state.gradients(self.layer)
        gradients[: len(stored)] = map(tf.convert_to_tensor, stored)
        return tf.convert_to_tensor(self.state.fisher_penalty), gradients

    def _fresh(self, forward: Forward, tape: tf.GradientTape):
        context = tf.distribute.get_replica_context()
        with tape:
            term = self.penalty(
                forward,
                self.likelihood,
                seed=self.seed_generator,
                batches=1 if context is None else context.num_replicas_in_sync,
                step=self.step,
            )
            objective = dtypes.times(term.value, term.loss_scale)
        guarded = guarded_gradient(
            tape, objective, forward.targets, term.value, term.loss_scale
        ).unscaled()
        value = tf.cast(term.value, self.state.dtype)
        value += dtypes.zero_if(guarded.is_usable, value.dtype)
        if term.traces is not None:
            self.state.fisher_trace.assign(tf.reduce_sum(term.traces))
        self.state.fisher_penalty.assign(value)
        guarded = self._bounded(guarded, term.squared_norm)
        if self.penalty.stores_gradient:
            guarded.store(self.state.gradients(self.layer))
        gradients = [
            tf.zeros_like(target) if gradient is None else gradient
            for target, gradient in zip(
                forward.targets, guarded.where(guarded.is_usable)
            )
        ]
        return value, gradients

    def _bounded(
        self, guarded: GuardedGradient, squared_norm: tf.Tensor
    ) -> GuardedGradient:
        """No longer than the penalty's bound allows, by ‖ĝ‖ alone."""
        if self.penalty.bound is None:
            return guarded
        of_layer = guarded.gradients[: len(self.layer.trainable_variables)]
        length = gradients_lib.norm(of_layer)
        own = tf.cast(tf.sqrt(squared_norm), length.dtype)
        bound = tf.cast(self.penalty.bound_at(self.step), length.dtype)
        return guarded.times(shortening(length, bound * own))


def _identity(tensor: tf.Tensor) -> tf.Tensor:
    return keras_layers.with_mask(
        tf.identity(tensor), keras_layers.mask_of(tensor)
    )


class _Use:
    """Notices a penalty that has no effect, and tells it once.

    A training step of a user's may leave out `self.losses`, or call the model
    without `training=True`. Then the layer's weights change in an epoch, and
    nobody has differentiated the penalty.
    """

    def __init__(self, layer: FisherRegularization):
        self._layer = weakref.ref(layer)
        self.is_called = False  # with training=True
        self._is_settled = False  # used, or told
        self._weights: list[float] | None = None

    def differentiated(self) -> None:
        self._is_settled = True

    def begin_epoch(self) -> None:
        if not self._is_settled and tf.executing_eagerly():
            self._weights = self._sums() or None  # of a layer that is built

    def end_epoch(self) -> None:
        if (
            self._is_settled
            or self._weights is None
            or not tf.executing_eagerly()
            or self._weights == self._sums()
        ):
            return
        self._is_settled = True
        reason, advice = (
            (
                "its penalty was added to `losses`, but nothing has "
                "differentiated that",
                "Add `sum(self.losses)` to the loss in `train_step`",
            )
            if self.is_called
            else (
                "it was never called with `training=True`",
                "Call the model with `training=True` in `train_step`, and add "
                "`sum(self.losses)` to the loss",
            )
        )
        warnings.warn(
            f"The weights of {self._layer().name} are trained, but its penalty "
            f"has no effect: {reason}. {advice}, as Keras's own step does.",
            UserWarning,
            stacklevel=2,
        )

    def _sums(self) -> list[float]:
        return [
            float(tf.reduce_sum(tf.cast(variable.value, tf.float64)))
            for variable in self._layer().layer.trainable_variables
        ]


class _LastValue(keras.metrics.Metric):
    """The trace in the logs: no mean, and kept from epoch to epoch.

    Keras resets metrics as an epoch begins, and asks for them as it ends.
    """

    def __init__(self, state: FisherState, use: _Use):
        super().__init__(name="fisher_trace", dtype=state.dtype)
        self._state, self.use = state, use

    def update_state(self, *args, **kwargs):
        pass

    def result(self):
        self.use.end_epoch()
        return self._state.last_trace()

    def reset_state(self):
        self.use.begin_epoch()
