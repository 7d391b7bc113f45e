"""One training step with a penalty: its forward pass, loss and gradient."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from keras_fisher._common import structures
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._training import replicas as replicas_lib
from keras_fisher._training import schedule

if TYPE_CHECKING:
    from keras_fisher.model import FisherModel


class Step:
    """What `FisherModel` adds to one step of Keras, as its plan says.

    Keras's step calls `forward_pass` for the model, within `recorded` the loss,
    and `add_penalty` after it.

    Attributes:
        traces: Tr(F) of each trainable variable; None if not measured.
        value: Value of the penalty; None if there is no fresh one.
        is_lost: Whether it, or the squared norm of its gradient, is not finite.

    Args:
        owner: The model.
        plan: What to do.
        examples: Number of examples of all replicas; None if each has as many
            as this one.
    """

    def __init__(self, owner: FisherModel, plan: schedule.Plan, examples):
        self.owner = owner
        self.plan = plan
        self.traces = None
        self.value = None
        self.is_lost = tf.constant(False)
        self.batch_size = tf.zeros([], tf.int64)
        self._examples = examples
        self._forward = None
        # Records what is differentiated here.
        self._tape = tf.GradientTape(watch_accessed_variables=False)

    @property
    def _stores(self) -> bool:
        is_fresh = self.plan.penalize == schedule.FRESH
        return is_fresh and self.owner.penalty.stores_gradient

    @contextlib.contextmanager
    def recorded(self):
        """Records for the gradient of a fresh penalty."""
        if self.plan.penalize != schedule.FRESH:
            yield
            return
        with self._tape:
            for variable in self.owner.model.trainable_variables:
                self._tape.watch(variable.value)
            yield

    def forward_pass(self, x, training=True):
        """The outputs of the model, recorded as far as the plan needs it."""
        owner = self.owner
        if self.plan.penalize == schedule.FRESH:
            penalty = owner.penalty
        elif self.plan.measure:
            penalty = owner._probe
        else:
            return owner.model(x, training=training)
        with self.recorded():
            self._forward = penalty.forward(
                owner.model, x, seed=owner.seed_generator
            )
        outputs = self._forward.outputs
        first = structures.leaves(outputs)[0]
        self.batch_size = tf.shape(first, tf.int64)[0]
        return outputs

    def add_penalty(self, loss: tf.Tensor, y) -> tf.Tensor:
        """The loss with the gradient of the penalty, and without its value."""
        owner, plan = self.owner, self.plan
        replicas = owner.distribute_strategy.num_replicas_in_sync
        scale = owner.optimizer.scale_loss(1.0)
        if plan.penalize != schedule.NOTHING and loss.shape.rank:
            # Of an empty batch Keras takes no mean, where it knows its size.
            loss = tf.reduce_sum(loss)
        if plan.penalize == schedule.FRESH:
            loss = self._add_fresh(loss, y, replicas, scale)
        elif plan.penalize == schedule.REUSED:
            stored = owner.state.gradients(owner.model)
            loss += self._carrying(stored, replicas, loss.dtype)
        if plan.measure and self.traces is None:
            term = owner._probe(
                self._forward,
                owner.likelihood,
                seed=owner.seed_generator,
                loss_scale=scale,
            )
            self.traces = self._share(term.traces.dtype) * term.traces
        return loss

    def _add_fresh(self, loss, y, replicas, scale):
        """A penalty and its gradient, unless they are not finite."""
        owner = self.owner
        with self.recorded():
            term = owner.penalty(
                self._forward,
                owner.likelihood,
                y,
                seed=owner.seed_generator,
                loss_scale=scale,
                batches=self._batches(),
            )
            share = self._share(term.value.dtype)
            self.value = share * term.value
            added = tf.cast(self.value / replicas, loss.dtype)
            wanted = self.value if self._stores else loss + added
            wanted *= tf.cast(scale, wanted.dtype)
        if term.traces is not None:
            self.traces = share * term.traces
        gradients = [
            None if g is None else g / tf.cast(scale, g.dtype)
            for g in gradients_lib.dense(
                self._tape.gradient(wanted, self._variables)
            )
        ]
        is_finite = gradients_lib.are_usable(self.value, gradients)
        self.is_lost = ~is_finite
        if self._stores:
            self._store(gradients_lib.replaced_unless(is_finite, gradients))
        if _skips_steps(owner.optimizer):
            # For all replicas, by the gradients of the first.
            gradients = gradients_lib.replaced_unless(
                replicas_lib.on_all_replicas(is_finite), gradients, float("nan")
            )
        else:
            # A loss that is not finite itself is left to Keras.
            is_kept = is_finite | ~tf.math.is_finite(loss)
            gradients = gradients_lib.replaced_unless(is_kept, gradients)
            loss += tf.where(is_kept, tf.zeros_like(loss), float("nan"))
        if self._stores:
            return loss + self._carrying(gradients, replicas, loss.dtype)
        return gradients_lib.with_gradient(loss, self._variables, gradients)

    def _store(self, gradients) -> None:
        stored = self.owner.state.gradients(self.owner.model)
        for variable, gradient in zip(stored, gradients):
            nothing = tf.zeros(variable.shape, variable.dtype)
            variable.assign(nothing if gradient is None else gradient)

    @property
    def _variables(self) -> list:
        return [v.value for v in self.owner.model.trainable_variables]

    def _carrying(self, gradients, replicas, dtype) -> tf.Tensor:
        """Zero, with a gradient."""
        return gradients_lib.with_gradient(
            tf.zeros([], dtype),
            self._variables,
            [
                None if g is None else tf.convert_to_tensor(g) / replicas
                for g in gradients
            ],
        )

    def _batches(self):
        """How many batches like this one make up an optimizer step."""
        steps = _accumulation_steps(self.owner.optimizer)
        if self._examples is None:
            replicas = self.owner.distribute_strategy.num_replicas_in_sync
            return replicas * steps
        return steps * self._examples / tf.maximum(self.batch_size, 1)

    def _share(self, dtype):
        """B_r / (B / replicas), for means over replicas by examples."""
        if self._examples is None:
            return tf.ones([], dtype)
        replicas = self.owner.distribute_strategy.num_replicas_in_sync
        share = self.batch_size * replicas / tf.maximum(self._examples, 1)
        return tf.cast(share, dtype)

    def measurement(self) -> dict[str, tf.Tensor]:
        """Tensors of one shape and dtype whatever the plan."""
        dtype = self.owner.state.fisher_trace.dtype
        count = len(self.owner.model.trainable_variables)
        nothing = tf.constant(float("nan"), dtype)
        return {
            "trace_by_variable": tf.fill([count], nothing)
            if self.traces is None
            else tf.cast(self.traces, dtype),
            "penalty": nothing
            if self.value is None
            else tf.cast(self.value, dtype),
            "batch_size": self.batch_size,
        }


def _skips_steps(optimizer) -> bool:
    """Whether an optimizer skips steps with gradients that are not finite."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _accumulation_steps(optimizer) -> int:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.gradient_accumulation_steps or 1
