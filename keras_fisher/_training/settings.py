"""What decides on the steps of a model, and what happens as it is assigned.

The steps are traced with it. So an assignment either has them traced again,
takes effect without that (α), or is refused: none is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

import keras

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher._common.read_once import ReadOnce
from keras_fisher._training import model_checks
from keras_fisher._training.penalty_gradient import PenaltyGradient
from keras_fisher._training.schedule import Schedule
from keras_fisher._training.state import FisherState
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.lookup import is_auto
from keras_fisher.likelihoods.lookup import of_model
from keras_fisher.penalties import kinds
from keras_fisher.penalties.base import Penalty

# Attributes that follow what is assigned.
_DECIDING = (
    "_penalty",
    "_trace_every",
    "_likelihood",
    "_finds_likelihood",
    "_output_look",
    "_operation_look",
)


class Settings(ReadOnce, keras.Model):
    """A model around another, whose steps follow what is assigned to it.

    Args:
        model: The model to train.
        penalty, likelihood, trace_every, seed: As `FisherModel` takes them.
        **kwargs: Arguments of `keras.Model`.
    """

    def __init__(self, model, penalty, likelihood, trace_every, seed, **kwargs):
        if kwargs.get("activity_regularizer") is not None:
            raise ValueError(
                "Steps that measure call the wrapped model alone. Received: "
                f"activity_regularizer={kwargs['activity_regularizer']!r}. "
                "Give it to the model that is wrapped, or to its last layer."
            )
        super().__init__(**kwargs)
        if seed is not None:
            seed = checks.integer("seed", seed, 0)
        self.model = model
        self.seed = seed
        self._penalty, self._trace_every = None, None
        # Also for what measures nothing as yet: a built model takes no more.
        with self.distribute_strategy.scope():
            self.seed_generator = random_draws.generator(seed)
            self.state = FisherState(
                dtypes.at_least_single(self.variable_dtype).name
            )
        self.state.carry(self.seed_generator, model)
        self.likelihood = likelihood
        self.trace_every = trace_every
        self.penalty = penalty

    @property
    def penalty(self) -> Penalty | None:
        """The penalty; another one begins anew at the next step."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty) -> None:
        with self._assignment():
            self._penalty = kinds.get(penalty)
        with self.distribute_strategy.scope():
            self.state.begin_penalty(
                None if self._penalty is None else self._penalty.alpha_variable
            )

    @property
    def trace_every(self) -> int | None:
        """Tr(F) is measured every so many optimizer steps, or not by itself."""
        return self._trace_every

    @trace_every.setter
    def trace_every(self, trace_every: int | None) -> None:
        if trace_every is not None:
            trace_every = checks.integer("trace_every", trace_every, 1)
        with self._assignment():
            self._trace_every = trace_every

    @property
    def likelihood(self) -> Likelihood | None:
        """p_θ(y|x), given the outputs; None until the loss is known."""
        return self._likelihood

    @likelihood.setter
    def likelihood(self, likelihood: Any) -> None:
        with self._assignment():
            self._finds_likelihood = is_auto(likelihood)
            self._likelihood = None
            if not self._finds_likelihood:
                self._likelihood = of_model(likelihood, self.model)

    _instead = "Make another `FisherModel(model, penalty, seed=...)`."

    def _is_read_once(self, name: str) -> bool:
        return name in ("model", "seed")

    @contextlib.contextmanager
    def _assignment(self) -> Iterator[None]:
        """Context of what takes effect at the next step, or not at all."""
        before = {k: vars(self)[k] for k in _DECIDING if k in vars(self)}
        try:
            yield
            with self.distribute_strategy.scope():
                if self.compiled:
                    self._prepare_training()
            self._trace_again()
        except Exception:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def _trace_again(self) -> None:
        """The next step is as the attributes now say, also within `fit`."""
        if getattr(self, "train_function", None) is not None:
            self.make_train_function(force=True)

    def _prepare_training(self) -> None:
        """What a compiled model needs before its first step."""
        observes = self._schedule.observes
        if self._finds_likelihood:
            # Accuracies on noisy labels want it, and can do without.
            refused = () if observes else ValueError
            self._likelihood = None
            with contextlib.suppress(refused):
                self._likelihood = of_model(self.loss, self.model)
        if not observes:
            return
        model_checks.check_transcripts(
            self.penalty, self.loss, self._likelihood
        )
        self._output_look = model_checks.output_look(
            self.model, self.likelihood
        )
        self._operation_look = model_checks.operation_look(
            self.model, self.likelihood
        )
        if self.model.built and self.optimizer is not None:
            model_checks.check_trainable(self.model)
            model_checks.check_excluded(self.penalty, self.model)
            self._penalty_gradient.create_state(self.trainable_variables)

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.penalty, self.trace_every)

    @property
    def _penalty_gradient(self) -> PenaltyGradient:
        return PenaltyGradient(
            self.penalty, self.state, self.model, self.optimizer
        )
