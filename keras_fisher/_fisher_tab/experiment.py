"""What the tab shows, from whatever reads the logs for TensorBoard.

TensorBoard's data provider hands out points, thinned out as its own pages get
them. Runs are put together from their directories, and summed up, as
`keras_fisher.logs` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
import itertools
import math
import re
from typing import Any
from typing import NamedTuple

import numpy as np
from tensorboard.data import provider as provider_lib
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata

from keras_fisher._tensorboard import tags

_MOST_POINTS = 10_000  # of a curve
_RATIO = 10.0  # Tr(F) over its first value, from where on it has exploded
# What a run's last accuracies are called, on training and validation data.
_LAST_VALUES = {
    "accuracy": (tags.TRAIN, "epoch_accuracy"),
    "val_accuracy": (tags.VALIDATION, "epoch_accuracy"),
    "clean_accuracy": (tags.TRAIN, tags.CLEAN),
    "noisy_accuracy": (tags.TRAIN, tags.NOISY),
    "recovered_accuracy": (tags.TRAIN, tags.RECOVERED),
    "early_trace": (tags.TRAIN, tags.EARLY_TRACE),
    "explosion": (tags.TRAIN, tags.EXPLOSION),
}


class Curve(NamedTuple):
    """A curve of a run.

    Attributes:
        steps: Optimizer steps, or epochs, in their order.
        values: As many; None for what is not finite.
    """

    steps: list[int]
    values: list[float | None]


class Peak(NamedTuple):
    """Where Tr(F) was largest.

    Attributes:
        value: The largest that is finite; None if there is none.
        step: The optimizer step that it was measured at.
    """

    value: float | None
    step: int | None


# By experiment and directory, with the last step and time of the curve.
Peaks = dict[tuple[str, str], tuple[tuple[int, float], Peak]]


class UnknownRunError(LookupError):
    """Of the name that was asked for, there is none."""


class Experiment:
    """All runs of one log directory.

    Args:
        provider: A `tensorboard.data.provider.DataProvider`.
        context: The request's, for the provider.
        experiment_id: TensorBoard's name of it.
        peaks: What is known of earlier requests, and what this one adds, so
            that long curves are read again only if they have grown.
    """

    def __init__(
        self,
        provider,
        context,
        experiment_id: str,
        peaks: Peaks | None = None,
    ):
        self._provider = provider
        self._peaks_known = {} if peaks is None else peaks
        self._of = dict(ctx=context, experiment_id=experiment_id)
        listed = provider.list_scalars(
            **self._of, plugin_name=scalar_metadata.PLUGIN_NAME
        )
        self._tags = {name: [*series] for name, series in listed.items()}
        # What of a curve changes when a point comes.
        self._ends = {
            name: (
                series[tags.TRACE].max_step,
                series[tags.TRACE].max_wall_time,
            )
            for name, series in listed.items()
            if tags.TRACE in series
        }

    def has_fisher_data(self) -> bool:
        """Whether any run has a curve that this library writes."""
        return any(map(tags.is_fisher, self._all_tags()))

    def _all_tags(self) -> list[str]:
        """In the order of the reader, so that it is the same for all runs."""
        return [*dict.fromkeys(itertools.chain(*self._tags.values()))]

    def runs(self, read_curves: bool = True) -> list[dict[str, Any]]:
        """A row for each run: its name, hyperparameters, metrics and tags.

        And the last step of Tr(F), that one can see that there is more to draw.

        Args:
            read_curves: Whether to look for peaks in curves that have grown,
                which takes a while if they are many and long. Otherwise those
                that are known are told.
        """
        parts: dict[str, dict[str, str]] = {}
        for directory in {*self._tags, *(given := self._hyperparameters())}:
            run, split = tags.run_and_split(directory)
            parts.setdefault(run, {})[split] = directory
        wanted = [tag for _, tag in _LAST_VALUES.values()]
        wanted += [tag for tag in self._all_tags() if _is_metric(tag)]
        last = self._provider.read_last_scalars(
            **self._of,
            plugin_name=scalar_metadata.PLUGIN_NAME,
            run_tag_filter=provider_lib.RunTagFilter(tags=wanted),
        )
        peaks = self._peaks(read_curves)
        return [
            {
                "run": run,
                "last_step": self._ends.get(of.get(tags.TRAIN), (None,))[0],
                "hyperparameters": {
                    name: value
                    for directory in sorted(of.values())
                    for name, value in given.get(directory, {}).items()
                },
                "metrics": _metrics(
                    {split: last.get(name, {}) for split, name in of.items()},
                    peaks.get(of.get(tags.TRAIN)),
                ),
                "tags": sorted(
                    set().union(*(self._tags.get(n, ()) for n in of.values()))
                ),
            }
            for run, of in sorted(parts.items())
        ]

    def curves(self, run: str, wanted: Iterable[str]) -> dict[str, Curve]:
        """Curves of a run, from training data where there are several.

        Raises:
            UnknownRunError: If there is no such run.
        """
        directories = [
            directory
            for split in (tags.VALIDATION, "", tags.TRAIN)
            for directory in self._tags
            if tags.run_and_split(directory) == (run, split)
        ]
        if not directories:
            raise UnknownRunError(run)
        wanted = [*wanted]
        found = self._read(wanted, directories)
        return {
            tag: _curve(found[directory][tag])
            for tag in wanted
            for directory in directories
            if tag in found.get(directory, {})
        }

    def layers(self, run: str) -> dict[str, Any]:
        """Tr(F) by layer: names, steps, and a row of values for each layer.

        Layers are in the order of their names, `conv_10` after `conv_9`.

        Raises:
            UnknownRunError: If there is no such run.
        """
        prefix = tags.TRACE_BY_LAYER
        # The data server tells tags in any order, so not in the model's.
        wanted = sorted(
            (tag for tag in self._all_tags() if tag.startswith(prefix)),
            key=_natural,
        )
        found = self.curves(run, wanted)
        steps = sorted(
            {step for curve in found.values() for step in curve.steps}
        )
        rows = [
            dict(zip(curve.steps, curve.values)) for curve in found.values()
        ]
        return {
            "layers": [tag.removeprefix(prefix) for tag in found],
            "steps": steps,
            "values": [[row.get(step) for step in steps] for row in rows],
        }

    def _peaks(self, read_curves: bool) -> dict[str, Peak]:
        """The peak of Tr(F) in each directory that has the curve."""
        known, eid = self._peaks_known, self._of["experiment_id"]
        grown = [
            name
            for name, end in self._ends.items()
            if read_curves and known.get((eid, name), (None,))[0] != end
        ]
        points = self._read([tags.TRACE], grown) if grown else {}
        for name in grown:
            peak = _peak(points.get(name, {}).get(tags.TRACE, ()))
            known[eid, name] = self._ends[name], peak
        return {
            name: known[eid, name][1]
            for name in self._ends
            if (eid, name) in known
        }

    def _read(self, wanted: Iterable[str], directories=None) -> Mapping:
        runs_and_tags = provider_lib.RunTagFilter(
            runs=directories, tags=[*wanted]
        )
        return self._provider.read_scalars(
            **self._of,
            plugin_name=scalar_metadata.PLUGIN_NAME,
            downsample=_MOST_POINTS,
            run_tag_filter=runs_and_tags,
        )

    def _hyperparameters(self) -> dict[str, dict[str, Any]]:
        listed = self._provider.list_tensors(
            **self._of, plugin_name=hparams_metadata.PLUGIN_NAME
        )
        tag = hparams_metadata.SESSION_START_INFO_TAG
        return {
            directory: _values(series[tag].plugin_content)
            for directory, series in listed.items()
            if tag in series
        }


def _values(content: bytes) -> dict[str, Any]:
    session = hparams_metadata.parse_session_start_info_plugin_data(content)
    return {
        name: _finite(getattr(value, value.WhichOneof("kind")))
        for name, value in sorted(session.hparams.items())
    }


def threshold(rows: list[dict[str, Any]]) -> float:
    """The explosion ratio that tells runs apart.

    From random weights Tr(F) rises in every run, by how much depends on the
    network. So where the ratios of runs are far apart, the threshold is in the
    middle between the smallest and the largest, on a logarithmic scale.
    """
    ratios = [row["metrics"].get("explosion") for row in rows]
    ratios = [ratio for ratio in ratios if ratio]
    if not ratios or max(ratios) < 3 * min(ratios):
        return _RATIO
    return math.sqrt(min(ratios) * max(ratios))


def _natural(name: str) -> list:
    """Sorts numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def _is_metric(tag: str) -> bool:
    return tag.startswith(tags.METRIC)


