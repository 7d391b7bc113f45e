"""Figures of curves and runs."""

from __future__ import annotations

import math
import sys
import warnings

import matplotlib

matplotlib.use("Agg")
import figures
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import pytest
import seaborn

from keras_fisher import plotting


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def _realistic():
    random = np.random.default_rng(0)
    steps = np.arange(0, 3000, 10)
    curves = []
    for run, peak in {"lr=0.01": 400, "lr=0.1": 60}.items():
        shape = 10 + peak * steps / 400 * np.exp(1 - steps / 400)
        noise = random.lognormal(0, 0.3, [5, len(steps)])
        curves.append((run, "train", figures.TRACE, steps, shape * noise[0]))
        curves += [
            (
                run,
                "train",
                f"{figures.LAYER}conv_{k}",
                steps,
                shape * noise[k] / 4,
            )
            for k in range(1, 5)
        ]
        curves += [
            (run, "train", f"memorization/{kind}_accuracy", steps, shape / 1e3)
            for kind in ("clean", "noisy", "recovered")
        ]
    return figures.frame(*curves)


def _runs():
    random = np.random.default_rng(1)
    trace = np.exp(random.uniform(1, 6, 20))
    accuracy = 0.95 - 0.02 * np.log(trace) + random.normal(0, 0.02, 20)
    return pd.DataFrame({"early_trace": trace, "val_accuracy": accuracy})


def _lines(ax):
    return [line.get_xydata().tolist() for line in ax.get_lines()]


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plotting.trace(_realistic(), smooth=5, ax=ax),
        lambda ax: plotting.penalty_ratio(
            _realistic().replace(figures.TRACE, "fisher/ratio"), bound=9, ax=ax
        ),
        lambda ax: plotting.memorization(_realistic(), ax=ax),
        lambda ax: plotting.trace_by_layer(_realistic(), "lr=0.1", ax=ax),
        lambda ax: plotting.early_trace_against_accuracy(_runs(), ax=ax),
    ],
    ids=[
        "trace",
        "penalty_ratio",
        "memorization",
        "trace_by_layer",
        "early_trace",
    ],
)
def test_figures_are_drawn_without_a_warning(draw):
    ax = draw(None)
    assert plt.fignum_exists(ax.figure.number)
    assert ax.figure.get_layout_engine() is not None
    figures.save(ax)
    plt.close("all")
    given = Figure().subplots()
    assert draw(given) is given
    assert not plt.get_fignums()
    figures.save(given)


def test_trace_draws_a_line_for_each_run():
    frame = figures.frame(
        ("b", "train", figures.TRACE, [0, 10, 500], [3.0, 5.0, 4.0]),
        ("a", "train", figures.TRACE, [0, 7], [1.0, 100.0]),
        ("a", "train", "fisher/penalty", [0, 7], [0.1, 0.2]),
    )
    ax = plotting.trace(frame)
    assert _lines(ax) == [
        [[0, 1.0], [7, 100.0]],
        [[0, 3.0], [10, 5.0], [500, 4.0]],
    ]
    assert _legend(ax) == ["a", "b"]
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "optimizer step"
    assert ax.get_ylabel() == "Tr(F)"
    drawn = [line.get_color() for line in ax.get_lines()]
    assert drawn == seaborn.color_palette("colorblind", 2)
    assert not ax.spines["top"].get_visible()
    grid = [*ax.get_xgridlines(), *ax.get_ygridlines()]
    assert all(line.get_visible() and line.get_alpha() < 1 for line in grid)


