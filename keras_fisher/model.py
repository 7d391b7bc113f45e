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
import functools
import math
import threading
from typing import Any
from typing import NamedTuple
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_fisher import checks
from keras_fisher import gradients as gradients_lib
from keras_fisher import likelihoods
from keras_fisher import metrics
from keras_fisher import outputs as outputs_lib
from keras_fisher import penalties
from keras_fisher import workers
from keras_fisher.state import FisherState

_NOTHING, _FRESH, _REUSED = range(3)  # what a step does with the penalty
_LONGEST_PERIOD = 100_000


class Plan(NamedTuple):
    """What one step does besides training; each has its own function.

    Attributes:
        penalize: Nothing, a fresh penalty, or the reused gradient.
        measure: Whether Tr(F) is measured.
    """

    penalize: int
    measure: bool

    @property
    def observes(self) -> tf.Tensor:
        """Whether there is something to tell of the step."""
        return tf.constant(self.measure or self.penalize == _FRESH)


class Measurements(NamedTuple):
    """What the steps of the last call of the train function have measured.

    Attributes:
        step: Optimizer steps, counted from 0, of shape `(measured,)`: the
            number of updates that came before.
        trace_by_variable: Tr(F) of each trainable variable, of shape
            `(measured, variables)`.
        penalty: Value of the penalty, of shape `(measured,)`; NaN where a
            step has measured Tr(F) alone.
        batch_size: Number of examples, of all replicas, of shape
            `(measured,)`.
    """

    step: np.ndarray
    trace_by_variable: np.ndarray
    penalty: np.ndarray
    batch_size: np.ndarray


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
        self._memorization = metrics.MemorizationAccuracy()
        self.built = model.built
        # Mirrored replicas trace their steps in threads of their own.
        self._active = threading.local()
        self._last_call = None
        self._next_step = None  # not known before an epoch begins
        self._last_step = -1  # that measurements were told of
        if self._observes:
            self.seed_generator = keras.random.SeedGenerator(seed)
            self.state = FisherState(
                likelihoods.compute_dtype(self.variable_dtype).name
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
        if not self._observes:
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
        self._check_labels(metrics.label_of(y))
        history = super().fit(x, y, *args, **kwargs)
        self._check_weights()
        return history

    fit.__doc__ = keras.Model.fit.__doc__

    # Which steps do what.

    @property
    def _observes(self) -> bool:
        return self.penalty is not None or self.trace_every is not None

    def observed(self, steps: np.ndarray) -> np.ndarray:
        """Whether there is something to tell of each of some optimizer steps.

        Args:
            steps: Optimizer steps, counted from 0; integers of any shape.

        Returns:
            Booleans of the same shape: whether Tr(F) is measured or a penalty
            computed at these steps.
        """
        steps = np.asarray(steps)
        if not self._observes:
            return np.zeros(steps.shape, bool)
        penalize, measure = np.divmod(self._codes(steps), 2)
        return (measure == 1) | (penalize == _FRESH)

    def _codes(self, step):
        """The plan for a step as an integer; `step` may be an array."""
        nothing = 0 * step
        integer = _caster(step)
        fresh = reused = measured = nothing
        if self.trace_every is not None:
            measured = integer(step % self.trace_every == 0)
        if self.penalty is not None:
            fresh = integer(self.penalty.is_fresh(step))
            if self.penalty.stores_gradient:
                reused = integer(self.penalty.is_active(step)) - fresh
            if self.penalty.measures_trace:
                # In passing, so that these steps are all alike.
                measured = measured | fresh
        return 2 * (_FRESH * fresh + _REUSED * reused) + measured

    @staticmethod
    def _plan(code: int) -> Plan:
        penalize, measure = divmod(int(code), 2)
        return Plan(penalize, bool(measure))

    def _reachable_codes(self) -> list[int]:
        """The plans that some step follows, so that no other is compiled."""
        every = 1 if self.penalty is None else self.penalty.every
        period = math.lcm(every, self.trace_every or 1)
        if period > _LONGEST_PERIOD:
            return list(range(6))
        phases = [0]
        if self.penalty is not None:
            phases += [self.penalty.start, self.penalty.stop or 0]
        steps = [np.arange(first, first + period) for first in phases]
        return sorted(set(self._codes(np.concatenate(steps)).tolist()))

    # The step.

    def train_step(self, data):
        if not self._observes:
            logs = super().train_step(data)
            return workers.with_axis(self.distribute_strategy, logs)
        logs, _ = self._choose(
            lambda plan: self._planned_step(data, None, plan),
            self._reachable_codes(),
        )
        return logs

    def test_step(self, data):
        logs = super().test_step(data)
        return workers.with_axis(self.distribute_strategy, logs)

    def _choose(self, function, codes: list[int]):
        """Calls `function` with the plan for this step."""
        if len(codes) == 1:
            return function(self._plan(codes[0]))
        step = tf.cast(
            tf.convert_to_tensor(self.optimizer.iterations), tf.int64
        )
        code = self._codes(step)
        if tf.executing_eagerly():
            return function(self._plan(int(code)))
        index = tf.argmax(
            tf.cast(code == tf.constant(codes, tf.int64), tf.int32)
        )
        return tf.switch_case(
            tf.cast(index, tf.int32),
            [lambda c=c: function(self._plan(c)) for c in codes],
        )

    def _planned_step(self, data, examples, plan: Plan):
        """Keras's train step, with what `plan` adds to it.

        Args:
            data: The batch of this replica.
            examples: Number of examples of all replicas; None if each has as
                many as this one.
            plan: What to do.
        """
        self._build(data)
        step = _Step(self, plan, examples)
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
        y, sample_weight = metrics.label_of(y), metrics.weight_of(sample_weight)
        step = getattr(self._active, "step", None)
        with contextlib.nullcontext() if step is None else step.recorded():
            loss = super().compute_loss(
                x, y, y_pred, sample_weight, training=training
            )
        return loss if step is None else step.add_penalty(loss, y)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(
            x,
            metrics.label_of(y),
            y_pred,
            sample_weight=metrics.weight_of(sample_weight),
        )
        if metrics.has_noise_mask(y):
            logs = {
                **logs,
                **self._memorization.update_state(y, y_pred, self.likelihood),
            }
        return logs

    def reset_metrics(self):
        super().reset_metrics()
        self._memorization.reset_state()
        # An epoch begins: what was loaded before may have another step.
        self._next_step = None
        self._last_step = -1

    def _remember(self, step: _Step) -> None:
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
            iterator, data_batch = None, workers.first_batch(strategy, iterator)
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
        outputs = likelihoods.symbolic_outputs(self.model)
        known = self.likelihood is not None and outputs is not None
        if y is not None and known:
            classes = outputs_lib.apply(lambda t: t.shape[-1], outputs)
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
        if not self._observes:
            return super().make_train_function(force)
        if self.train_function is None or force:
            self.train_function = self._make_train_function()
        return self.train_function

    make_train_function.__doc__ = keras.Model.make_train_function.__doc__

    def _make_train_function(self):
        """One function for each plan, and another that picks one a step.

        Only the former are compiled by XLA: on CPUs, convolutions inside a
        conditional of a compiled function are an order of magnitude slower.
        """
        codes = self._reachable_codes()
        steps = {
            plan: self._compiled_step(plan) for plan in map(self._plan, codes)
        }
        strategy = self.distribute_strategy

        @_after_its_batch
        def one_step(data):
            data = _without_optionals(data)
            number = tf.cast(
                tf.convert_to_tensor(self.optimizer.iterations), tf.int64
            )
            examples = None
            if strategy.num_replicas_in_sync > 1:
                # Here: no replica may ask the others in a conditional.
                sizes = strategy.run(_number_of_examples, args=(data,))
                examples = strategy.reduce("SUM", sizes, axis=None)

            def run(plan):
                logs, measurement = strategy.run(
                    steps[plan], args=(data, examples)
                )
                size = measurement.pop("batch_size")
                logs, measurement = keras.tree.map_structure(
                    lambda value: strategy.reduce("MEAN", value, axis=None),
                    (logs, measurement),
                )
                size = strategy.reduce("SUM", size, axis=None)
                return logs, {
                    **measurement,
                    "batch_size": size,
                    "measured": plan.observes,
                }

            logs, measurement = self._choose(run, codes)
            return logs, {"step": number, **measurement}

        if not self.run_eagerly:
            one_step = tf.function(
                one_step, reduce_retracing=True, autograph=False
            )
        many_steps = _repeated(one_step, self.steps_per_execution)
        if not self.run_eagerly:
            many_steps = tf.function(
                many_steps, reduce_retracing=True, autograph=False
            )

        def train_function(iterator):
            if self._next_step is None:
                self._next_step = step_of(self)
                self._build_before_tracing(iterator)
            if isinstance(
                iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)
            ):
                logs, measured = many_steps(iterator)
            else:
                results = [
                    one_step(data)
                    for _, data in zip(
                        range(self.steps_per_execution), iterator
                    )
                ]
                logs = results[-1][0]
                measured = _stacked([measured for _, measured in results])
            steps = np.arange(self.steps_per_execution) + self._next_step
            self._last_call = _Call(steps, measured)
            self._next_step += len(steps)
            return logs

        return train_function

    def _compiled_step(self, plan: Plan):
        @_after_its_batch
        def step(data, examples):
            return self._planned_step(data, examples, plan)

        if not self.jit_compile:
            return step
        return tf.function(
            step, jit_compile=True, reduce_retracing=True, autograph=False
        )

    @property
    def measurements(self) -> Measurements:
        """What the last call of the train function has measured.

        That are the last `steps_per_execution` steps. Callbacks read it in
        `on_train_batch_end`; doing so waits for the steps to end, unless it
        is known without that nothing was measured.
        """
        call = self._last_call
        if call is None:
            return _NOTHING_MEASURED
        if call.measurements is None:
            call.measurements = self._measurements_of(call)
        return call.measurements

    def _measurements_of(self, call: _Call) -> Measurements:
        if not self.observed(call.steps).any():
            return _NOTHING_MEASURED
        values = {k: np.asarray(v) for k, v in call.tensors.items()}
        self._next_step = int(values["step"][-1]) + 1
        # Of the batches whose gradients one step accumulates, the first.
        is_new = np.diff(values["step"], prepend=self._last_step) > 0
        self._last_step = int(values["step"][-1])
        kept = values.pop("measured") & is_new
        return Measurements(**{k: v[kept] for k, v in values.items()})


