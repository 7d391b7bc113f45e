"""TrF_i: the trace of the Fisher information early in training."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
import warnings

import keras

from keras_fisher._common import checks
from keras_fisher._training.optimizers import is_amid_step
from keras_fisher._training.optimizers import step_of


class EarlyPhase(keras.callbacks.Callback):
    """Finds TrF_i, the peak of Tr(F), and whether Fisher explodes.

    TrF_i is the Tr(F) last measured when the training loss (or accuracy) first
    crosses a threshold. Runs that differ in learning rate or batch size are
    then compared where they have learned equally much, early, and the TrF_i of
    a run tells how well it will generalize.

    The entry of the logs is looked at after every measured step and after
    every epoch. Keras averages what is in them over the epoch so far.

    To the logs of each epoch it adds `fisher_early_trace` (NaN until known),
    `fisher_peak_trace` and `fisher_explosion`, for callbacks that come later
    in the list, and for the `History`.

    Source: Jastrzebski et al., *Catastrophic Fisher Explosion*, ICML 2021,
    section 3.

    Args:
        monitor: Entry of the logs, such as `"loss"` or `"accuracy"`.
        threshold: Where the early phase ends. None for half of the first value
            where smaller is better, and 0.5 where larger is. To compare runs,
            give one that all of them cross.
        mode: `"min"` if smaller is better, `"max"` if larger is; `"auto"` for
            `"max"` if `"acc"` is in the name of the entry, else `"min"`.
        warn_above: Explosion ratio from which one line warns; None for never.

    Attributes:
        steps: Optimizer steps at which Tr(F) was measured; list of int.
        traces: The estimates of Tr(F); list of float, of the same length.
        early_trace: TrF_i; NaN as long as the threshold is not crossed.
        early_step: The step at which it was measured; None as long.
        peak_trace: The largest of `traces`; NaN if there is none.
        peak_step: The step at which it was measured; None if there is none.
        peaks: The largest of `traces` so far, at each of `steps`.
        explosion: `peak_trace` over the first of `traces`.
        crossing: The threshold that the run goes by; None until known.

    Raises:
        ValueError: If an argument is not as described, or the model is no
            `FisherModel`.

    Example:
    ```python
    early = keras_fisher.callbacks.EarlyPhase("accuracy", threshold=0.6)
    model.fit(x, y, callbacks=[early])
    early.early_trace, early.early_step, early.peak_trace
    ```
    """

    def __init__(
        self,
        monitor: str = "loss",
        threshold: float | None = None,
        *,
        mode: str = "auto",
        warn_above: float | None = 50.0,
    ):
        super().__init__()
        checks.choice("mode", mode, ("auto", "min", "max"))
        if threshold is not None:
            threshold = checks.number(
                "threshold", threshold, math.isfinite, "finite"
            )
        if warn_above is not None:
            warn_above = checks.number(
                "warn_above", warn_above, lambda v: v >= 1, "at least 1"
            )
        self.monitor = monitor
        self.threshold = threshold
        self.warn_above = warn_above
        self._rises = mode == "max" or (mode == "auto" and "acc" in monitor)
        self.restore([], [])

    # What was measured.

    @property
    def peak_trace(self) -> float:
        return self.peaks[-1] if self.peaks else math.nan

    @property
    def peak_step(self) -> int | None:
        if not self.peaks:
            return None
        return self.steps[bisect.bisect_left(self.peaks, self.peak_trace)]

    @property
    def explosion(self) -> float:
        return self.explosion_at(self.steps[-1]) if self.steps else math.nan

    def explosion_at(self, step: int) -> float:
        """The explosion ratio when it was `step`, one of `steps`."""
        peak = self.peaks[bisect.bisect_left(self.steps, step)]
        if not self.traces[0]:
            return math.inf if peak else 1.0
        return peak / self.traces[0]

    def restore(
        self,
        steps: list[int],
        traces: list[float],
        *,
        threshold: float | None = None,
        early: tuple[int, float] | None = None,
        explosions: Sequence[float] = (),
    ) -> None:
        """Takes up a run that was measured before.

        Args:
            steps: Optimizer steps, rising.
            traces: The estimates of Tr(F) at these.
            threshold: The threshold that the run went by.
            early: The step and the value of TrF_i, if it is known.
            explosions: The peak so far over the first trace, at each of the
                steps, where traces in between are not known.
        """
        self.steps: list[int] = []
        self.traces: list[float] = []
        self.peaks: list[float] = []
        self.early_step, self.early_trace = early or (None, math.nan)
        self.crossing: float | None = (
            self.threshold if threshold is None else threshold
        )
        self._is_new = not steps
        self._late = False
        for step, trace in zip(steps, traces):
            self._record(step, trace)
        for i, explosion in enumerate(explosions):
            self.peaks[i] = max(self.peaks[i], explosion * traces[0])
        # It was warned of when it was measured.
        self._warned = self._has_exploded()

    # As a callback.

    def set_model(self, model: keras.Model) -> None:
        check_model(model)
        super().set_model(model)

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        step = step_of(self.model)
        if is_amid_step(self.model.optimizer):
            step += 1  # The one that waits for batches was measured.
        if self.steps and step <= self.steps[-1]:
            self._go_back_to(step)
        elif self._is_new:
            # A run seen from its middle may have crossed before.
            self._late = step > 0
        self._is_new = False

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        measured = self.model.measurements
        if not len(measured.step):
            return
        traces = measured.trace_by_variable.sum(axis=1)
        found = False
        for step, trace in zip(measured.step.tolist(), traces.tolist()):
            if math.isfinite(trace):  # As not where gradients overflow.
                self._record(step, trace)
                self._warn(step, trace)
                found = True
        if found:
            self.check(logs)

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        if self.monitor not in (logs or {}):
            warnings.warn(
                f"TrF_i is not found, since `{self.monitor}` is not in the "
                f"logs. They have: {', '.join(logs or {})}.",
                stacklevel=2,
            )
        self.check(logs)
        if logs is not None:
            logs["fisher_early_trace"] = self.early_trace
            logs["fisher_peak_trace"] = self.peak_trace
            logs["fisher_explosion"] = self.explosion

    def check(self, logs: Mapping[str, Any] | None) -> None:
        """Notes TrF_i if the logs have crossed the threshold."""
        # Of a step that overflowed it is not finite.
        value = (logs or {}).get(self.monitor, math.nan)
        is_known = self.early_step is not None
        if not math.isfinite(value) or is_known or not self.steps:
            return
        if self.crossing is None:
            self.crossing = 0.5 if self._rises else self._half_of(value)
        crossed = (
            value >= self.crossing if self._rises else value <= self.crossing
        )
        if crossed and not self._late:
            self.early_step, self.early_trace = self.steps[-1], self.traces[-1]
        # Not crossed at the first look: it is still to come.
        self._late = self._late and crossed

    def _half_of(self, first: float) -> float:
        """The threshold of what falls, from its first value."""
        if self._late:
            return -math.inf
        if first > 0:
            return first / 2
        warnings.warn(
            f"TrF_i is not found: half of `{self.monitor}` at first is the "
            f"threshold, and that was {first:.4g}, of which half is not lower. "
            "Give `EarlyPhase` a `threshold`.",
            stacklevel=2,
        )
        return -math.inf

    def _record(self, step: int, trace: float) -> None:
        if self.steps and step <= self.steps[-1]:
            return  # known; the callback may be asked by two
        self.steps.append(step)
        self.traces.append(trace)
        self.peaks.append(max(trace, self.peaks[-1]) if self.peaks else trace)

    def _has_exploded(self) -> bool:
        return self.warn_above is not None and self.explosion > self.warn_above

    def _warn(self, step: int, trace: float) -> None:
        """Says once that Tr(F) has exploded."""
        if not self._warned and self._has_exploded():
            self._warned = True
            warnings.warn(
                f"Fisher explosion: Tr(F) has reached {trace:.4g} at step "
                f"{step}, {self.explosion:.3g} times its first value. A larger "
                "learning rate, a smaller batch or a Fisher Penalty keep it "
                "small.",
                stacklevel=2,
            )

    def _go_back_to(self, step: int) -> None:
        """Forgets what was measured at this step and later."""
        kept = bisect.bisect_left(self.steps, step)
        early = None
        if self.early_step is not None and self.early_step < step:
            early = self.early_step, self.early_trace
        self.restore(
            self.steps[:kept],
            self.traces[:kept],
            threshold=self.crossing if kept else None,
            early=early,
        )


def check_model(model: keras.Model) -> None:
    """Raises a `ValueError` if there is nothing to read from a model."""
    if not hasattr(model, "measurements"):
        raise ValueError(
            "This callback shows what a `FisherModel` measures. Received: "
            f"{model.name} of type {type(model).__name__}. Train "
            "`keras_fisher.FisherModel(model)`; for a model with the layer "
            "`FisherRegularization`, `keras.callbacks.TensorBoard` writes "
            "`epoch_fisher_trace`."
        )
