"""Keras's TensorBoard callback, with Tr(F) at the step it was measured."""

from __future__ import annotations

from collections.abc import Mapping
import math
import os
from typing import Any
import warnings

import keras
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import files
from keras_fisher._measuring.fisher_trace import fisher_trace
from keras_fisher._measuring.sums import groups_of
from keras_fisher._tensorboard import event_files
from keras_fisher._tensorboard import hyperparameters as hyperparameters_lib
from keras_fisher._tensorboard import run_directories
from keras_fisher._tensorboard import summaries
from keras_fisher._tensorboard import tags
from keras_fisher._training import replicas
from keras_fisher._training.optimizers import step_of
from keras_fisher.callbacks.early_phase import EarlyPhase
from keras_fisher.callbacks.early_phase import check_model
from keras_fisher.callbacks.heat_map import HeatMap
from keras_fisher.callbacks.probe import Probe


class FisherTensorBoard(keras.callbacks.TensorBoard):
    """Writes what `keras.callbacks.TensorBoard` does, and Tr(F) beside it.

    For a `FisherModel`. The curves, all at the optimizer's step (the number of
    updates before), none a running mean:

    * `fisher/trace`, `fisher/penalty`, `fisher/trace_by_layer/<path>`: each
      measurement, whatever `update_freq` and `steps_per_execution` are.
    * `fisher/alpha`: α of the penalty, if it is not one number throughout;
    * `fisher/ratio`: with a bound, ‖∇penalty‖ / ‖∇loss‖ before it, at steps
      that compute the penalty, or measure and use it again.
    * `fisher/explosion`: the largest Tr(F) so far over the first.
    * `fisher/early_trace`: TrF_i, one point (see `EarlyPhase`), and
      `fisher/early_threshold`, what the monitored value has to cross.
    * `fisher/probe_trace`, `fisher/probe_trace_by_layer/<path>`: with `probe`.
    * `memorization/clean_accuracy`, `memorization/noisy_accuracy`,
      `memorization/recovered_accuracy` and `memorization/gap` (clean minus
      noisy), over each epoch, where targets carry noise flags.

    Beside the curves: charts of the Custom Scalars page; a row of the HParams
    page, with the hyperparameters of model, optimizer and penalty, and TrF_i,
    the peak of Tr(F), the explosion ratio and the last accuracies (without
    any, all that the logs hold) as metrics; an image of Tr(F) by layer and
    step, `fisher/heat_map`, at the ends of epochs, as often as it takes 1 % of
    the time.

    A directory holds one run. A run that is resumed (its optimizer's step is
    not 0) goes on in it: points of steps that it will repeat, which a killed
    process has left, are taken out of the event files, and the files as they
    were are kept under names that TensorBoard does not read. So it is, with a
    warning, for all points of a run that starts at step 0 where one with the
    same hyperparameters has begun and not ended. Any other run that starts in
    a directory that holds one already, or that another process is writing, is
    written to `run_2`, `run_3`, ... inside of it, with a warning.

    With several workers the chief alone writes. The others read the directory
    when a run is resumed, so they should share it.

    Args:
        log_dir: Directory of the run.
        *args: Other arguments of `keras.callbacks.TensorBoard`.
        early_phase: An `EarlyPhase` that says where the early phase ends; None
            for one with its defaults.
        probe: Examples on which Tr(F) is measured with little noise, by
            `fisher_trace`: an array `x`, or a tuple `(x, y)`.
        probe_every: When: `"epoch"` for the start and the end of each epoch,
            or every so many optimizer steps, at the end of the call of the
            train function that has made the step.
        probe_estimator: Estimator of the probe, as of `fisher_trace`.
        by_layer: Whether to write Tr(F) of each layer.
        heat_map: Whether to draw it; needs matplotlib.
        write_every: Write only measurements at steps that are multiples of
            this.
        hyperparameters: Mapping of others to add for the HParams page.
        **kwargs: Other arguments of `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: If an argument is not as described; when training starts,
            if the model is not a `FisherModel`, `log_dir` cannot be written,
            or `probe` does not fit the model.

    Example:
    ```python
    board = keras_fisher.callbacks.FisherTensorBoard(
        "logs/lr=0.1", probe=x_test[:256]
    )
    model.fit(x, y, epochs=20, callbacks=[board])
    ```
    """

    def __init__(
        self,
        log_dir: str = "logs",
        *args: Any,
        early_phase: EarlyPhase | None = None,
        probe: Any = None,
        probe_every: str | int = "epoch",
        probe_estimator: str = "monte_carlo",
        by_layer: bool = True,
        heat_map: bool = True,
        write_every: int = 1,
        hyperparameters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(log_dir, *args, **kwargs)
        self.early_phase: EarlyPhase = early_phase or EarlyPhase()
        self.probe: Probe | None = None
        if probe is not None:
            self.probe = Probe(probe, probe_every, probe_estimator)
        self.by_layer = by_layer
        self.heat_map = heat_map
        self.write_every: int = checks.integer("write_every", write_every, 1)
        self.hyperparameters: dict[str, Any] = dict(hyperparameters or {})
        self._root = self.log_dir
        self._end = None  # directory and step where the last fit has ended

    # The run and its directory.

    def set_model(self, model: keras.Model) -> None:
        check_model(model)
        self._writes = replicas.writes(model.distribute_strategy)
        if self._writes:
            files.check_writable(
                "log_dir", os.path.join(self.log_dir, tags.TRAIN)
            )
        keras.callbacks.Callback.set_model(self, model)
        self.early_phase.set_model(model)
        self._is_open = False

    def _set_keras_up(self) -> None:
        """Lets Keras make its files, once it is known in which directory."""
        model = self.model
        # Keras draws graphs of Functional and Sequential models alone.
        super().set_model(model.model)
        keras.callbacks.Callback.set_model(self, model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._is_open = False

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self._is_open:  # in `evaluate`
            self._set_keras_up()
        super().on_test_begin(logs)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Not before, since other callbacks restore weights as training begins.
        if not self._is_open:
            self._open(epoch)
            self._is_open = True
        super().on_epoch_begin(epoch, logs)
        self.early_phase.on_epoch_begin(epoch)
        self._step = self._seen_step = step_of(self.model)
        if self._has_to_probe_first:
            self._write_probe(self._step)
            self._has_to_probe_first = False

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if not self._is_open:  # A loop of one's own may have no epochs.
            self.on_epoch_begin(0)
        super().on_train_batch_begin(batch, logs)

    def _open(self, epoch: int) -> None:
        """Starts a run, or goes on with one."""
        step = step_of(self.model)
        if self.probe is not None:
            self.probe.check(self.model.model)
        if self._end != (self.log_dir, step):
            self._choose_directory(step)
            self._restore(step, epoch)
        elif self._writes:
            run_directories.lock(self.log_dir)
        self._set_keras_up()
        super().on_train_begin()
        written = {}
        if step:
            written = event_files.hyperparameters(
                os.path.join(self.log_dir, tags.HPARAMS)
            )
        self._begun_with = hyperparameters_lib.as_begun(
            self._hyperparameters(), written
        )
        self._session = self._new_session()
        self._pages_are_open = False
        self._layers = None

    def _choose_directory(self, step: int) -> None:
        if self._writes:
            choice = run_directories.choose(
                self._root, step, self._hyperparameters()
            )
        else:
            # Which is read alone, and locked by the chief.
            self.log_dir = run_directories.latest(
                self._root, step, self._hyperparameters()
            )
            choice = run_directories.Choice(self.log_dir)
        if choice.directory == self.log_dir and not choice.begins_anew:
            return
        if choice.warning:  # None if a directory is free again.
            warnings.warn(choice.warning, stacklevel=2)
        if choice.begins_anew:
            # That of the curves last, by which a run is known.
            for name in reversed(tags.SPLITS):
                event_files.take_out(
                    os.path.join(choice.directory, name),
                    lambda tag, at: not event_files.begins_run(tag),
                )
        self.log_dir: str = choice.directory

    def _restore(self, step: int, epoch: int) -> None:
        """Takes up what was written of the first `step` steps."""
        if step and self._writes:
            for name in tags.SPLITS:
                event_files.take_out(
                    os.path.join(self.log_dir, name),
                    lambda tag, at: tags.is_later(tag, at, step, epoch),
                )
        traces, explosions, layers, single, probed = {}, {}, {}, {}, set()
        prefix = tags.TRACE_BY_LAYER
        # Where a run begins, there is nothing of it yet.
        directory = os.path.join(self.log_dir, tags.TRAIN)
        for point in event_files.scalars(directory) if step else ():
            if point.tag == tags.TRACE:
                traces[point.step] = point.value
            elif point.tag.startswith(prefix):
                layer = point.tag.removeprefix(prefix)
                layers.setdefault(point.step, {})[layer] = point.value
            elif point.tag == tags.EXPLOSION:
                explosions[point.step] = point.value
            elif point.tag == tags.PROBE_TRACE:
                probed.add(point.step)
            else:
                single[point.tag] = point.step, point.value
        early = single.get(tags.EARLY_TRACE)
        _, threshold = single.get(tags.EARLY_THRESHOLD, (0, None))
        self._early_is_written = early is not None
        self._threshold_is_written = threshold is not None
        if traces or not step:
            self.early_phase.restore(
                list(traces),
                list(traces.values()),
                threshold=threshold,
                early=early,
                explosions=[explosions.get(at, 0.0) for at in traces],
            )
        self._map = self._new_map()
        if self._map is not None:
            for at, values in layers.items():
                self._map.add(at, values)
        self._has_to_probe_first = self.probe is not None and step not in probed

    def _new_map(self) -> HeatMap | None:
        if not self.heat_map:
            return None
        if HeatMap.is_available():
            return HeatMap()
        warnings.warn(
            "The heat map of Tr(F) by layer needs matplotlib: `pip install "
            '"keras_fisher[plot]"`. Without it, pass `heat_map=False`.',
            stacklevel=2,
        )
        return None

    # What is written.

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_train_batch_end(batch, logs)
        self.early_phase.on_train_batch_end(batch, logs)
        measured = self.model.measurements
        if len(measured.step):
            self._open_pages(logs or {}, int(measured.batch_size[0]))
            self._write_measurements(measured)
            self._write_early_phase()
        # At least as many as were made: the true number is waited for.
        before = self._step
        self._step += self.model.steps_per_execution
        if self.probe is not None and self.probe.is_due(before, self._step):
            before, self._seen_step = self._seen_step, step_of(self.model)
            self._step = self._seen_step
            if self.probe.is_due(before, self._step):
                self._write_probe(self._step)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_epoch_end(epoch, logs)
        logs = logs or {}
        step = step_of(self.model)
        self._open_pages(logs, None)
        if logs:
            self.early_phase.on_epoch_end(epoch, dict(logs))
        self._write_early_phase()
        self._write_memorization(logs, "", self._train_writer, step)
        if "val_clean_accuracy" in logs:
            self._write_memorization(logs, "val_", self._val_writer, step)
        if self.probe is not None and self.probe.every == "epoch":
            self._write_probe(step)
        self._write_heat_map(step, at_last=False)
        self._write_metrics(logs, step)
        # What Keras has written, which would be lost with a killed process.
        self._train_writer.flush()
        if any(name.startswith("val_") for name in logs):
            self._val_writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if not self._is_open:
            return
        step = step_of(self.model)
        self._write_heat_map(step, at_last=True)
        self._write(self._session, (step, summaries.session_end()))
        self._session.close()
        self._end = self.log_dir, step
        super().on_train_end(logs)
        self._is_open = False
        if self._writes:
            run_directories.unlock(self.log_dir)

    # Of several workers the chief writes; what the others write goes nowhere.

    @property
    def _train_writer(self):
        return super()._train_writer if self._writes else _nowhere()

    @property
    def _val_writer(self):
        return super()._val_writer if self._writes else _nowhere()

    def _new_session(self) -> tf.summary.SummaryWriter:
        if not self._writes:
            return _nowhere()
        return tf.summary.create_file_writer(
            os.path.join(self.log_dir, tags.HPARAMS)
        )

    def _write(self, writer, *buffers: tuple[int, bytes]) -> None:
        """Writes buffers, each with its step."""
        # Keras's `update_freq` is for its own summaries.
        with writer.as_default(), tf.summary.record_if(True):
            for step, buffer in buffers:
                tf.summary.experimental.write_raw_pb(buffer, step=step)
        # At once, so that no backup of the weights is ahead of the curves.
        writer.flush()

    def _write_scalars(self, *points: tuple[int, Mapping[str, float]]) -> None:
        buffers = [(step, summaries.scalars(v)) for step, v in points if v]
        self._write(self._train_writer, *buffers)

    def _write_measurements(self, measured) -> None:
        if self._layers is None:
            variables = self.model.model.trainable_variables
            self._layers = groups_of(variables, "layer")
        points = []
        of_model = self.model.penalty
        moves = of_model is not None and of_model.alpha_moves
        for step, traces, penalty, ratio, alpha in zip(
            measured.step.tolist(),
            measured.trace_by_variable,
            measured.penalty,
            measured.ratio,
            measured.alpha,
        ):
            if step % self.write_every:
                continue
            values = {}
            if math.isfinite(traces.sum()):
                by_layer = {
                    layer: float(traces[members].sum())
                    for layer, members in self._layers.items()
                }
                if self._map is not None:
                    self._map.add(step, by_layer)
                values[tags.TRACE] = traces.sum()
                values[tags.EXPLOSION] = self.early_phase.explosion_at(step)
                if self.by_layer:
                    values |= _prefixed(tags.TRACE_BY_LAYER, by_layer)
            if not math.isnan(penalty):
                values[tags.PENALTY] = penalty
            if not math.isnan(ratio):
                values[tags.RATIO] = ratio
            if moves:
                values[tags.ALPHA] = alpha
            points.append((step, values))
        self._write_scalars(*points)

    def _write_early_phase(self) -> None:
        early, threshold = self.early_phase, self.early_phase.crossing
        is_known = threshold is not None and math.isfinite(threshold)
        # It stands where Tr(F) is measured first.
        if is_known and early.steps and not self._threshold_is_written:
            self._write_scalars(
                (early.steps[0], {tags.EARLY_THRESHOLD: threshold})
            )
            self._threshold_is_written = True
        if not self._early_is_written and early.early_step is not None:
            self._write_scalars(
                (early.early_step, {tags.EARLY_TRACE: early.early_trace})
            )
            self._early_is_written = True

    def _write_memorization(self, logs, prefix: str, writer, step: int) -> None:
        names = {
            "clean_accuracy": tags.CLEAN,
            "noisy_accuracy": tags.NOISY,
            "recovered_accuracy": tags.RECOVERED,
        }
        values = {
            tag: logs[prefix + name]
            for name, tag in names.items()
            if prefix + name in logs
        }
        if values:
            values[tags.GAP] = values[tags.CLEAN] - values[tags.NOISY]
            self._write(writer, (step, summaries.scalars(values)))

    def _write_probe(self, step: int) -> None:
        by_layer = fisher_trace(
            self.model.model,
            self.probe.x,
            self.probe.y,
            estimator=self.probe.estimator,
            by="layer",
            likelihood=self.model.likelihood or self.model.loss,
            seed=self.probe.seed,
        )
        values = {tags.PROBE_TRACE: sum(by_layer.values())}
        if self.by_layer:
            values |= _prefixed(tags.PROBE_TRACE_BY_LAYER, by_layer)
        self._write_scalars((step, values))

    def _write_heat_map(self, step: int, *, at_last: bool) -> None:
        if self._map is None or not self._map.is_due(at_last=at_last):
            return
        pixels = self._map.draw()
        with self._train_writer.as_default(), tf.summary.record_if(True):
            tf.summary.image(tags.HEAT_MAP, pixels[None], step=step)

    def _open_pages(self, logs: Mapping, batch_size: int | None) -> None:
        """Writes the charts and the hyperparameters, once in a fit."""
        if self._pages_are_open:
            return
        charts = summaries.custom_scalars(
            has_noise_flags="clean_accuracy" in logs,
            has_bound="fisher_ratio" in logs,
        )
        self._write(self._train_writer, (0, charts))
        found = self._hyperparameters(batch_size) | self._begun_with
        # Unique, and begins with what the narrow column can show.
        parent, name = os.path.split(os.path.normpath(self.log_dir))
        buffer = summaries.session_start(found, f"{name} in {parent or '.'}")
        self._write(self._session, (0, buffer))
        self._pages_are_open = True

    def _hyperparameters(self, batch_size: int | None = None) -> dict:
        return {
            **hyperparameters_lib.of(self.model, batch_size),
            **hyperparameters_lib.simple(self.hyperparameters),
        }

    def _write_metrics(self, logs: Mapping[str, float], step: int) -> None:
        early = self.early_phase
        values = {
            name: value
            for name, value in logs.items()
            if not name.startswith("fisher_")
        }
        # The page shows the first five unless it is asked for others.
        accuracies = {name: values[name] for name in values if "acc" in name}
        values = accuracies or values
        values["early_trace"] = early.early_trace
        values["peak_trace"] = early.peak_trace
        values["peak_step"] = early.peak_step if early.steps else math.nan
        values["explosion"] = early.explosion
        known = {k: v for k, v in values.items() if not math.isnan(v)}
        known = summaries.scalars(_prefixed(tags.METRIC, known))
        self._write(self._session, (step, known))


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: float(value) for name, value in values.items()}


def _nowhere() -> tf.summary.SummaryWriter:
    return tf.summary.create_noop_writer()
