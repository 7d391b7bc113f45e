"""Tr(F) by layer and step, as an image that grows with the run."""

from __future__ import annotations

from collections.abc import Mapping
import importlib.util
import itertools
import math
import time

import numpy as np

_MOST_COLUMNS = 512
_CHARACTER = 0.085  # inches, of the name of a layer
# Of the time that goes by, what drawing may take.
_SHARE = 0.01


class HeatMap:
    """Collects Tr(F) of each layer, and draws it now and then."""

    def __init__(self):
        self._steps: list[int] = []
        self._traces: list[Mapping[str, float]] = []
        self._not_before = 0.0
        self._drawn_at = None

    @staticmethod
    def is_available() -> bool:
        """Whether matplotlib is installed."""
        return importlib.util.find_spec("matplotlib") is not None

    def add(self, step: int, traces: Mapping[str, float]) -> None:
        """Takes the Tr(F) of each layer at a step."""
        self._steps.append(step)
        self._traces.append(traces)
        if len(self._steps) == 2 * _MOST_COLUMNS:
            # Neighbors become one, so that memory and drawing stay small.
            pairs = zip(self._traces[::2], self._traces[1::2])
            self._traces = [_mean(*pair) for pair in pairs]
            self._steps = self._steps[::2]

    def collected(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """What was collected.

        Returns:
            The steps, of shape `(columns,)`; Tr(F) at each of them, of shape
            `(columns, layers)`, NaN for a layer that was frozen then; the
            names of the layers.
        """
        layers = list(dict.fromkeys(itertools.chain(*self._traces)))
        traces = [
            [row.get(layer, math.nan) for layer in layers]
            for row in self._traces
        ]
        return np.asarray(self._steps), np.asarray(traces), layers

    def is_due(self, *, at_last: bool) -> bool:
        """Whether to draw: there is something new, and time enough went by."""
        if not self._steps or self._steps[-1] == self._drawn_at:
            return False
        return at_last or time.monotonic() >= self._not_before

    def draw(self) -> np.ndarray:
        """Draws what was collected.

        Returns:
            Array of shape `(height, width, 3)` and dtype uint8.
        """
        # Slow to import, and not needed by who does not train with it.
        from matplotlib.backends import backend_agg
        from matplotlib.figure import Figure

        from keras_fisher import plotting

        begin = time.monotonic()
        steps, traces, layers = self.collected()
        width, height = 7.2, 1.4 + 0.24 * len(layers)
        figure = Figure(figsize=(width, height), dpi=100)
        # A layout engine would measure all text several times.
        names = 0.3 + _CHARACTER * max(map(len, layers))
        figure.subplots_adjust(
            left=min(names / width, 0.5),
            right=1 - 0.3 / width,
            bottom=0.55 / height,
            top=1 - 0.15 / height,
        )
        canvas = backend_agg.FigureCanvasAgg(figure)
        plotting.layer_heat_map(steps, traces, layers, ax=figure.add_subplot())
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        end = time.monotonic()
        self._not_before = end + (end - begin) / _SHARE
        self._drawn_at = self._steps[-1]
        return pixels


def _mean(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    both = {**a, **b}
    return {k: (a.get(k, v) + b.get(k, v)) / 2 for k, v in both.items()}
