"""The paper's kinds of figure, from the tables of `keras_fisher.logs`.

    keras_fisher.plotting.trace(keras_fisher.logs.read("logs"), smooth=10)

Each function draws into the Matplotlib axes it is given, or into those of a
new figure, and returns them. Legends stand to the right of the axes: figures
with several should have `layout="constrained"`, which makes room for them. A
new figure is as large as its legend needs it.

Needs Matplotlib, seaborn and SciPy, which `pip install "keras_fisher[plot]"`
brings, and raises an ImportError that says so without them.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import TYPE_CHECKING
from typing import NamedTuple

import numpy as np

from keras_fisher._common import axes
from keras_fisher._tensorboard import tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    import numpy.typing as npt
    import pandas as pd

# Line style and name of each accuracy.
_KINDS = {
    tags.CLEAN: ("-", "clean"),
    tags.NOISY: ("--", "noisy"),
    tags.RECOVERED: (":", "recovered"),
}
_STEP = "optimizer step"
# Smaller traces than this share of the largest are drawn alike.
_RANGE = 1e-6
_LABEL_HEIGHT = 0.17  # inches
# More cells in a row are narrower than pixels, and take longer to draw.
_MOST_COLUMNS = 1024
# Pairs that a bootstrap interval takes: see `rank_correlation`.
_FEWEST_FOR_INTERVAL = 8


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation, with its bootstrap interval.

    Attributes:
        correlation: Between -1 and 1; NaN if one side is constant.
        low: Lower end of the interval; NaN if there is none.
        high: Upper end of the interval; NaN if there is none.
        count: Number of pairs.

    Example:
    >>> keras_fisher.plotting.rank_correlation([1, 2, 3], [3, 2, 1]).count
    3
    """

    correlation: float
    low: float
    high: float
    count: int


