"""Axes, lines and legends as all of our figures have them.

Matplotlib and seaborn are imported where they are used: they are an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import TYPE_CHECKING

import numpy as np

from keras_fisher._common import optional_imports

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Inches.
_WIDTH, _HEIGHT = 7.0, 4.0
_LEAST_BESIDE_LEGEND = 4.5
_MOST_IN_COLUMN = 40


def imported(name: str) -> ModuleType:
    """Imports what figures need, or says how to install it."""
    return optional_imports.imported(name, "keras_fisher.plotting")


def given_or_new(ax: Axes | None, height: float = _HEIGHT) -> Axes:
    """Those given, or those of a new figure of so many inches."""
    if ax is not None:
        return ax
    plt = imported("matplotlib.pyplot")
    return plt.subplots(figsize=(_WIDTH, height), layout="constrained")[1]


def palette(count: int) -> list[tuple[float, float, float]]:
    """Colors that can be told apart, however many."""
    name = "colorblind" if count <= 10 else "viridis"  # which has no end
    return imported("seaborn").color_palette(name, count)


def dress(ax: Axes, **labels) -> None:
    """Sets labels and limits, and draws a grid in place of a frame."""
    ax.set(**labels)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)


def legend(ax: Axes, handles: Sequence[Artist], *, may_grow: bool) -> None:
    """A legend beside the axes, unless it would only say `.`.

    Args:
        ax: The axes.
        handles: What it explains.
        may_grow: Whether the figure is made as large as the legend needs it.
    """
    if [handle.get_label() for handle in handles] == ["."]:
        return
    drawn = ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        ncols=math.ceil(len(handles) / _MOST_IN_COLUMN),
    )
    if may_grow:
        box, dpi = drawn.get_window_extent(), ax.figure.dpi
        ax.figure.set_size_inches(
            max(_WIDTH, _LEAST_BESIDE_LEGEND + box.width / dpi),
            max(_HEIGHT, 0.5 + box.height / dpi),
        )


def line(ax: Axes, steps, values, *style, smooth: int = 1, **kwargs) -> None:
    """Draws means of so many finite values, or of all; one alone as a dot."""
    is_finite = np.isfinite(values)
    if smooth > 1 and is_finite.any():
        both = np.stack([steps, values])[:, is_finite]
        count = min(smooth, both.shape[1])
        windows = np.lib.stride_tricks.sliding_window_view(both, count, axis=1)
        steps, values = windows.mean(axis=-1)
    marker = "o" if np.isfinite(values).sum() == 1 else None
    ax.plot(steps, values, *style, marker=marker, **kwargs)
