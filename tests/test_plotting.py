"""Figures show the data they are given, at the right places."""

from __future__ import annotations

import io
import itertools
import math
import sys
import warnings

import matplotlib

matplotlib.use("Agg")
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import pytest
from scipy import stats
import seaborn

from keras_fisher import plotting

_TRACE = "fisher/trace"
_LAYER = "fisher/trace_by_layer/"


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def _frame(*curves):
    """`(run, split, tag, steps, values)`, written in this order."""
    rows = [
        (run, split, tag, step, value, 0.0)
        for run, split, tag, steps, values in curves
        for step, value in zip(steps, values)
    ]
    columns = ["run", "split", "tag", "step", "value", "wall_time"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4])


def _realistic():
    random = np.random.default_rng(0)
    steps = np.arange(0, 3000, 10)
    curves = []
    for run, peak in {"lr=0.01": 400, "lr=0.1": 60}.items():
        shape = 10 + peak * steps / 400 * np.exp(1 - steps / 400)
        noise = random.lognormal(0, 0.3, [5, len(steps)])
        curves.append((run, "train", _TRACE, steps, shape * noise[0]))
        curves += [
            (run, "train", f"{_LAYER}conv_{k}", steps, shape * noise[k] / 4)
            for k in range(1, 5)
        ]
        curves += [
            (run, "train", f"memorization/{kind}_accuracy", steps, shape / 1e3)
            for kind in ("clean", "noisy", "recovered")
        ]
    return _frame(*curves)


def _runs():
    random = np.random.default_rng(1)
    trace = np.exp(random.uniform(1, 6, 20))
    accuracy = 0.95 - 0.02 * np.log(trace) + random.normal(0, 0.02, 20)
    return pd.DataFrame({"early_trace": trace, "val_accuracy": accuracy})


def _save(ax):
    file = io.BytesIO()
    ax.figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def _lines(ax):
    return [line.get_xydata().tolist() for line in ax.get_lines()]


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plotting.trace(_realistic(), smooth=5, ax=ax),
        lambda ax: plotting.memorization(_realistic(), ax=ax),
        lambda ax: plotting.trace_by_layer(_realistic(), "lr=0.1", ax=ax),
        lambda ax: plotting.early_trace_against_accuracy(_runs(), ax=ax),
    ],
    ids=["trace", "memorization", "trace_by_layer", "early_trace"],
)
def test_figures_are_drawn_without_a_warning(draw):
    ax = draw(None)
    assert plt.fignum_exists(ax.figure.number)
    assert ax.figure.get_layout_engine() is not None
    _save(ax)
    plt.close("all")
    given = Figure().subplots()
    assert draw(given) is given
    assert not plt.get_fignums()
    _save(given)


def test_trace_draws_a_line_for_each_run():
    frame = _frame(
        ("b", "train", _TRACE, [0, 10, 500], [3.0, 5.0, 4.0]),
        ("a", "train", _TRACE, [0, 7], [1.0, 100.0]),
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


def test_the_legend_is_beside_the_data():
    ax = plotting.trace(_realistic())
    _save(ax)
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.bbox)
    assert legend.x1 <= ax.figure.bbox.x1
    assert not ax.get_legend().get_frame_on()


def test_one_run_in_the_log_directory_needs_no_legend():
    run = (".", "train", _TRACE, [0, 1], [1.0, 2.0])
    assert plotting.trace(_frame(run)).get_legend() is None
    named = ("a", *run[1:])
    assert _legend(plotting.trace(_frame(named))) == ["a"]


def test_many_runs_have_colors_of_their_own():
    curves = [(f"{k:02}", "train", _TRACE, [0], [1.0]) for k in range(12)]
    lines = plotting.trace(_frame(*curves)).get_lines()
    assert len({line.get_color() for line in lines}) == 12


def test_smoothing_averages_consecutive_measurements():
    steps, values = [0, 1, 2, 30], [1.0, 2.0, 6.0, 4.0]
    frame = _frame(
        ("a", "train", _TRACE, steps, values),
        ("b", "train", _TRACE, [4, 6], [3.0, 5.0]),
    )
    ax = plotting.trace(frame, smooth=3)
    assert _lines(ax) == [[[1, 3.0], [11, 4.0]], [[5, 4.0]]]
    assert ax.get_ylabel() == "Tr(F), mean of 3 measurements"
    for smooth in (0, -1):
        with pytest.raises(ValueError, match=f"smooth.*{smooth}"):
            plotting.trace(frame, smooth=smooth)