def test_the_ratio_of_gradients_is_drawn_with_its_bound():
    frame = figures.frame(
        ("a", "train", "fisher/ratio", [0, 1, 2, 3], [4.0, 2.0, 0.5, 0.1]),
        ("b", "train", figures.TRACE, [0], [3.0]),
    )
    ax = plotting.penalty_ratio(frame, smooth=2)
    np.testing.assert_allclose(
        _lines(ax), [[[0.5, 3.0], [1.5, 1.25], [2.5, 0.3]]]
    )
    assert ax.get_ylabel() == "‖∇penalty‖ / ‖∇loss‖, mean of 2 measurements"
    ax = plotting.penalty_ratio(frame, bound=0.5)
    assert _lines(ax)[1] == [[0, 0.5], [1, 0.5]]
    assert _legend(ax) == ["a", "bound"]
    assert ax.get_yscale() == "log"


def test_the_legend_is_beside_the_data():
    ax = plotting.trace(_realistic())
    figures.save(ax)
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.bbox)
    assert legend.x1 <= ax.figure.bbox.x1
    assert not ax.get_legend().get_frame_on()


@pytest.mark.parametrize("count, length", [(25, 5), (60, 5), (3, 90)])
def test_a_new_figure_has_room_for_all_of_its_legend(count, length):
    curves = [
        (f"{k:02}" * (length // 2), "train", figures.TRACE, [0, 1], [1.0, 2.0])
        for k in range(count)
    ]
    frame = figures.frame(*curves)
    ax = plotting.trace(frame)
    figures.save(ax)
    legend, figure = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert len(_legend(ax)) == count
    assert figure.x0 <= legend.x0 and legend.x1 <= figure.x1, (legend, figure)
    assert figure.y0 <= legend.y0 and legend.y1 <= figure.y1, (legend, figure)
    assert ax.bbox.width / ax.figure.dpi > 3
    # Figures of other people stay as they are.
    mine = Figure(figsize=(5, 3), layout="constrained")
    plotting.trace(frame, ax=mine.subplots())
    assert mine.get_size_inches().tolist() == [5, 3]


def test_one_run_in_the_log_directory_needs_no_legend():
    run = (".", "train", figures.TRACE, [0, 1], [1.0, 2.0])
    assert plotting.trace(figures.frame(run)).get_legend() is None
    named = ("a", *run[1:])
    assert _legend(plotting.trace(figures.frame(named))) == ["a"]


def test_many_runs_have_colors_of_their_own():
    curves = [
        (f"{k:02}", "train", figures.TRACE, [0], [1.0]) for k in range(12)
    ]
    lines = plotting.trace(figures.frame(*curves)).get_lines()
    assert len({line.get_color() for line in lines}) == 12


def test_smoothing_averages_consecutive_measurements():
    steps, values = [0, 1, 2, 30], [1.0, 2.0, 6.0, 4.0]
    frame = figures.frame(
        ("a", "train", figures.TRACE, steps, values),
        ("b", "train", figures.TRACE, [4, 6], [3.0, 5.0]),
    )
    ax = plotting.trace(frame, smooth=3)
    assert _lines(ax) == [[[1, 3.0], [11, 4.0]], [[5, 4.0]]]
    assert ax.get_ylabel() == "Tr(F), mean of 3 measurements"
    for smooth in (0, -1):
        with pytest.raises(ValueError, match=f"smooth.*{smooth}"):
            plotting.trace(frame, smooth=smooth)


def test_smoothing_does_not_smear_what_is_not_finite():
    values = [1.0, math.inf, 1.0, 2.0**99, 0.25, 0.25]
    frame = figures.frame(("a", "train", figures.TRACE, range(6), values))
    [line] = _lines(plotting.trace(frame, smooth=2))
    assert [y for _, y in line] == [1.0, 2**98, 2**98, 0.25]


def test_other_curves_are_named_by_tag_and_split():
    frame = figures.frame(
        ("a", "train", "epoch_loss", [0, 1], [2.0, 1.0]),
        ("a", "validation", "epoch_loss", [0, 1], [4.0, 3.0]),
        ("b", "train", "epoch_loss", [0, 1], [6.0, 5.0]),
    )
    ax = plotting.trace(frame, tag="epoch_loss")
    assert ax.get_ylabel() == "epoch_loss"
    assert _legend(ax) == ["a/train", "a/validation", "b"]
    assert [line[0][1] for line in _lines(ax)] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_traces_without_a_logarithm_are_drawn(value):
    frame = figures.frame(("a", "train", figures.TRACE, [0, 1], [value, value]))
    ax = plotting.trace(frame)
    assert ax.get_yscale() == "linear"
    figures.save(ax)


@pytest.mark.parametrize("draw", [plotting.trace, plotting.memorization])
def test_a_curve_that_is_missing_is_an_error(draw):
    frame = figures.frame(("a", "train", "epoch_loss", [0], [1.0]))
    with pytest.raises(ValueError, match=r"No run has .*\['epoch_loss'\]"):
        draw(frame)
    assert not plt.get_fignums()


def test_early_trace_draws_runs_and_their_correlation():
    runs = pd.DataFrame(
        {
            "early_trace": [10.0, np.nan, 100.0, 1000.0, 0.0, 40.0, 5.0],
            "val_accuracy": [0.9, 0.99, 0.7, 0.8, 0.9, np.nan, 0.95],
        }
    )
    ax = plotting.early_trace_against_accuracy(runs)
    [points] = ax.collections
    np.testing.assert_allclose(
        points.get_offsets(), [[10, 90], [100, 70], [1000, 80], [5, 95]]
    )
    np.testing.assert_allclose(
        points.get_facecolor(),
        [(*seaborn.color_palette("colorblind")[0], 0.8)],
    )
    assert ax.get_xscale() == "log"
    assert ax.get_title() == (
        "Spearman's ρ = -0.80, 4 runs, too few for an interval"
    )
    assert ax.get_ylabel() == "validation accuracy, %"
    assert ax.get_xlabel() == (
        "Tr(F) early in training, TrF$_i$\n(3 of 7 runs lack a value)"
    )


def test_early_trace_tells_the_interval_of_enough_runs():
    traces = [8.0, 3.0, 5.0, 1.0, 6.0, 2.0, 7.0, 4.0]
    accuracies = [0.2, 0.7, 0.3, 0.9, 0.5, 0.8, 0.1, 0.6]
    runs = pd.DataFrame({"early_trace": traces, "val_accuracy": accuracies})
    ax = plotting.early_trace_against_accuracy(runs)
    found = plotting.rank_correlation(traces, accuracies)
    assert found.low < found.correlation < found.high < 0
    assert ax.get_title() == (
        f"Spearman's ρ = {found.correlation:.2f}, 95 % interval "
        f"[{found.low:.2f}, {found.high:.2f}], 8 runs"
    )
    ax = plotting.early_trace_against_accuracy(runs.assign(val_accuracy=0.5))
    assert ax.get_title() == "One side is constant: no correlation, 8 runs"


def test_early_trace_takes_other_columns():
    runs = _runs().set_axis(["peak_trace", "accuracy"], axis=1)
    ax = plotting.early_trace_against_accuracy(
        runs, trace="peak_trace", accuracy="accuracy"
    )
    assert ax.get_xlabel() == "peak_trace"
    assert ax.get_ylabel() == "accuracy, %"
    np.testing.assert_allclose(
        ax.collections[0].get_offsets()[:, 0], runs["peak_trace"]
    )
    with pytest.raises(ValueError, match=r"no 'early_trace'.*'peak_trace'"):
        plotting.early_trace_against_accuracy(runs)
    with pytest.raises(ValueError, match=r"no 'val_accuracy'"):
        plotting.early_trace_against_accuracy(runs, trace="peak_trace")
    plt.close("all")
    with pytest.raises(ValueError, match="2 of 2 pairs"):
        plotting.early_trace_against_accuracy(_runs()[:2])
    assert not plt.get_fignums()


def test_memorization_styles_by_kind_and_colors_by_run():
    name = "memorization/{}_accuracy".format
    frame = figures.frame(
        ("a", "train", name("clean"), [0, 5], [0.25, 0.5]),
        ("a", "train", name("noisy"), [0, 5], [0.125, 0.0]),
        ("b", "train", name("noisy"), [0, 5], [0.75, 1.0]),
        ("b", "train", "memorization/gap", [0, 5], [0.5, 0.5]),
    )
    ax = plotting.memorization(frame)
    assert _lines(ax) == [
        [[0, 25.0], [5, 50.0]],
        [[0, 12.5], [5, 0.0]],
        [[0, 75.0], [5, 100.0]],
    ]
    lines = ax.get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "--", "--"]
    a, b = seaborn.color_palette("colorblind", 2)
    assert [line.get_color() for line in lines] == [a, a, b]
    assert _legend(ax) == ["a", "b", "clean", "noisy"]
    handles = ax.get_legend().get_lines()
    assert [h.get_color() for h in handles] == [a, b, "0.3", "0.3"]
    assert [h.get_linestyle() for h in handles[2:]] == ["-", "--"]
    assert ax.get_ylabel() == "accuracy, %"
    assert ax.get_xlabel() == "optimizer step"
    low, high = ax.get_ylim()
    assert -5 < low < 0 and 100 < high < 105


def test_memorization_of_one_run_has_kinds_only_in_the_legend():
    name = "memorization/{}_accuracy".format
    frame = figures.frame(
        (".", "train", name("recovered"), [0, 5], [0.25, 0.5]),
        (".", "train", name("clean"), [0, 5], [0.75, 1.0]),
    )
    assert _legend(plotting.memorization(frame)) == ["clean", "recovered"]


@pytest.mark.parametrize(
    ("package", "module", "draw"),
    [
        ("matplotlib", "matplotlib", lambda: _draw_map()),
        ("matplotlib", "matplotlib.pyplot", lambda: _draw_map()),
        ("seaborn", "seaborn", lambda: plotting.trace(_realistic())),
        ("seaborn", "seaborn", lambda: plotting.memorization(_realistic())),
        (
            "scipy",
            "scipy.stats",
            lambda: plotting.rank_correlation([1, 2, 3], [1, 2, 3]),
        ),
    ],
)
def test_without_a_package_it_says_what_to_install(
    package, module, draw, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    match = rf"needs {package},.*keras_fisher\[plot\]"
    with pytest.raises(ImportError, match=match) as error:
        draw()
    assert error.value.name == module


def _draw_map():
    return plotting.layer_heat_map([0], [[1.0]], ["a"])


def _ink(ax):
    """Number of colored pixels within axes."""
    ax.figure.canvas.draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[::-1, :, :3]
    box = ax.get_window_extent()
    inside = pixels[
        int(box.y0) + 3 : int(box.y1) - 2, int(box.x0) + 3 : int(box.x1) - 2
    ]
    return int((np.ptp(inside.astype(int), axis=-1) > 40).sum())


@pytest.mark.parametrize(
    "values, smooth, expected",
    [
        ([3.0], 1, [[0, 3.0]]),
        ([3.0, 5.0], 8, [[0.5, 4.0]]),
        # What is not finite is in no mean, and leaves a gap without any.
        ([1.0, np.inf, 3.0, 5.0], 2, [[1, 2.0], [2.5, 4.0]]),
        ([np.nan, 2.0, np.nan], 1, None),
    ],
)
def test_what_is_measured_is_seen(values, smooth, expected):
    curve = ("run", "train", figures.TRACE, range(len(values)), values)
    ax = plotting.trace(figures.frame(curve), smooth=smooth)
    if expected is not None:
        assert _lines(ax) == [expected]
    assert _ink(ax) > 20, "nothing is drawn"


def test_a_single_accuracy_is_seen():
    curve = ("run", "train", "memorization/noisy_accuracy", [5], [0.5])
    assert _ink(plotting.memorization(figures.frame(curve))) > 20
