"""`FisherModel`: when a step measures or penalizes, and what reaches the logs.

`train_step` is Keras's own. It calls the model, `compute_loss` and
`compute_metrics`; what is overridden here are these three. A penalty adds zero
to the value of the loss and its gradient to the gradient of the loss, so
whatever Keras does with losses and gradients (scaling, clipping, replicas,
accumulation) it does with the penalty, and the loss in the logs stays the
user's.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher import penalties
from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import structures
from keras_fisher._training import memorization
from keras_fisher._training import replicas
from keras_fisher._training import schedule
from keras_fisher._training import train_function
from keras_fisher._training.state import FisherState
from keras_fisher._training.step import Step


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherModel(keras.Model):
    """Trains a model while measuring, and penalizing, its Fisher information.

    The trace of the Fisher Information Matrix,

        Tr(F) = E_x E_{ŷ ~ p_θ(y|x)} ‖∇_θ -log p_θ(ŷ|x)‖²,

    is estimated from the training batch, without bias, by B ‖ĝ‖², where ĝ is
    the gradient of the batch's mean negative log-likelihood with labels that
    are sampled from the model. The Fisher Penalty adds α ‖ĝ‖² to the loss.

    Everything else is `keras.Model`: `compile`, `fit`, `evaluate`, `predict`,
    `save`. Entries join the logs, each the last value measured and no mean:
    `fisher_trace` and, with a penalty, `fisher_penalty`. The loss and the
    metrics stay the user's own, without the penalty.

    A penalty whose value, or the squared norm of whose gradient, is not finite
    does not reach the weights: its gradient is left out, and with it that of
    the loss where both are computed in one (unless a gradient is stored to be
    reused). The entry `fisher_nonfinite` of the logs counts the batches where
    this happened, of all replicas and as long as the model lives, and the loss
    of such a batch becomes NaN, which ends the training if
    `keras.callbacks.TerminateOnNaN` looks on. Under loss scaling
    (`mixed_float16`) the optimizer skips the whole step and the loss stays
    what it is.

    Targets may carry a noise mask, `{"label": ..., "is_noisy": ...,
    "true_label": ...}` as from `keras_fisher.datasets.add_label_noise`; the
    logs then also have `clean_accuracy`, `noisy_accuracy` and (with true
    labels) `recovered_accuracy`.

    Source: Jastrzebski et al., *Catastrophic Fisher Explosion: Early Phase
    Fisher Matrix Impacts Generalization*, ICML 2021 (arXiv:2012.14193),
    sections 2 and 4.

    Args:
        model: Any `keras.Model`. It is wrapped, not copied: after training,
            `fisher_model.model` is trained.
        penalty: None, a number (α of a `FisherPenalty`), a name (`"fisher"`,
            `"gradient"`, `"uniform_label"`, `"input_gradient"`) or a penalty.
        likelihood: p_θ(y|x) given the outputs: a
            `keras_fisher.likelihoods.Likelihood` or something that
            `likelihoods.of_model` takes; for several outputs a list, or a
            dict by name. `"auto"` goes by the compiled loss.
        trace_every: Measure Tr(F) every so many optimizer steps, next to
            those at which a `FisherPenalty` is computed, which measures it in
            passing. None for the latter alone.
        seed: Integer that the sampling of labels starts from.
        **kwargs: `name`, and other arguments of `keras.Model`.

    Raises:
        ValueError: If an argument is not as described; on `compile`, if the
            loss has no known likelihood or no variable is trainable.

    Example:
    ```python
    model = keras_fisher.FisherModel(
        base, penalty=keras_fisher.FisherPenalty(alpha=0.3)
    )
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(x, y)
    history.history["fisher_trace"]
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        penalty: float | str | penalties.Penalty | None = None,
        *,
        likelihood: Any = "auto",
        trace_every: int | None = 10,
        seed: int | None = None,
        **kwargs,
    ):
        _check_wrappable(model)
        if trace_every is not None:
            checks.integer("trace_every", trace_every, 1)
        if seed is not None:
            checks.integer("seed", seed, 0)
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(**kwargs)
        self.model = model
        self.penalty = penalties.get(penalty)
        self.trace_every = trace_every
        self.seed = seed
        self._finds_likelihood = likelihoods.is_auto(likelihood)
        self.likelihood = (
            None
            if self._finds_likelihood
            else likelihoods.of_model(likelihood, model)
        )
        self._probe = penalties.TraceProbe()
        self._memorization = memorization.MemorizationAccuracy()
        self.built = model.built
        # Mirrored replicas trace their steps in threads of their own.
        self._active = threading.local()
        if self._schedule.observes:
            self.seed_generator = keras.random.SeedGenerator(seed)
            self.state = FisherState(
                dtypes.at_least_single(self.variable_dtype).name
            )
            self.state.carry(self.seed_generator, model)

    # As a Keras model.

    def call(self, inputs, training=None, mask=None):
        return self.model(inputs, training=training)

    def compute_mask(self, inputs, previous_mask):
        # The outputs of the wrapped model bring their own.
        return None

    @property
    def output_names(self):
        return self.model.output_names

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "penalty": keras.saving.serialize_keras_object(self.penalty),
            "likelihood": "auto"
            if self._finds_likelihood
            else keras.saving.serialize_keras_object(self.likelihood),
            "trace_every": self.trace_every,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> FisherModel:
        config = dict(config)
        config["model"] = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        return cls(**config)

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        if not self._schedule.observes:
            return
        if self._finds_likelihood:
            self.likelihood = likelihoods.of_model(self.loss, self.model)
        if self.model.built:
            self._check_trainable()
            self._create_stored_gradients()

    compile.__doc__ = keras.Model.compile.__doc__

    def compile_from_config(self, config: dict) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.model.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *args, **kwargs):
        self._check_labels(memorization.label_of(y))
        history = super().fit(x, y, *args, **kwargs)
        self._check_weights()
        return history

    fit.__doc__ = keras.Model.fit.__doc__

    # Which steps do what.

    @property
    def _schedule(self) -> schedule.Schedule:
        return schedule.Schedule(self.penalty, self.trace_every)

    def observed(self, steps: np.ndarray) -> np.ndarray:
        """Whether there is something to tell of each of some optimizer steps.

        Args:
            steps: Optimizer steps, counted from 0; integers of any shape.

        Returns:
            Booleans of the same shape: whether Tr(F) is measured or a penalty
            computed at these steps.
        """
        return self._schedule.observed(steps)

    # The step.

    def train_step(self, data):
        if not self._schedule.observes:
            logs = super().train_step(data)
            return replicas.with_axis(self.distribute_strategy, logs)
        logs, _ = self._schedule.choose(
            lambda plan: self._planned_step(data, None, plan),
            self.optimizer.iterations,
        )
        return logs

    def test_step(self, data):
        logs = super().test_step(data)
        return replicas.with_axis(self.distribute_strategy, logs)

    def _planned_step(self, data, examples, plan: schedule.Plan):
        """Keras's train step, with what `plan` adds to it.

        Args:
            data: The batch of this replica.
            examples: Number of examples of all replicas; None if each has as
                many as this one.
            plan: What to do.
        """
        self._build(data)
        step = Step(self, plan, examples)
        self._active.step = step
        try:
            with penalties.explained():
                logs = super().train_step(data)
        finally:
            self._active.step = None
        self._remember(step)
        logs = {**logs, "fisher_trace": self.state.fisher_trace.value}
        if not self._measures_trace:
            del logs["fisher_trace"]
        if self.penalty is not None:
            logs["fisher_penalty"] = self.state.fisher_penalty.value
            logs["fisher_nonfinite"] = self.state.fisher_nonfinite.value
        return logs, step.measurement()

    @property
    def _measures_trace(self) -> bool:
        return self.trace_every is not None or self.penalty.measures_trace

    def __call__(self, *args, **kwargs):
        step = getattr(self._active, "step", None)
        if step is None:
            return super().__call__(*args, **kwargs)
        return step.forward_pass(*args, **kwargs)

    def compute_loss(
        self,
        x=None,
        y=None,
        y_pred=None,
        sample_weight=None,
        training=True,
    ):
        y, sample_weight = (
            memorization.label_of(y),
            memorization.weight_of(sample_weight),
        )
        step = getattr(self._active, "step", None)
        with contextlib.nullcontext() if step is None else step.recorded():
            loss = super().compute_loss(
                x, y, y_pred, sample_weight, training=training
            )
        return loss if step is None else step.add_penalty(loss, y)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(
            x,
            memorization.label_of(y),
            y_pred,
            sample_weight=memorization.weight_of(sample_weight),
        )
        if memorization.has_noise_mask(y):
            logs = {
                **logs,
                **self._memorization.update_state(y, y_pred, self.likelihood),
            }
        return logs

    def reset_metrics(self):
        super().reset_metrics()
        self._memorization.reset_state()
        if isinstance(self.train_function, train_function.TrainFunction):
            self.train_function.begin_epoch()

    def _remember(self, step: Step) -> None:
        if step.traces is not None:
            self.state.fisher_trace.assign(tf.reduce_sum(step.traces))
        if step.value is not None:
            self.state.fisher_penalty.assign(step.value)
            self.state.fisher_nonfinite.assign_add(
                tf.cast(step.is_lost, self.state.dtype)
            )

    # Building and checking.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras's own adds up the parts of replicas, where it needs shapes: it
        # fails for parts of unequal sizes, and with several workers.
        strategy = self.distribute_strategy
        if iterator is not None and strategy.num_replicas_in_sync > 1:
            iterator, data_batch = (
                None,
                replicas.first_batch(strategy, iterator),
            )
        super()._maybe_symbolic_build(iterator, data_batch)

    def _build_before_tracing(self, iterator) -> None:
        """Creates all variables, so that each step is traced once.

        TensorFlow traces a function that creates variables a second time.
        """
        if self.run_eagerly or not isinstance(iterator, tf.data.Iterator):
            return
        specs = keras.tree.map_structure(
            lambda spec: None if isinstance(spec, tf.OptionalSpec) else spec,
            iterator.element_spec,
        )
        _, y, _ = keras.utils.unpack_x_y_sample_weight(specs)
        leaves = keras.tree.flatten(specs)
        if y is not None and all(
            leaf is None or isinstance(leaf, tf.TensorSpec) for leaf in leaves
        ):
            self._symbolic_build(data_batch=specs)

    def _build(self, data) -> None:
        """Creates what a step needs, before it starts."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if not (self.built and self.model.built):
            self(x)
        self._check_trainable()
        self._create_stored_gradients()
        self._check_outputs(x)

    def _create_stored_gradients(self) -> None:
        if self.penalty is not None and self.penalty.stores_gradient:
            self.state.create_gradients(self.model)

    def _check_trainable(self) -> None:
        if not self.model.trainable_variables:
            raise ValueError(
                "No variable of the model is trainable, so its Fisher "
                f"information is empty. Received: {self.model.name} with "
                f"trainable={self.model.trainable}. Unfreeze a layer before "
                "`compile()`, or pass `penalty=None, trace_every=None`."
            )

    def _check_labels(self, y) -> None:
        """Refuses labels that XLA would take without a word."""
        outputs = structures.symbolic_outputs(self.model)
        known = self.likelihood is not None and outputs is not None
        if y is not None and known:
            classes = structures.apply(lambda t: t.shape[-1], outputs)
            self.likelihood.check_labels(y, classes)

    def _check_weights(self) -> None:
        """Warns of what no log says: a last step that overflows."""
        lost = [
            variable.path
            for variable in self.model.weights
            if keras.backend.is_float_dtype(variable.dtype)
            and not tf.reduce_all(tf.math.is_finite(variable.value))
        ]
        if lost:
            warnings.warn(
                "Training has ended with weights that are NaN or infinite. "
                f"Received: {len(lost)} such variables of "
                f"{len(self.model.weights)}, first {lost[0]!r}. Go back to "
                "weights saved earlier, look for what overflows "
                "(`tf.debugging.enable_check_numerics()` says where), and "
                "have `keras.callbacks.TerminateOnNaN` end the training at "
                "the first loss that is NaN.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_outputs(self, x) -> None:
        """Refuses outputs that are not what the likelihood expects.

        Tried on an example of zeros, outside the graph that is being traced.
        """
        if getattr(self.likelihood, "from_logits", True):
            return
        leaves = keras.tree.flatten(x)
        if any(None in leaf.shape[1:] for leaf in leaves):
            return
        if self.distribute_strategy.num_replicas_in_sync > 1:
            return
        with tf.init_scope():
            zeros = keras.tree.map_structure(
                lambda leaf: tf.zeros([1, *leaf.shape[1:]], leaf.dtype), x
            )
            self.likelihood.check(self.model(zeros, training=False))

    # The function that `fit` calls.

    def make_train_function(self, force=False):
        if not self._schedule.observes:
            return super().make_train_function(force)
        if self.train_function is None or force:
            self.train_function = train_function.TrainFunction(
                self,
                self._schedule,
                self._planned_step,
                self._build_before_tracing,
            )
        return self.train_function

    make_train_function.__doc__ = keras.Model.make_train_function.__doc__

    @property
    def measurements(self) -> train_function.Measurements:
        """What the last call of the train function has measured.

        That are the last `steps_per_execution` steps. Callbacks read it in
        `on_train_batch_end`; doing so waits for the steps to end, unless it
        is known without that nothing was measured.
        """
        if isinstance(self.train_function, train_function.TrainFunction):
            return self.train_function.measurements
        return train_function.NOTHING_MEASURED


def _check_wrappable(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`FisherModel` wraps a `keras.Model`. Received: "
            f"{model!r} of type {type(model).__name__}. Put layers into a "
            "`keras.Sequential` first."
        )
    own = [
        name
        for name in ("train_step", "compute_loss")
        if getattr(type(model), name) is not getattr(keras.Model, name)
    ]
    if own:
        raise ValueError(
            "`FisherModel` trains with its own step, so that the "
            f"`{'` and `'.join(own)}` of {type(model).__name__} would have no "
            "effect. Wrap the network inside of it, or use "
            "`keras_fisher.layers.FisherRegularization`, which works with any "
            "training step."
        )
