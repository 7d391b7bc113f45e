"""`FisherModel`: what happens to a batch, from the data to the logs.

A step follows the plan of its number (`_training.schedule`): it does what
Keras's own does, or it also measures Tr(F), computes a penalty, or uses the
gradient of one again (`_observed_step`). A penalty is in the gradient alone:
whatever Keras does with gradients (scaling, clipping, replicas, accumulation)
it does with that of the penalty, and the loss in the logs stays the user's.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_fisher import penalties
from keras_fisher._common import keras_layers
from keras_fisher._common.noisy_targets import label_of
from keras_fisher._common.noisy_targets import weight_of
from keras_fisher._common.structures import output_names
from keras_fisher._training import class_weights
from keras_fisher._training import derivative_watch
from keras_fisher._training import model_checks
from keras_fisher._training import optimizers
from keras_fisher._training import replicas
from keras_fisher._training import schedule
from keras_fisher._training.evaluation import Evaluation
from keras_fisher._training.first_look import FirstLook
from keras_fisher._training.guarded_gradient import guarded_gradient
from keras_fisher._training.measurements import NOTHING_MEASURED
from keras_fisher._training.measurements import Measurements
from keras_fisher._training.measurements import Observed
from keras_fisher._training.replicas import Division
from keras_fisher._training.replicas import Share
from keras_fisher._training.schedule import Plan
from keras_fisher._training.settings import Settings
from keras_fisher._training.trace_measurement import TraceMeasurement
from keras_fisher._training.train_function import TrainFunction
from keras_fisher.likelihoods import output_checks

_FIT = inspect.signature(keras.Model.fit)
_TRAIN_ON_BATCH = inspect.signature(keras.Model.train_on_batch)


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherModel(Settings, Evaluation):
    """Trains a model while measuring, and penalizing, its Fisher information.

    The trace of the Fisher Information Matrix,

        Tr(F) = E_x E_{ŷ ~ p_θ(y|x)} ‖∇_θ -log p_θ(ŷ|x)‖²,

    is estimated from the training batch, without bias, by B ‖ĝ‖², where ĝ is
    the gradient of the batch's mean negative log-likelihood with labels that
    are sampled from the model. The Fisher Penalty adds α ‖ĝ‖² to the loss.

    Everything else is `keras.Model`: `compile`, `fit`, `evaluate`, `predict`,
    `save`. Entries join the logs, each the last value measured and no mean:
    `fisher_trace`, with a penalty `fisher_penalty` and, if it has a bound,
    `fisher_ratio`, ‖∇penalty‖ / ‖∇loss‖ before the bound. The loss and the
    metrics stay the user's own, without the penalty.

    A penalty whose value, or the squared norm of whose gradient, is not finite
    does not reach the weights: its gradient is left out, and with it that of
    the loss where both are computed in one (without a bound, and unless a
    gradient is stored to be reused). The entry `fisher_nonfinite` of the logs
    counts the batches where this happened, of all replicas and as long as the
    model lives, and the loss of such a batch becomes NaN, which ends the
    training if `keras.callbacks.TerminateOnNaN` looks on. Under loss scaling
    (`mixed_float16`) the optimizer skips the whole step and the loss stays
    what it is.

    Targets may carry noise flags, `{"label": ..., "is_noisy": ...,
    "true_label": ...}` as from `keras_fisher.datasets.add_label_noise`; the
    logs then also have `clean_accuracy`, `noisy_accuracy` and (with true
    labels) `recovered_accuracy`.

    Source: Jastrzebski et al., *Catastrophic Fisher Explosion: Early Phase
    Fisher Matrix Impacts Generalization*, ICML 2021 (arXiv:2012.14193),
    sections 2 and 4.

    Args:
        model: Any `keras.Model`. It is wrapped, not copied: after training,
            `fisher_model.model` is trained. A `predict_step` or `test_step`
            of its own is called; for the latter `compile` compiles it too,
            unless it has a `compile` of its own, which is to be called before.
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
        network, penalty=keras_fisher.FisherPenalty()
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
        **kwargs: Any,
    ):
        model_checks.check_wrappable(model)
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(
            model, penalty, likelihood, trace_every, seed, **kwargs
        )
        self._measurement = TraceMeasurement()
        self.built = model.built

    # As a Keras model.

    def build(self, input_shape):
        # Others are built when they are called, as in Keras.
        if isinstance(self.model, keras.Sequential) and not self.model.built:
            self.model.build(input_shape)
        self.built = True

    def call(self, inputs, training=None, mask=None):
        given = {"training": training}
        if keras_layers.takes_mask(self.model):
            given["mask"] = mask
        given = {k: v for k, v in given.items() if v is not None}
        return self.model(inputs, **given)

    def compute_mask(self, inputs, previous_mask):
        # The outputs of the wrapped model bring their own.
        return None

    @property
    def output_names(self):
        return self.model.output_names

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "model": _serialized(self.model),
            "penalty": keras.saving.serialize_keras_object(self.penalty),
            "likelihood": "auto"
            if self._finds_likelihood
            else keras.saving.serialize_keras_object(self.likelihood),
            "trace_every": self.trace_every,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> FisherModel:
        # A scope of none would hide those of a scope that is around.
        scope = keras.saving.custom_object_scope
        with (
            scope(custom_objects)
            if custom_objects
            else contextlib.nullcontext()
        ):
            model = keras.saving.deserialize_keras_object(config["model"])
            return cls(**{**config, "model": model})

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        if self.optimizer is not None and optimizers.step_of(self) == 0:
            self.state.begin_run()
        try:
            self._prepare_training()
        except Exception:
            self.compiled = False
            raise

    compile.__doc__ = keras.Model.compile.__doc__

    def compile_from_config(self, config: dict) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.model.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *args, **kwargs):
        names = output_names(self.model)
        if self._schedule.observes:
            labels = label_of(y, names)
            model_checks.check_labels(self.model, self.likelihood, labels)
        bound = _FIT.bind(self, x, y, *args, **kwargs)
        class_weights.become_sample_weights(bound, names)
        history = super().fit(**_by_name(bound))
        model_checks.warn_of_lost_weights(self.model, stacklevel=2)
        return history

    fit.__doc__ = keras.Model.fit.__doc__

    def train_on_batch(self, x, y=None, *args, **kwargs):
        bound = _TRAIN_ON_BATCH.bind(self, x, y, *args, **kwargs)
        names = output_names(self.model)
        class_weights.become_sample_weights(bound, names)
        return super().train_on_batch(**_by_name(bound))

    train_on_batch.__doc__ = keras.Model.train_on_batch.__doc__

    def set_weights(self, weights):
        # A penalty assigned since, within `fit` perhaps, has made room for
        # more: so `EarlyStopping` has fewer to restore.
        later = self.weights[len(weights) :]
        if all(any(v is own for own in self.state.variables) for v in later):
            weights = [*weights, *(v.numpy() for v in later)]
        super().set_weights(weights)

    set_weights.__doc__ = keras.Model.set_weights.__doc__

    def export(self, *args, **kwargs):
        # What serves is the network, and it knows its inputs.
        keras_layers.call_symbolically(self.model)
        return self.model.export(*args, **kwargs)

    export.__doc__ = keras.Model.export.__doc__

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

    def predict_step(self, data):
        outputs = self.model.predict_step(data)
        self.built = self.built or self.model.built
        return outputs

    def _planned_step(self, data, division: Division | None, plan: Plan):
        """A step that does what its plan says.

        Args:
            data: The batch of this replica.
            division: Of the batch among replicas; None if each has as many
                examples as this one.
            plan: What to do.

        Returns:
            The logs, and what was measured.
        """
        self._prepare(data)
        alpha = None
        if self.penalty is not None:
            alpha = self.penalty.alpha_at(self.optimizer.iterations)
        if plan.is_plain:
            logs, observed = super().train_step(data), Observed()
        else:
            logs, observed = self._observed_step(data, division, plan)
        self.state.remember(observed)
        logs = {**logs}
        if self.trace_every is not None or self.penalty.measures_trace:
            logs["fisher_trace"] = self.state.last_trace()
        if self.penalty is not None:
            logs["fisher_penalty"] = self.state.fisher_penalty.value
            logs["fisher_nonfinite"] = self.state.fisher_nonfinite.value
            if self.penalty.bound is not None:
                logs["fisher_ratio"] = self.state.last_ratio()
        return logs, observed._replace(alpha=alpha).tensors(
            len(self.model.trainable_variables), self.state.dtype
        )

    def _observed_step(self, data, division: Division | None, plan: Plan):
        """All that happens to a batch that is penalized or measured.

        As in Keras's own step: forward pass, loss, gradients, update, metrics.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        optimizer, variables = self.optimizer, self.trainable_variables
        scale = optimizer.scale_loss(1.0)
        share = Share.of(x, division, optimizer, self.distribute_strategy)
        is_fresh = plan.penalize == schedule.FRESH
        is_apart = is_fresh and self.penalty.is_apart
        observer = self.penalty if is_fresh else self._measurement
        penalty = traces = is_usable = ratio = None

        # Forward pass, loss, penalty.
        with tf.GradientTape(persistent=is_apart) as tape:
            forward = observer.forward(self.model, x, seed=self.seed_generator)
            if not tf.executing_eagerly():
                output_checks.check_traced(
                    self.likelihood, forward.layer_outputs
                )
            loss = self.compute_loss(x, y, forward.outputs, sample_weight)
            objective = optimizer.scale_loss(tf.reduce_sum(loss))
            if is_fresh:
                term = self._term(self.penalty, forward, share, y)
                penalty, traces = share.weighted(term.value), term.traces
                penalized = optimizer.scale_loss(penalty)
                if not is_apart:
                    penalized = objective + share.in_loss(penalized, objective)
        if plan.measure and traces is None:
            traces = self._term(self._measurement, forward, share, y).traces

        # Gradients, with that of a penalty only if it is finite.
        own = None  # of the penalty
        if is_fresh:
            guarded = guarded_gradient(
                tape, penalized, variables, penalty, scale
            )
            is_usable = guarded.is_usable
            own, loss = guarded.for_optimizer(
                loss, optimizers.skips_steps(optimizer)
            )
            self._penalty_gradient.store(guarded)
        elif plan.penalize == schedule.REUSED:
            own = self._penalty_gradient.stored()
        if is_fresh and not is_apart:
            gradients = own  # which is of both
        else:
            gradients = tape.gradient(objective, variables)
            if own is not None:
                gradients, ratio = self._penalty_gradient.added_to(
                    gradients, own
                )

        # Update, metrics, logs.
        optimizer.apply_gradients(zip(gradients, variables))
        self._loss_tracker.update_state(share.of_all(loss), share.batch_size)
        logs = self.compute_metrics(x, y, forward.outputs, sample_weight)
        traces = None if traces is None else share.weighted(traces)
        return logs, Observed(
            traces, penalty, is_usable, share.batch_size, ratio
        )

    def _term(self, penalty, forward, share: Share, y) -> penalties.Term:
        """A penalty on this replica's batch."""
        return penalty(
            forward,
            self.likelihood,
            label_of(y, output_names(self.model, forward.outputs)),
            seed=self.seed_generator,
            loss_scale=self.optimizer.scale_loss(1.0),
            batches=share.batches,
            step=self.optimizer.iterations,
        )

    def compute_loss(
        self,
        x=None,
        y=None,
        y_pred=None,
        sample_weight=None,
        training=True,
    ):
        names = output_names(self.model, y_pred)
        loss = super().compute_loss(
            x,
            label_of(y, names),
            y_pred,
            weight_of(sample_weight, names),
            training=training,
        )
        # Of an empty batch Keras takes no mean, where it knows its size.
        is_of_none = loss.shape.num_elements() == 0
        return tf.reduce_sum(loss) if is_of_none else loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        names = output_names(self.model, y_pred)
        logs = super().compute_metrics(
            x,
            label_of(y, names),
            y_pred,
            sample_weight=weight_of(sample_weight, names),
        )
        return {**logs, **self._memorized(y, y_pred, names)}

    def reset_metrics(self):
        super().reset_metrics()
        if isinstance(self.train_function, TrainFunction):
            self.train_function.begin_epoch()

    # Building and checking.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras's own adds up the shares of replicas, where it needs shapes: it
        # fails for shares of unequal sizes, and with several workers.
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

    def _prepare(self, data) -> None:
        """Creates what a step needs, before it starts."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if not (self.built and self.model.built):
            self(x)
        model_checks.check_trainable(self.model)
        model_checks.check_excluded(self.penalty, self.model)
        self._penalty_gradient.create_state(self.trainable_variables)
        if tf.executing_eagerly():  # And maybe in a loop of one's own.
            self._operation_look.look(x)
            self._output_look.look(x)

    # The function that `fit` calls.

    def make_train_function(self, force=False):
        if not self._schedule.observes:
            return super().make_train_function(force)
        model_checks.check_heeds(type(self), FisherModel)
        if self.train_function is None or force:
            self.train_function = TrainFunction(
                self,
                self._schedule,
                self._planned_step,
                self._build_before_tracing,
                self._output_look,
                self._derivative_look(),
                # Assigned within a callback, for those that come behind it.
                self.measurements,
            )
        return self.train_function

    def _derivative_look(self) -> FirstLook | None:
        """What looks at layers that nobody knows, if they matter."""
        penalty = self.penalty
        if penalty is None or penalty.method != "exact":
            return None
        return derivative_watch.of(self.model)

    make_train_function.__doc__ = keras.Model.make_train_function.__doc__

    @property
    def measurements(self) -> Measurements:
        """What the last call of the train function has measured.

        That are the last `steps_per_execution` steps. Callbacks read it in
        `on_train_batch_end`; doing so waits for the steps to end, unless it
        is known without that nothing was measured.
        """
        if isinstance(self.train_function, TrainFunction):
            return self.train_function.measurements
        return NOTHING_MEASURED


def _by_name(call: inspect.BoundArguments) -> dict:
    """The arguments of a method, for the same method of a base class."""
    return {k: v for k, v in call.arguments.items() if k != "self"}


def _serialized(model: keras.Model) -> dict:
    """As Keras does it, but for what it would warn of and not use."""
    config = keras.saving.serialize_keras_object(model)
    cls, plain = type(model), keras.Model
    if (
        cls.compile is not plain.compile
        and cls.compile_from_config is plain.compile_from_config
    ):
        config.pop("compile_config", None)
    return config
