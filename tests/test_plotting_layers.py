"""Figures of layers."""

from __future__ import annotations

import itertools
import sys
import warnings

import matplotlib

matplotlib.use("Agg")
import figures
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
import numpy as np
import pytest

from keras_fisher import plotting


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


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
    figures.save(ax)


def test_zeros_have_a_color_and_what_is_not_finite_is_gray():
    nan, inf = np.nan, np.inf
    traces = np.array([[0.0, 1.0, nan], [1e-30, 1e3, inf]])
    ax = plotting.layer_heat_map([0, 1], traces, ["a", "b", "c"])
    figures.save(ax)
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
    figures.save(ax)
    _, _, mesh = _mesh(ax)
    assert 0 < mesh.norm.vmin < mesh.norm.vmax < np.inf
    if value == 7.0:
        np.testing.assert_allclose(mesh.norm([7.0]), [0.5])


def test_a_single_step_is_drawn():
    ax = plotting.layer_heat_map([30], [[1.0, 2.0]], ["a", "b"])
    figures.save(ax)
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
    figures.save(ax)
    labels = ax.get_yticklabels()
    assert len(labels) > 10
    for position, label in zip(ax.get_yticks(), labels):
        assert label.get_text() == layers[int(position)]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    # A figure of its own is as high as it needs to be.
    ax = plotting.layer_heat_map([0, 1], np.ones([2, 40]), layers[:40])
    figures.save(ax)
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
    figures.save(ax)


def test_trace_by_layer_is_in_the_order_of_the_model():
    layers = ["stem", "block_10", "block_2", "head"]
    frame = figures.frame(
        ("a", "train", figures.LAYER + "x", [0, 1], [1.0, 2.0]),
        *(
            ("b", "train", figures.LAYER + layer, [0, 30], [k + 1.0, k + 2.0])
            for k, layer in enumerate(layers)
        ),
        ("b", "train", figures.LAYER + "late", [30], [9.0]),
        ("b", "train", figures.TRACE, [0, 30], [1.0, 2.0]),
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
    one = (".", "train", figures.LAYER + "x", [0, 1], [1.0, 2.0])
    total = ("b", "train", figures.TRACE, [0, 1], [1.0, 2.0])
    ax = plotting.trace_by_layer(figures.frame(one, total))
    assert ax.get_title() == ""
    two = figures.frame(one, ("a", *one[1:]), total)
    with pytest.raises(ValueError, match=r"run=None.*\['.', 'a'\]"):
        plotting.trace_by_layer(two)
    with pytest.raises(ValueError, match=r"run='b'.*\['.', 'a'\]"):
        plotting.trace_by_layer(two, "b")
    with pytest.raises(ValueError, match=r"run=None.*\[\]"):
        plotting.trace_by_layer(figures.frame(total))
