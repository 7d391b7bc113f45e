"""`evaluate`, for networks that say themselves what a test step is.

Where the class of the wrapped model has a `test_step`, evaluation is that
model's: its step, its loss, its metrics and how they are reset. Keras asks a
model for its metrics in the midst of that, and is given those.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import inspect
from typing import Any

import keras

from keras_fisher._common import keras_layers
from keras_fisher._common.noisy_targets import has_noise_flags
from keras_fisher._common.noisy_targets import label_of
from keras_fisher._common.noisy_targets import weight_of
from keras_fisher._common.structures import output_names
from keras_fisher._training import model_checks
from keras_fisher._training import replicas
from keras_fisher._training.memorization import MemorizationAccuracy
from keras_fisher._training.raw_data import RawData
from keras_fisher._training.state import LOGGED

_COMPILE = inspect.signature(keras.Model.compile)
# Its arguments that a test step goes by.
_OF_TEST_STEPS = ("loss", "loss_weights", "metrics", "weighted_metrics")


class Evaluation(RawData):
    """Evaluates its `model`, by the `test_step` of that if it has one."""

    _is_evaluating = False
    _compilation: _Compilation | None = None  # that the traced step goes by

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._memorization = MemorizationAccuracy()

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        if not self._has_own_test_step:
            return
        if model_checks.is_own(type(self.model), "compile"):
            return  # It takes what only the user knows.
        given = _COMPILE.bind(self, *args, **kwargs).arguments
        self.model.compile(
            self.optimizer,
            **{k: v for k, v in given.items() if k in _OF_TEST_STEPS},
            run_eagerly=self.run_eagerly,
            steps_per_execution=self.steps_per_execution,
            jit_compile=self.jit_compile,
        )

    def fit(self, *args, **kwargs):
        has_data = kwargs.get("validation_data") is not None
        if has_data or kwargs.get("validation_split"):
            self._check_evaluation()  # rather than after an epoch
        return super().fit(*args, **kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):
        with self._evaluation():
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, *args, **kwargs):
        with self._evaluation():
            return super().test_on_batch(*args, **kwargs)

    def test_step(self, data):
        if self._has_own_test_step:
            logs = self._own_test_step(data)
        else:
            logs = super().test_step(data)
        return replicas.with_axis(self.distribute_strategy, logs)

    def make_test_function(self, force=False):
        if self._has_own_test_step:
            known, self._compilation = (
                self._compilation,
                _Compilation(self.model),
            )
            force |= known is None or not self._compilation.has(known)
        return super().make_test_function(force)

    make_test_function.__doc__ = keras.Model.make_test_function.__doc__

    @property
    def metrics(self):
        if self._is_evaluating:
            return self.model.metrics
        # Keras leaves out those of a model within a model.
        return [*super().metrics, *keras_layers.own_metrics(self.model)]

    def get_metrics_result(self):
        if not self._is_evaluating:
            return super().get_metrics_result()
        # A step may do without the metrics that `compile` got, which then
        # have no result: what it returns stands.
        has_all = all(getattr(m, "built", True) for m in self.metrics)
        return self.model.get_metrics_result() if has_all else {}

    def _get_metrics_result_or_logs(self, logs):
        # Logs of a step are means over replicas. As an epoch ends, Keras asks
        # the metrics, which have added up what all have seen, if nothing else
        # is in the logs; and here what is ours is.
        counted = self.get_metrics_result()
        ours = {**self._memorization.result(), **dict.fromkeys(LOGGED)}
        if counted.keys() - logs.keys() or logs.keys() - {*counted, *ours}:
            return logs
        known = {**ours, **counted}
        return {
            name: value if name in LOGGED else known[name]
            for name, value in logs.items()
        }

    def reset_metrics(self):
        if self._is_evaluating:
            self.model.reset_metrics()
        else:
            super().reset_metrics()
        self._memorization.reset_state()

    @property
    def _has_own_test_step(self) -> bool:
        return model_checks.is_own(type(self.model), "test_step")

    def _check_evaluation(self) -> None:
        """Raises a `ValueError` if the wrapped model cannot do its step."""
        if self._has_own_test_step:
            model_checks.check_compiled(self.model)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """In it, metrics are those of the model whose step is called."""
        if not self._has_own_test_step:
            yield
            return
        self._check_evaluation()
        super().reset_metrics()  # Of which both models may have some.
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False
            # What it has counted is not of the training that goes on.
            for metric in keras_layers.own_metrics(self.model):
                metric.reset_state()

    def _own_test_step(self, data: Any) -> dict:
        """The step of the wrapped model, which knows of no noise flags."""
        y = _targets(data)
        if not has_noise_flags(y):
            return self.model.test_step(data)
        outputs = self.model(data[0], training=False)
        names = output_names(self.model, outputs)
        logs = self.model.test_step(_without_flags(data, names))
        return {**logs, **self._memorized(y, outputs, names)}

    def _memorized(self, y: Any, outputs: Any, names: set[str]) -> dict:
        """Accuracies on clean and noisy examples, if it is known which."""
        if not has_noise_flags(y, names):
            return {}
        return self._memorization.update_state(y, outputs, self.likelihood)

    def _symbolic_build(self, iterator=None, data_batch=None):
        # Replicas create no variables, so that metrics have to be there.
        super()._symbolic_build(iterator, data_batch)
        if self._is_evaluating:
            names = output_names(self.model)
            self.model._symbolic_build(
                data_batch=_without_flags(data_batch, names)
            )


class _Compilation:
    """What a model is compiled with, as far as its metrics tell."""

    def __init__(self, model: keras.Model):
        # Also where a class has others: `compile` makes one for the loss.
        self._metrics = keras.Model.metrics.fget(model)

    def has(self, other: _Compilation) -> bool:
        """Whether all of the other's are here; some are made in a step."""
        mine = {id(metric) for metric in self._metrics}
        return all(id(metric) in mine for metric in other._metrics)


def _targets(data: Any) -> Any:
    """Those of a batch that may have any form; None if there are none."""
    return data[1] if isinstance(data, tuple) and len(data) > 1 else None


def _without_flags(data: Any, names: set[str]) -> Any:
    """A batch whose targets are labels, and its weights those of labels."""
    if not has_noise_flags(_targets(data), names):
        return data
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return keras.utils.pack_x_y_sample_weight(
        x, label_of(y, names), weight_of(sample_weight, names)
    )