def test_smoothing_does_not_smear_what_is_not_finite():
    values = [1.0, math.inf, 1.0, 2.0**99, 0.25, 0.25]
    frame = _frame(("a", "train", _TRACE, range(6), values))
    [line] = _lines(plotting.trace(frame, smooth=2))
    assert [y for _, y in line] == [math.inf, math.inf, 2**98, 2**98, 0.25]


def test_other_curves_are_named_by_tag_and_split():
    frame = _frame(
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
    frame = _frame(("a", "train", _TRACE, [0, 1], [value, value]))
    ax = plotting.trace(frame)
    assert ax.get_yscale() == "linear"
    _save(ax)


@pytest.mark.parametrize("draw", [plotting.trace, plotting.memorization])
def test_a_curve_that_is_missing_is_an_error(draw):
    frame = _frame(("a", "train", "epoch_loss", [0], [1.0]))
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
    x, y = [10, 100, 1000, 5], [0.9, 0.7, 0.8, 0.95]
    found = plotting.rank_correlation(x, y)
    assert ax.get_title() == (
        f"Spearman's ρ = -0.80, 95 % interval [{found.low:.2f}, "
        f"{found.high:.2f}], 4 runs"
    )
    assert ax.get_ylabel() == "validation accuracy, %"
    assert ax.get_xlabel() == (
        "Tr(F) early in training, TrF$_i$\n(3 of 7 runs lack a value)"
    )


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


def _normals(seed, count, correlation=0.6):
    random = np.random.default_rng(seed)
    x, noise = random.normal(size=[2, count])
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def test_the_rank_correlation_is_that_of_scipy():
    x, y = _normals(0, 30)
    y = np.round(2 * y)  # ties
    found = plotting.rank_correlation(x, y)
    assert found.correlation == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.count == 30
    for confidence in (0.95, 0.5):
        ours = plotting.rank_correlation(
            x, y, confidence=confidence, resamples=4000
        )
        theirs = stats.bootstrap(
            (x, y),
            lambda x, y: stats.spearmanr(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=1000,
            confidence_level=confidence,
            method="percentile",
            random_state=1,
        ).confidence_interval
        np.testing.assert_allclose(ours[1:3], theirs, atol=0.04)
    assert found.low < ours.low < found.correlation < ours.high < found.high


def test_each_resample_has_ranks_of_its_own():
    x, y = np.random.default_rng(0).integers(6, size=[2, 50, 8])
    np.testing.assert_allclose(
        plotting._spearman(x, y),
        [stats.spearmanr(*pair).statistic for pair in zip(x, y)],
        atol=1e-12,
    )


def test_the_interval_covers_the_true_correlation():
    truth = 6 / math.pi * math.asin(0.6 / 2)
    covered = 0
    for seed in range(100):
        found = plotting.rank_correlation(*_normals(seed, 40), resamples=500)
        covered += found.low <= truth <= found.high
    # 95 expected, with a standard deviation of 2.
    assert 88 <= covered <= 100


def test_the_seed_decides():
    x, y = _normals(0, 20)
    found = plotting.rank_correlation(x, y)
    assert plotting.rank_correlation(x, y, seed=0) == found
    other = plotting.rank_correlation(x, y, seed=1)
    assert other.low != found.low
    assert other.correlation == found.correlation


def test_constant_sides_have_no_correlation():
    # Of the resamples of three pairs, one in nine is constant.
    found = plotting.rank_correlation([1, 2, 3], [3, 2, 1])
    assert found == (-1.0, -1.0, -1.0, 3)
    # Half of these are.
    found = plotting.rank_correlation([1, 1, 1, 2], [1, 2, 3, 4])
    assert np.isfinite(found).all()
    found = plotting.rank_correlation([1, 2, 3], [7, 7, 7])
    assert np.isnan(found[:3]).all() and found.count == 3


def test_the_rank_correlation_needs_three_finite_pairs():
    nan, inf = np.nan, np.inf
    found = plotting.rank_correlation([1, nan, 3, 4, inf], [1, 2, 3, 4, 0])
    assert found[0] == 1.0 and found.count == 3
    with pytest.raises(ValueError, match=r"3 or more.*2 of 4 pairs"):
        plotting.rank_correlation([1, nan, 3, 4], [1, 2, inf, 4])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        plotting.rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="vectors"):
        plotting.rank_correlation(np.ones([2, 3]), np.ones([2, 3]))
    for confidence in (0.0, 1.0, 95, nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            plotting.rank_correlation(
                [1, 2, 3], [1, 2, 3], confidence=confidence
            )


def test_memorization_styles_by_kind_and_colors_by_run():
    name = "memorization/{}_accuracy".format
    frame = _frame(
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
    frame = _frame(
        (".", "train", name("recovered"), [0, 5], [0.25, 0.5]),
        (".", "train", name("clean"), [0, 5], [0.75, 1.0]),
    )
    assert _legend(plotting.memorization(frame)) == ["clean", "recovered"]


def _mesh(ax):
    """Edges of steps, values by layer, and the mesh."""
    [mesh] = ax.collections
    edges = mesh.get_coordinates()
    np.testing.assert_array_equal(
        edges, edges[:1, :] * [1, 0] + edges[:, :1] * [0, 1]
    )
    np.testing.assert_array_equal(edges[:, 0, 1], np.arange(len(edges)) - 0.5)
    return edges[0, :, 0], mesh.get_array(), mesh


def _shown(mesh):
    """Colors of the cells."""
    return mesh.to_rgba(mesh.get_array())


def test_the_heat_map_has_true_positions():
    steps = [0, 10, 20, 100]
    traces = [[1.0, 8.0], [2.0, 4.0], [4.0, 16.0], [5.0, 2.0]]
    ax = plotting.layer_heat_map(steps, traces, ["first", "second"])
    edges, values, mesh = _mesh(ax)
    np.testing.assert_array_equal(edges, [-5, 5, 15, 60, 140])
    np.testing.assert_array_equal(values, np.transpose(traces))
    assert isinstance(mesh.norm, colors.LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 16.0)
    assert mesh.get_cmap().name == "viridis"
    assert mesh.get_rasterized()  # for files of a bearable size
    # The first layer is on top.
    assert ax.get_ylim() == (1.5, -0.5)
    assert [*ax.get_yticks()] == [0, 1]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["first", "second"]
    assert ax.get_xlabel() == "optimizer step"
    bar = mesh.colorbar.ax
    assert bar.get_ylabel() == "Tr(F)" and bar.figure is ax.figure
    _save(ax)


def test_zeros_have_a_color_and_what_is_not_finite_is_gray():
    nan, inf = np.nan, np.inf
    traces = np.array([[0.0, 1.0, nan], [1e-30, 1e3, inf]])
    ax = plotting.layer_heat_map([0, 1], traces, ["a", "b", "c"])
    _save(ax)
    _, _, mesh = _mesh(ax)
    assert mesh.norm.vmax == 1e3
    assert mesh.norm.vmin == pytest.approx(1e-3)
    shown = _shown(mesh)
    lowest, highest = mesh.get_cmap()([0.0, 1.0])
    np.testing.assert_array_equal(shown[0], [lowest, lowest])
    np.testing.assert_array_equal(shown[1, 1], highest)
    np.testing.assert_allclose(shown[2], 2 * [[0.85, 0.85, 0.85, 1.0]])


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan, np.inf, -1.0, 1e-45])
def test_values_can_be_all_equal(value):
    ax = plotting.layer_heat_map([0, 5], np.full([2, 3], value), list("abc"))
    _save(ax)
    _, _, mesh = _mesh(ax)
    assert 0 < mesh.norm.vmin < mesh.norm.vmax < np.inf
    if value == 7.0:
        np.testing.assert_allclose(mesh.norm([7.0]), [0.5])


def test_a_single_step_is_drawn():
    ax = plotting.layer_heat_map([30], [[1.0, 2.0]], ["a", "b"])
    _save(ax)
    edges, _, _ = _mesh(ax)
    np.testing.assert_array_equal(edges, [29.5, 30.5])
    ticks = [t for t in ax.get_xticks() if 29.5 <= t <= 30.5]
    assert ticks == [30]


def test_long_runs_are_averaged():
    count = plotting._MOST_COLUMNS
    steps = np.square(np.arange(2 * count + 3))
    traces = np.stack([1.0 + np.arange(2 * count + 3), steps + 1.0], axis=1)
    traces[2:6, 1] = [np.nan, 3.0, np.nan, np.nan]
    ax = plotting.layer_heat_map(steps, traces, ["a", "b"])
    edges, values, _ = _mesh(ax)
    assert values.shape[1] <= count
    # Three at a time, but for the last two.
    np.testing.assert_allclose(values[0, :2], [2.0, 5.0])
    np.testing.assert_allclose(values[0, -1], 2 * count + 2.5)
    np.testing.assert_allclose(values[1, :2], [(1 + 2) / 2, 3.0])
    np.testing.assert_allclose(edges[:3], [-0.5, (4 + 9) / 2, (25 + 36) / 2])
    last, before = steps[-1], steps[-2]
    np.testing.assert_allclose(edges[-1], last + (last - before) / 2)
    assert len(edges) == values.shape[1] + 1
    traces[:3, 1] = np.nan
    ax = plotting.layer_heat_map(steps, traces, ["a", "b"])
    assert _mesh(ax)[1].mask[:, 0].tolist() == [False, True]


def test_names_of_layers_do_not_overlap():
    layers = [f"block_{k}/conv" for k in range(90)]
    ax = Figure(figsize=(6, 4)).subplots()
    plotting.layer_heat_map([0, 1], np.ones([2, 90]), layers, ax=ax)
    _save(ax)
    labels = ax.get_yticklabels()
    assert len(labels) > 10
    for position, label in zip(ax.get_yticks(), labels):
        assert label.get_text() == layers[int(position)]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    # A figure of its own is as high as it needs to be.
    ax = plotting.layer_heat_map([0, 1], np.ones([2, 40]), layers[:40])
    _save(ax)
    assert len(ax.get_yticks()) == 40
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("steps", "shape", "layers"),
    [([0, 1], (2, 3), ["a"]), ([0], (2, 1), ["a"]), ([], (0, 1), ["a"])],
)
def test_shapes_must_fit(steps, shape, layers):
    with pytest.raises(ValueError, match=f"{len(steps)} steps, 1 layers"):
        plotting.layer_heat_map(steps, np.ones(shape), layers)
    assert not plt.get_fignums()