_NOTHING_MEASURED = Measurements(
    np.zeros([0], np.int64),
    np.zeros([0, 0]),
    np.zeros([0]),
    np.zeros([0], np.int64),
)


class _Call:
    """One call of the train function, as the host knows it.

    Attributes:
        steps: All optimizer steps it may have made. Where there were fewer
            (the last ones of an epoch, or steps that loss scaling has skipped)
            the host is ahead, looks too early, and learns the true number.
        tensors: What was measured, not waited for.
        measurements: The same, once a callback has asked for it.
    """

    def __init__(self, steps: np.ndarray, tensors: dict[str, tf.Tensor]):
        self.steps = steps
        self.tensors = tensors
        self.measurements: Measurements | None = None


class _Step:
    """One step under way: what its forward pass has left for its loss."""

    def __init__(self, owner: FisherModel, plan: Plan, examples):
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
        return (
            self.plan.penalize == _FRESH and self.owner.penalty.stores_gradient
        )

    @contextlib.contextmanager
    def recorded(self):
        """Records for the gradient of a fresh penalty."""
        if self.plan.penalize != _FRESH:
            yield
            return
        with self._tape:
            for variable in self.owner.model.trainable_variables:
                self._tape.watch(variable.value)
            yield

    def forward_pass(self, x, training=True):
        owner = self.owner
        if self.plan.penalize == _FRESH:
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
        first = outputs_lib.leaves(outputs)[0]
        self.batch_size = tf.shape(first, tf.int64)[0]
        return outputs

    def add_penalty(self, loss: tf.Tensor, y) -> tf.Tensor:
        owner, plan = self.owner, self.plan
        replicas = owner.distribute_strategy.num_replicas_in_sync
        scale = owner.optimizer.scale_loss(1.0)
        if plan.penalize != _NOTHING and loss.shape.rank:
            # Of an empty batch Keras takes no mean, where it knows its size.
            loss = tf.reduce_sum(loss)
        if plan.penalize == _FRESH:
            loss = self._add_fresh(loss, y, replicas, scale)
        elif plan.penalize == _REUSED:
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
        is_finite = tf.math.is_finite(
            self.value
        ) & gradients_lib.has_finite_norm(gradients)
        self.is_lost = ~is_finite
        if self._stores:
            self._store(gradients_lib.replaced_unless(is_finite, gradients))
        if _skips_steps(owner.optimizer):
            # For all replicas, by the gradients of the first.
            gradients = gradients_lib.replaced_unless(
                workers.on_all_replicas(is_finite), gradients, float("nan")
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


def _number_of_examples(data) -> tf.Tensor:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    return tf.shape(keras.tree.flatten(x)[0], tf.int64)[0]


def _skips_steps(optimizer) -> bool:
    """Whether an optimizer skips steps with gradients that are not finite."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _accumulation_steps(optimizer) -> int:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.gradient_accumulation_steps or 1


def _caster(step):
    if tf.is_tensor(step):
        return lambda condition: tf.cast(condition, step.dtype)
    return lambda condition: np.asarray(condition).astype(np.int64)


def _without_optionals(data):
    return keras.tree.map_structure(
        lambda x: None if isinstance(x, tf.experimental.Optional) else x, data
    )


def _stacked(measurements: list[dict]) -> dict:
    return {
        key: tf.stack([m[key] for m in measurements]) for key in measurements[0]
    }


def _after_its_batch(function):
    """Decorates what is called with a batch: it does nothing if there is none.

    What does not depend on the batch, as counting steps and drawing seeds,
    would run beside the iterator that finds the data at an end. Replicas do not
    heed what the function that runs them waits for, so they wait themselves.
    """

    @functools.wraps(function)
    def after(*arguments):
        leaves = tf.nest.flatten(arguments, expand_composites=True)
        there = [leaf for leaf in leaves if tf.is_tensor(leaf)]
        with tf.control_dependencies([tf.group(there)]):
            return function(*arguments)

    return after


def _repeated(one_step, count: int):
    """Up to `count` steps on the next batches of an iterator.

    Returns:
        Function of an iterator that returns the logs of the last step and the
        measurements of all. It raises `tf.errors.OutOfRangeError` if there is
        no batch left to begin with.
    """

    def steps(iterator):
        logs, measured = one_step(iterator.get_next())
        if count == 1:
            return logs, _stacked([measured])
        arrays = {
            key: tf.TensorArray(
                value.dtype, count, element_shape=value.shape
            ).write(0, value)
            for key, value in measured.items()
        }

        def body(i, _, logs, arrays):
            batch = iterator.get_next_as_optional()

            def go_on():
                return True, *one_step(batch.get_value())

            def end():
                nothing = {
                    key: tf.zeros(value.shape, value.dtype)
                    for key, value in measured.items()
                }
                return False, logs, nothing

            more, logs, found = tf.cond(batch.has_value(), go_on, end)
            arrays = {k: a.write(i, found[k]) for k, a in arrays.items()}
            return i + tf.cast(more, tf.int32), more, logs, arrays

        i, _, logs, arrays = tf.while_loop(
            lambda i, more, *_: more & (i < count),
            body,
            (tf.constant(1), tf.constant(True), logs, arrays),
        )
        return logs, {k: a.gather(tf.range(i)) for k, a in arrays.items()}

    return steps


def step_of(model: keras.Model) -> int:
    """Number of updates that a model has seen; waits for those under way."""
    return int(tf.convert_to_tensor(model.optimizer.iterations))


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