def _metrics(of: dict[str, Mapping], peak: Peak | None) -> dict[str, Any]:
    """The metrics that a run has told of, or what its curves say so far."""
    found = {
        name: _finite(of[split][tag].value)
        for name, (split, tag) in _LAST_VALUES.items()
        if tag in of.get(split, {})
    }
    if peak is not None and peak.value is not None:
        found["peak_trace"], found["peak_step"] = peak
    last = sorted(
        (point.wall_time, tag, point.value)
        for by_tag in of.values()
        for tag, point in by_tag.items()
        if _is_metric(tag)
    )
    told = {tag.removeprefix(tags.METRIC): _finite(v) for _, tag, v in last}
    # What overflowed hides nothing that the curves have.
    told = {name: v for name, v in told.items() if v is not None}
    return {**found, **told}


def _peak(points: Iterable) -> Peak:
    by_step = {point.step: point.value for point in points}
    steps = np.sort(np.fromiter(by_step, "int64"))
    values = np.array([by_step[step] for step in steps.tolist()])
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return Peak(None, None)
    # Of equal ones the first, as `EarlyPhase` has it.
    at = np.where(is_finite, values, -np.inf).argmax()
    return Peak(values[at].item(), steps[at].item())


def _curve(points) -> Curve:
    # Of points at one step, as after a resume, the last one counts.
    by_step = {point.step: _finite(point.value) for point in points}
    steps = sorted(by_step)
    return Curve(steps, [by_step[step] for step in steps])


def _finite(value: Any) -> Any:
    """JSON has no NaN, and no infinity."""
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