def test_the_heat_map_needs_matplotlib_only(monkeypatch):
    for name in ("seaborn", "scipy", "pandas", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    traces = np.random.default_rng(0).lognormal(size=[3000, 30])
    layers = [f"conv_{k}" for k in range(30)]
    ax = Figure().subplots()
    plotting.layer_heat_map(np.arange(3000), traces, layers, ax=ax)
    _save(ax)


def test_trace_by_layer_is_in_the_order_of_the_model():
    layers = ["stem", "block_10", "block_2", "head"]
    frame = _frame(
        ("a", "train", _LAYER + "x", [0, 1], [1.0, 2.0]),
        *(
            ("b", "train", _LAYER + layer, [0, 30], [k + 1.0, k + 2.0])
            for k, layer in enumerate(layers)
        ),
        ("b", "train", _LAYER + "late", [30], [9.0]),
        ("b", "train", _TRACE, [0, 30], [1.0, 2.0]),
    )
    ax = plotting.trace_by_layer(frame, "b")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [*layers, "late"]
    edges, values, _ = _mesh(ax)
    np.testing.assert_array_equal(edges, [-15, 15, 45])
    np.testing.assert_array_equal(
        values.filled(np.nan), [[1, 2], [2, 3], [3, 4], [4, 5], [np.nan, 9]]
    )
    assert ax.get_title() == "b"


def test_trace_by_layer_needs_to_know_the_run():
    one = (".", "train", _LAYER + "x", [0, 1], [1.0, 2.0])
    total = ("b", "train", _TRACE, [0, 1], [1.0, 2.0])
    ax = plotting.trace_by_layer(_frame(one, total))
    assert ax.get_title() == ""
    two = _frame(one, ("a", *one[1:]), total)
    with pytest.raises(ValueError, match=r"run=None.*\['.', 'a'\]"):
        plotting.trace_by_layer(two)
    with pytest.raises(ValueError, match=r"run='b'.*\['.', 'a'\]"):
        plotting.trace_by_layer(two, "b")
    with pytest.raises(ValueError, match=r"run=None.*\[\]"):
        plotting.trace_by_layer(_frame(total))


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
