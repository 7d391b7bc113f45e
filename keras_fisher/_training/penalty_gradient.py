"""The gradient of a penalty, on its way to the optimizer and to later steps."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives.gradients import Gradients
from keras_fisher._training import optimizers
from keras_fisher._training import replicas
from keras_fisher._training.bounded_sum import Accumulated
from keras_fisher._training.bounded_sum import bounded_sum
from keras_fisher._training.guarded_gradient import GuardedGradient
from keras_fisher._training.state import FisherState
from keras_fisher.penalties.base import Penalty

_ACCUMULATED = ("accumulated_loss", "accumulated_penalty")


class PenaltyGradient:
    """What a penalty wants of its gradient: kept, bounded, added to the loss's.

    Args:
        penalty: The penalty, or None.
        state: Where gradients are kept.
        model: Whose trainable variables they are of.
        optimizer: Takes them.
    """

    def __init__(
        self,
        penalty: Penalty | None,
        state: FisherState,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ):
        self._penalty = penalty
        self._state = state
        self._model = model
        self._optimizer = optimizer

    def create_state(self, trained: list[keras.Variable]) -> None:
        """Makes room for what is kept from step to step.

        Args:
            trained: What the optimizer trains.

        Raises:
            ValueError: If that is not what gradients are kept of, or if the
                optimizer does not tell when it makes an update.
        """
        if self._penalty is None:
            return
        optimizers.check_accumulation(self._optimizer)
        kinds = ["gradient"] if self._penalty.stores_gradient else []
        if self._penalty.bound is not None:
            self._state.create_bound()
            if optimizers.accumulation_steps(self._optimizer) > 1:
                kinds += _ACCUMULATED
        if kinds:
            self._check_are_all(trained, kinds)
        for kind in kinds:
            self._state.create_gradients(self._model, kind)

    def _check_are_all(
        self, trained: list[keras.Variable], kinds: list[str]
    ) -> None:
        inside = {id(v) for v in self._model.trainable_variables}
        outside = [v.path for v in trained if id(v) not in inside]
        if not outside:
            return
        instead = ["`reuse=False`"] if "gradient" in kinds else []
        if {*_ACCUMULATED} & {*kinds}:
            instead.append("`bound=None`")
        raise ValueError(
            "Gradients that are kept from step to step (every=, "
            "gradient_accumulation_steps=) are those of the wrapped model. "
            f"Received: variables {outside} of its wrapper. Add them to the "
            f"model that is wrapped, or keep none: {' and '.join(instead)}."
        )

    def store(self, guarded: GuardedGradient) -> None:
        """Keeps it for the steps to come, if they use it again."""
        if self._penalty.stores_gradient:
            guarded.store(self._state.gradients(self._model))

    def stored(self) -> Gradients:
        """What was kept, with loss scale."""
        scale = self._optimizer.scale_loss(1.0)
        return [
            dtypes.times(tf.convert_to_tensor(variable), scale)
            for variable in self._state.gradients(self._model)
        ]

    def added_to(
        self, loss: Gradients, penalty: Gradients
    ) -> tuple[Gradients, tf.Tensor | None]:
        """What a replica hands to the optimizer.

        Args:
            loss: Its part of the gradient of the loss, with loss scale.
            penalty: Its gradient of the penalty, whose mean over replicas
                counts; with loss scale.

        Returns:
            The gradients, and ‖∇P‖ / ‖∇L‖ if there is a bound.
        """
        if self._penalty.bound is None:
            return gradients_lib.added(
                loss, penalty, 1 / replicas.number()
            ), None
        return bounded_sum(
            loss,
            penalty,
            self._state.loss_norm,
            self._penalty.bound_at(self._optimizer.iterations),
            self._optimizer.scale_loss(1.0),
            self._accumulated(),
        )

    def _accumulated(self) -> Accumulated | None:
        """The batches before, if a step has several."""
        steps = optimizers.accumulation_steps(self._optimizer)
        if steps == 1:
            return None
        loss, penalty = (
            self._state.gradients(self._model, kind) for kind in _ACCUMULATED
        )
        return Accumulated(
            loss,
            penalty,
            steps,
            optimizers.ends_step(self._optimizer),
        )