def trace(
    frame: pd.DataFrame,
    *,
    tag: str = tags.TRACE,
    smooth: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws Tr(F) over the optimizer steps, a line for each run.

    Args:
        frame: What `keras_fisher.logs.read` returns.
        tag: Curve to draw, for example `"fisher/probe_trace"`.
        smooth: Number of consecutive measurements to average; the mean is
            drawn at their mean step.
        ax: Axes to draw into; those of a new figure by default.

    Raises:
        ValueError: If no run has that curve, or `smooth` is not positive.

    Example:
    ```python
    keras_fisher.plotting.trace(keras_fisher.logs.read("logs"), smooth=8)
    ```
    """
    if smooth < 1:
        raise ValueError(f"smooth must be 1 or more. Received: {smooth!r}.")
    curves = _curves(frame, [tag])
    is_ours = ax is None
    ax = axes.given_or_new(ax)
    for color, (name, _, *points) in zip(axes.palette(len(curves)), curves):
        axes.line(ax, *points, smooth=smooth, color=color, label=name)
    # An axis without any such value cannot be logarithmic.
    if any((np.isfinite(y) & (y > 0)).any() for *_, y in curves):
        ax.set_yscale("log")
    quantity = "Tr(F)" if tag == tags.TRACE else tag
    mean = f", mean of {smooth} measurements" if smooth > 1 else ""
    axes.dress(ax, xlabel=_STEP, ylabel=quantity + mean)
    axes.legend(ax, ax.get_lines(), may_grow=is_ours)
    return ax


def penalty_ratio(
    frame: pd.DataFrame,
    *,
    bound: float | None = None,
    smooth: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws ‖∇penalty‖ / ‖∇loss‖ over the optimizer steps, a line for each run.

    Above the bound, lower in the first `warmup_steps`, ∇P is shortened.

    Args:
        frame: What `keras_fisher.logs.read` returns.
        bound: That of the penalties, drawn as a line.
        smooth: As for `trace`.
        ax: Axes to draw into; those of a new figure by default.

    Raises:
        ValueError: If no run has that curve, or `smooth` is not positive.

    Example:
    ```python
    keras_fisher.plotting.penalty_ratio(keras_fisher.logs.read("logs"))
    ```
    """
    is_ours = ax is None
    ax = trace(frame, tag=tags.RATIO, smooth=smooth, ax=ax)
    ax.set_ylabel(ax.get_ylabel().replace(tags.RATIO, "‖∇penalty‖ / ‖∇loss‖"))
    if bound is not None:
        ax.axhline(bound, color="0.4", linestyle="--", label="bound")
        axes.legend(ax, ax.get_lines(), may_grow=is_ours)
    return ax


def early_trace_against_accuracy(
    runs: pd.DataFrame,
    *,
    trace: str = "early_trace",
    accuracy: str = "val_accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Draws the final accuracy of runs over their TrF_i.

    The title has Spearman's rank correlation, and of eight runs or more its
    95 % interval.

    Args:
        runs: What `keras_fisher.logs.runs` returns.
        trace: Column of the traces. Runs without one, because they did not
            get that far, are left out.
        accuracy: Column of the accuracies, as shares.
        ax: Axes to draw into; those of a new figure by default.

    Raises:
        ValueError: If there is no such column, or fewer than three runs have
            both values.

    Example:
    ```python
    runs = keras_fisher.logs.runs("logs")
    keras_fisher.plotting.early_trace_against_accuracy(runs)
    ```
    """
    for name in (trace, accuracy):
        if name not in runs:
            raise ValueError(
                f"The runs have no {name!r}. They have: {[*runs.columns]}."
            )
    x, y = (runs[name].to_numpy("float64") for name in (trace, accuracy))
    # The axis of the traces is logarithmic.
    has_both = np.isfinite(x) & np.isfinite(y) & (x > 0)
    x, y = x[has_both], y[has_both]
    found = rank_correlation(x, y)
    ax = axes.given_or_new(ax)
    ax.scatter(x, 100 * y, color=axes.palette(1)[0], alpha=0.8)
    ax.set_xscale("log")
    ax.set_title(_told(found))
    quantity = "Tr(F) early in training, TrF$_i$"
    if trace != "early_trace":
        quantity = trace
    if left_out := len(runs) - found.count:
        quantity += f"\n({left_out} of {len(runs)} runs lack a value)"
    name = accuracy.replace("val_", "validation ")
    axes.dress(ax, xlabel=quantity, ylabel=f"{name}, %")
    return ax


def rank_correlation(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> RankCorrelation:
    """Computes Spearman's rank correlation and how far it can be trusted.

    The interval is that of the percentile bootstrap over pairs. Resamples in
    which one side is constant have no correlation and are left out.

    Fewer than eight pairs have no interval, since it would be too narrow.
    Resamples of pairs in perfect order are in perfect order as well, so that
    it would be [1, 1] or [-1, -1], though chance alone brings n pairs in such
    an order with probability 2 / n!, four of them with 8 %. Of normal pairs
    with a correlation of 0.9, intervals of nominally 95 % cover the true rank
    correlation in 58 % of the cases with 4 pairs, in 87 % with 6 and in 97 %
    with 8. Eight or more pairs in perfect order still have an interval without
    a width.

    Args:
        x: Numbers; pairs that are not finite are left out.
        y: As many numbers.
        confidence: Share of such intervals that cover the true correlation.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        A `RankCorrelation`.

    Raises:
        ValueError: If `x` and `y` are not of one length, if fewer than three
            pairs are finite, or if `confidence` is not between 0 and 1.

    Example:
    >>> x, y = [1, 2, 3, 4], [1, 3, 2, 4]
    >>> round(keras_fisher.plotting.rank_correlation(x, y).correlation, 3)
    0.8
    """
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            "x and y must be vectors of one length. Received: shapes "
            f"{x.shape} and {y.shape}."
        )
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must be between 0 and 1. Received: {confidence!r}."
        )
    pairs = np.stack([x, y])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    count = pairs.shape[1]
    if count < 3:
        raise ValueError(
            "A rank correlation needs 3 or more pairs of finite numbers. "
            f"Received: {count} of {len(x)} pairs are finite."
        )
    correlation = float(_spearman(*pairs))
    if math.isnan(correlation) or count < _FEWEST_FOR_INTERVAL:
        return RankCorrelation(correlation, math.nan, math.nan, count)
    random = np.random.default_rng(seed)
    picked = random.integers(count, size=[resamples, count])
    tail = (1 - confidence) / 2
    ends = np.nanquantile(_spearman(*pairs[:, picked]), [tail, 1 - tail])
    return RankCorrelation(correlation, *map(float, ends), count)


def memorization(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws the accuracies of a training with label noise over the steps.

    Those on clean examples, on noisy ones with the labels they were given,
    and on noisy ones with their true labels (recovered). Runs differ by color,
    and so do training and validation if both had noisy labels.

    Args:
        frame: What `keras_fisher.logs.read` returns.
        ax: Axes to draw into; those of a new figure by default.

    Raises:
        ValueError: If no run was trained with noise flags.

    Example:
    ```python
    keras_fisher.plotting.memorization(keras_fisher.logs.read("logs"))
    ```
    """
    curves = _curves(frame, _KINDS)
    line = axes.imported("matplotlib.lines").Line2D
    names = dict.fromkeys(name for name, *_ in curves)
    colors = dict(zip(names, axes.palette(len(names))))
    is_ours = ax is None
    ax = axes.given_or_new(ax)
    for name, tag, steps, values in curves:
        style, _ = _KINDS[tag]
        axes.line(ax, steps, 100 * values, style, color=colors[name])
    axes.dress(ax, xlabel=_STEP, ylabel="accuracy, %", ylim=(-2, 102))
    drawn = {tag for _, tag, *_ in curves}
    handles = [line([], [], color=colors[name], label=name) for name in names]
    handles = [] if [*names] == ["."] else handles
    handles += [
        line([], [], color="0.3", linestyle=style, label=kind)
        for tag, (style, kind) in _KINDS.items()
        if tag in drawn
    ]
    axes.legend(ax, handles, may_grow=is_ours)
    return ax


def layer_heat_map(
    steps: npt.ArrayLike,
    traces: npt.ArrayLike,
    layers: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws Tr(F) of layers over the steps, the first layer on top.

    The color reaches from a measurement halfway to its neighbors. Of more than
    1024 measurements, neighbors are averaged. Colors are logarithmic
    over at most six decades; zeros have that of the smallest trace, and what is
    not finite is gray.

    With `ax`, it needs Matplotlib only, without `matplotlib.pyplot`.

    Args:
        steps: Optimizer steps of the measurements, ascending.
        traces: Tr(F), of shape `(steps, layers)`.
        layers: Names of the layers.
        ax: Axes to draw into; those of a new figure by default. The color bar
            takes some of their room.

    Raises:
        ValueError: If the shapes do not fit, or nothing was measured.

    Example:
    ```python
    keras_fisher.plotting.layer_heat_map([0, 9], [[1.0], [3.0]], ["dense"])
    ```
    """
    steps, traces = np.asarray(steps), np.asarray(traces, "float64")
    if not traces.size or traces.shape != (len(steps), len(layers)):
        raise ValueError(
            "traces must have a row for each step and a column for each "
            f"layer, and one or more of both. Received: {len(steps)} steps, "
            f"{len(layers)} layers, traces of shape {traces.shape}."
        )
    matplotlib = axes.imported("matplotlib")
    ax = axes.given_or_new(
        ax, height=1.5 + 1.3 * _LABEL_HEIGHT * min(len(layers), 60)
    )
    every = math.ceil(len(steps) / _MOST_COLUMNS)
    edges = _edges(steps)
    if every > 1:
        edges = np.array([*edges[:-1:every], edges[-1]])
        traces = _means(traces, every)
    low, high = _log_range(traces)
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(layers) + 1) - 0.5,
        traces.T,
        cmap=matplotlib.colormaps["viridis"].with_extremes(bad="0.85"),
        norm=axes.imported("matplotlib.colors").LogNorm(low, high, clip=True),
        rasterized=True,
    )
    ax.set(xlabel=_STEP, ylim=(len(layers) - 0.5, -0.5))
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    height = ax.get_window_extent().height / ax.figure.dpi
    every = math.ceil(len(layers) * _LABEL_HEIGHT / height)
    ax.set_yticks(range(0, len(layers), every), layers[::every])
    bar = ax.figure.colorbar(mesh, ax=ax, label="Tr(F)")
    if high >= 10 * low:
        # Without what is slow to draw: ticks between decades, powers typeset.
        bar.minorticks_off()
        bar.ax.yaxis.set_major_formatter("{x:g}")
    return ax


def trace_by_layer(
    frame: pd.DataFrame, run: str | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draws Tr(F) of the layers of one run over the steps.

    Args:
        frame: What `keras_fisher.logs.read` returns.
        run: Name of the run, if several were measured by layer.
        ax: Axes to draw into; those of a new figure by default.

    Raises:
        ValueError: If no run was measured by layer or `run` was not, or if
            several were and `run` does not say which one to draw.

    Example:
    ```python
    frame = keras_fisher.logs.read("logs")
    keras_fisher.plotting.trace_by_layer(frame, frame["run"].iloc[0])
    ```
    """
    points = frame[frame["tag"].str.startswith(tags.TRACE_BY_LAYER)]
    runs = sorted(points["run"].unique())
    run = runs[0] if run is None and len(runs) == 1 else run
    if run not in runs:
        raise ValueError(
            f"Pass a run that was measured by layer. Received: run={run!r}. "
            f"There are: {runs}."
        )
    points = points[points["run"] == run]
    table = points.pivot(index="step", columns="tag", values="value")
    # The index is in the order of writing, which is that of the model.
    table = table[[*points.drop_duplicates("tag").sort_index()["tag"]]]
    layers = [tag.removeprefix(tags.TRACE_BY_LAYER) for tag in table.columns]
    ax = layer_heat_map(table.index, table.to_numpy(), layers, ax=ax)
    ax.set_title("" if run == "." else run)
    return ax


def _curves(frame: pd.DataFrame, wanted) -> list[tuple]:
    """Name of the run, tag, steps and values of each curve."""
    points = frame[frame["tag"].isin([*wanted])]
    if points.empty:
        raise ValueError(
            f"No run has {' or '.join(wanted)}. The tags are: "
            f"{sorted(frame['tag'].unique())}."
        )
    splits = points.groupby("run")["split"].nunique()
    return [
        (
            run if splits[run] == 1 else f"{run}/{split}",
            tag,
            curve["step"].to_numpy(),
            curve["value"].to_numpy(),
        )
        for (run, split, tag), curve in points.groupby(["run", "split", "tag"])
    ]


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis; NaN where one is constant."""
    stats = axes.imported("scipy.stats")
    ranks = np.stack([stats.rankdata(side, axis=-1) for side in (x, y)])
    ranks -= ranks.mean(axis=-1, keepdims=True)
    squares = np.square(ranks).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return ranks.prod(axis=0).sum(axis=-1) / np.sqrt(squares.prod(axis=0))


def _told(found: RankCorrelation) -> str:
    if math.isnan(found.correlation):
        return f"One side is constant: no correlation, {found.count} runs"
    interval = f"{found.count} runs, too few for an interval"
    if not math.isnan(found.low):
        interval = (
            f"95 % interval [{found.low:.2f}, {found.high:.2f}], "
            f"{found.count} runs"
        )
    return f"Spearman's ρ = {found.correlation:.2f}, {interval}"


def _means(rows: np.ndarray, count: int) -> np.ndarray:
    """Means of so many consecutive rows, and of the rest; NaN do not count."""
    starts = range(0, len(rows), count)
    is_nan = np.isnan(rows)
    sums = np.add.reduceat(np.where(is_nan, 0.0, rows), starts)
    with np.errstate(invalid="ignore"):
        return sums / np.add.reduceat(~is_nan, starts)


def _log_range(values: np.ndarray) -> tuple[float, float]:
    """Least and largest value for a logarithmic scale."""
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 1.0
    low, high = values.min(), values.max()
    if low == high:
        return low / 10, 10 * high
    return max(low, _RANGE * high), high


def _edges(steps: np.ndarray) -> np.ndarray:
    """Where the cells around the steps begin and end."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = 2 * steps[0] - middles[0], 2 * steps[-1] - middles[-1]
    return np.array([first, *middles, last])
