"""The Fisher tab, in a real TensorBoard and a real browser."""

from __future__ import annotations

import csv
import html
import json
import time
import urllib.parse

import cases
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import keras_fisher

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")
import tensorboard_pages as pages

pytestmark = pytest.mark.skipif(
    pages.find_browser() is None,
    reason="no Chromium or Chrome is installed, which shows TensorBoard",
)

_ODD = "<img src=x onerror=alert(1)> 'é' & co"
_LAYERS = ("net/first", "net/<b>second</b>")


def _write(directory, run, peak, steps=40, accuracy=0.9):
    """What the callback writes, of a run with known figures."""
    at = np.arange(0, 2 * steps, 2)
    trace = 1 + (peak - 1) * np.exp(-(((at - 20) / 10.0) ** 2))
    writer = tf.summary.create_file_writer(str(directory / run / "train"))
    with writer.as_default():
        for step, value in zip(at, trace):
            tf.summary.scalar("fisher/trace", value, step)
            tf.summary.scalar("fisher/ratio", value / 10, step)
            tf.summary.scalar("fisher/penalty", value / 100, step)
            for layer, share in zip(_LAYERS, (0.75, 0.25)):
                tag = f"fisher/trace_by_layer/{layer}"
                tf.summary.scalar(tag, share * value, step)
            for kind, value in (("clean", 0.8), ("noisy", 0.3)):
                tag = f"memorization/{kind}_accuracy"
                tf.summary.scalar(tag, value * step / at[-1], step)
            tf.summary.scalar("fisher/explosion", trace.max(), step)
        tf.summary.scalar("fisher/early_trace", trace[5], int(at[5]))
    writer.close()
    writer = tf.summary.create_file_writer(str(directory / run / "validation"))
    with writer.as_default():
        tf.summary.scalar("epoch_accuracy", accuracy, 0)
    writer.close()


_PEAKS = {"calm": 2.0, "steep": 30.0, _ODD: 100.0}


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    for i, (run, peak) in enumerate(_PEAKS.items()):
        _write(directory, run, peak, accuracy=0.9 - 0.1 * i)
    return directory


@pytest.fixture(scope="module", params=["auto", *cases.slow(["false"])])
def url(request, log_dir):
    with pages.serving(log_dir, request.param) as url:
        yield url


@pytest.fixture(scope="module")
def page():
    with pages.browsing(width=1280, height=900) as page:
        yield page


class _Tab:
    """The tab in the frame that TensorBoard gives it."""

    def __init__(self, page, url, **state):
        self.wrong, self.requests = [], []
        query = urllib.parse.urlencode({"fisher": json.dumps(state)})
        page.goto("about:blank")  # so that the page before asks no more
        self._listen(page)
        page.goto(f"{url}?{query}#fisher")
        page.wait_for_selector("iframe")
        self.page = page
        self.frame = page.frame_locator("iframe").first
        self.frame.locator("main[aria-busy=false]").wait_for()

    def _listen(self, page):
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        page.on(
            "console",
            lambda said: said.type == "error" and self.wrong.append(said.text),
        )
        page.on("request", lambda request: self.requests.append(request.url))

    def show(self, view):
        self.frame.get_by_role("tab", name=view).click()
        self.frame.locator("main[aria-busy=false]").wait_for()

    def text(self):
        return self.frame.locator("main").inner_text()

    def data(self, which=0):
        """The data of a chart, as it is drawn."""
        chart = self.frame.locator(".js-plotly-plot").nth(which)
        return chart.evaluate(
            "(chart) => chart.data.map((t) => ({name: t.name, mode: t.mode,"
            " x: [...t.x], y: [...t.y], z: t.z && t.z.map((r) => [...r])}))"
        )

    def marked(self, which):
        """The step at which a heat map has its line."""
        chart = self.frame.locator(".js-plotly-plot").nth(which)
        return chart.evaluate("(chart) => chart.layout.shapes[0].x0")

    def assert_clean(self, url):
        assert not self.wrong, self.wrong
        left = [
            each
            for each in self.requests
            if not each.startswith((url, "data:", "blob:", "about:"))
        ]
        assert not left, left


def test_the_verdict_has_the_numbers_of_the_runs(page, url, log_dir):
    tab = _Tab(page, url, threshold=10)
    said = tab.text()
    assert "2 of 3 runs exploded" in said
    assert "75.0 % test accuracy on average, the others with 90.0 %" in said
    rows = tab.frame.locator("tbody tr")
    for i, run in enumerate(sorted(_PEAKS)):
        cells = rows.nth(i).locator("td").all_inner_texts()
        head = rows.nth(i).locator("th").inner_text()
        assert head.strip() == run
        assert float(cells[6]) == pytest.approx(_PEAKS[run], rel=5e-3)
        assert cells[7] == "20"
        assert ("exploded" in cells[8]) == (_PEAKS[run] >= 10)
    frame = keras_fisher.logs.read(log_dir)
    traces = frame[frame["tag"] == "fisher/trace"].groupby("run")["value"]
    assert traces.max()["steep"] == pytest.approx(30, rel=1e-5)
    tab.frame.get_by_label("exploded from").fill("50")
    tab.frame.get_by_label("exploded from").press("Enter")
    tab.frame.get_by_text("1 of 3 runs exploded").wait_for()
    # The state is in the address, from where it is read again.
    assert "threshold" in page.url
    page.reload()
    tab.frame.get_by_text("1 of 3 runs exploded").wait_for()
    tab.assert_clean(url)


@pytest.mark.slow
def test_the_table_is_sorted_by_a_click(page, url):
    tab = _Tab(page, url)
    tab.frame.get_by_role("button", name="peak Tr(F)").click()
    names = tab.frame.locator("tbody th").all_inner_texts()
    assert [name.strip() for name in names] == sorted(_PEAKS, key=_PEAKS.get)
    tab.frame.get_by_role("button", name="peak Tr(F)").click()
    names = tab.frame.locator("tbody th").all_inner_texts()
    assert names[0].strip() == _ODD
    tab.assert_clean(url)


def test_the_trace_is_drawn_as_it_was_written(page, url, log_dir):
    tab = _Tab(page, url, view="Trace", smooth=1)
    frame = keras_fisher.logs.read(log_dir)
    frame = frame[(frame["run"] == "steep") & (frame["tag"] == "fisher/trace")]
    lines = [line for line in tab.data() if line["name"] == "steep"]
    assert lines[0]["x"] == [*frame["step"]]
    np.testing.assert_allclose(lines[0]["y"], frame["value"])
    np.testing.assert_allclose(lines[1]["y"], frame["value"] / 10, rtol=1e-6)
    np.testing.assert_allclose(lines[2]["y"], frame["value"] / 100, rtol=1e-6)
    [peak] = [e for e in tab.data() if e["name"] == "steep, peak"]
    assert peak["x"] == [20]
    [early] = [e for e in tab.data() if e["name"] == "steep, TrF_i"]
    assert early["x"] == [10]
    tab.assert_clean(url)


@pytest.mark.slow
def test_lines_are_medians_and_bands_quartiles(page, url, log_dir):
    tab = _Tab(page, url, view="Trace", smooth=8)
    frame = keras_fisher.logs.read(log_dir)
    frame = frame[(frame["run"] == "steep") & (frame["tag"] == "fisher/trace")]
    parts = frame["value"].to_numpy().reshape(5, 8)
    low, middle, high = np.quantile(parts, [0.25, 0.5, 0.75], axis=1)
    data = tab.data()
    at = [t["name"] for t in data].index("steep")
    np.testing.assert_allclose(data[at]["y"], middle)
    band = [*high, *low[::-1]]
    np.testing.assert_allclose(data[at - 1]["y"], band)
    assert data[at - 1]["mode"] == "lines"
    tab.assert_clean(url)


@pytest.mark.slow
def test_figures_and_tables_are_saved(page, url):
    tab = _Tab(page, url)
    with page.expect_download() as saved:
        tab.frame.get_by_role("button", name="Save as CSV").click()
    with open(saved.value.path(), encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {n: float(r["peak Tr(F)"]) for n, r in rows.items()} == (
        pytest.approx(_PEAKS, rel=1e-6)
    )
    tab.show("Trace")
    tab.frame.locator(".chart").hover()
    with page.expect_download() as saved:
        tab.frame.locator("[data-title^='Download plot']").click()
    image = Image.open(saved.value.path())
    assert image.format == "PNG" and min(image.size) > 500
    tab.assert_clean(url)


@pytest.mark.slow
def test_the_early_phase_is_set_against_accuracy(page, url):
    tab = _Tab(page, url, view="Early phase")
    told = "Spearman's ρ = -1.00, 3 runs, too few for an interval"
    assert told in tab.text()
    points = {t["name"]: t["y"][0] for t in tab.data()}
    assert points["calm"] == pytest.approx(90)
    assert points["steep"] == pytest.approx(80)
    tab.assert_clean(url)


def test_layers_are_shown_by_step(page, url, log_dir):
    tab = _Tab(page, url, view="Layers", left="calm", right="steep", at=10)
    assert "optimizer step 20" in tab.text()
    heat, bars = tab.data(0), tab.data(1)
    assert heat[0]["x"][:3] == [0, 2, 4]
    order = [html.escape(layer) for layer in _LAYERS]
    shares = dict(zip(bars[0]["y"], bars[0]["x"]))
    np.testing.assert_allclose([shares[n] for n in order], [1.5, 0.5])
    # Within the slider's movement, without asking again.
    asked = len(tab.requests)
    slider = tab.frame.get_by_role("slider", name="step")
    slider.evaluate(
        "(s) => { s.value = 0; s.dispatchEvent(new Event('input')); }"
    )
    tab.frame.get_by_text("optimizer step 0", exact=True).wait_for()
    assert len(tab.requests) == asked
    assert [tab.marked(which) for which in (0, 2)] == [0, 0]
    tab.assert_clean(url)


@pytest.mark.slow
def test_the_step_and_the_runs_of_the_layers_are_chosen(page, url):
    tab = _Tab(page, url, view="Layers", left="calm", right="steep")
    tab.frame.get_by_role("slider", name="step").press("Home")
    tab.frame.get_by_text("optimizer step 0", exact=True).wait_for()
    page.wait_for_function("() => location.href.includes('%22at%22%3A0')")
    tab.frame.get_by_label("right").select_option("calm")
    tab.frame.locator("main[aria-busy=false] .sides > :only-child").wait_for()
    assert len(tab.data(0)) == 1
    tab.assert_clean(url)


@pytest.mark.slow
def test_memorization_shows_each_kind(page, url):
    tab = _Tab(page, url, view="Memorization")
    ends = {t["name"]: t["y"][-1] for t in tab.data()}
    assert ends["calm, clean"] == pytest.approx(80)
    assert ends["calm, noisy"] == pytest.approx(30)
    tab.assert_clean(url)


@pytest.mark.slow
def test_runs_are_chosen_in_the_sidebar(page, url):
    tab = _Tab(page, url)
    tab.frame.get_by_role("checkbox", name="calm").uncheck()
    tab.frame.get_by_text("2 of 2 runs exploded").wait_for()
    tab.frame.get_by_label("Filter runs").fill("steep|calm")
    tab.frame.get_by_label("Filter runs").press("Enter")
    tab.frame.get_by_text("1 of 1 runs exploded").wait_for()
    assert "hidden" in page.url and "filter" in page.url
    tab.frame.get_by_role("button", name="None").click()
    tab.frame.get_by_text("No run has told of Tr(F)").wait_for()
    for view in ("Trace", "Early phase", "Layers", "Memorization"):
        tab.show(view)
        assert "None of the chosen runs" in tab.text()
    tab.assert_clean(url)


@pytest.mark.slow
def test_the_keyboard_goes_from_view_to_view(page, url):
    tab = _Tab(page, url)
    tab.frame.get_by_role("tab", name="Verdict").focus()
    for key, view in [
        ("ArrowRight", "Trace"),
        ("ArrowLeft", "Verdict"),
        ("ArrowLeft", "Memorization"),
    ]:
        page.keyboard.press(key)
        chosen = tab.frame.get_by_role("tab", name=view, selected=True)
        chosen.wait_for()
        tab.frame.locator("main[aria-busy=false]").wait_for()
        assert chosen.evaluate("(tab) => tab === document.activeElement")
    # What is pressed keeps the focus, though the table is made anew.
    tab.show("Verdict")
    button = tab.frame.get_by_role("button", name="peak Tr(F)")
    for _ in range(2):
        button.press("Enter")
        tab.frame.locator("main[aria-busy=false]").wait_for()
        assert button.evaluate("(b) => b === document.activeElement")
    tab.assert_clean(url)


@pytest.mark.slow
def test_without_plotly_the_tab_says_what_to_install(page, url):
    def answer(route):
        there = route.fetch().json()
        route.fulfill(json={**there, "has_plotly": False})

    page.route("**/fisher/runs*", answer)
    try:
        tab = _Tab(page, url, threshold=10)
        assert "2 of 3 runs exploded" in tab.text()
        for view in ("Trace", "Early phase", "Layers", "Memorization"):
            tab.show(view)
            assert 'pip install "keras_fisher[plot]"' in tab.text()
        tab.assert_clean(url)
    finally:
        page.unroute("**/fisher/runs*")


@pytest.mark.slow
def test_an_answer_that_fails_is_told_and_asked_for_again(page, url):
    def answer(route):
        if "peaks=known" in route.request.url:
            route.continue_()
        else:
            route.fulfill(status=500, body="no peaks today")

    page.route("**/fisher/runs*", answer)
    try:
        tab = _Tab(page, url, threshold=10)
        alert = tab.frame.get_by_role("alert")
        alert.wait_for()
        assert alert.inner_text() == "no peaks today"
        assert tab.frame.locator("main").get_attribute("aria-busy") == "false"
    finally:
        page.unroute("**/fisher/runs*")
    tab.frame.locator("main").evaluate(
        "() => document.dispatchEvent(new Event('visibilitychange'))"
    )
    tab.frame.get_by_text("2 of 3 runs exploded").wait_for()
    assert not tab.frame.get_by_role("alert").count()


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["auto", "false"])
def test_the_page_follows_a_run_that_trains(tmp_path, page, load_fast):
    with tf.summary.create_file_writer(f"{tmp_path}/live/train").as_default():
        tf.summary.scalar("fisher/trace", 5.0, 0)
        tf.summary.flush()
        with pages.serving(tmp_path, load_fast) as url:
            tab = _Tab(page, url, view="Trace", smooth=1)
            assert tab.data()[0]["x"] == [0]
            # No new peak, and nothing else that the table shows.
            tf.summary.scalar("fisher/trace", 4.0, 1)
            tf.summary.flush()
            place = tab.frame.locator(".js-plotly-plot")
            end = time.monotonic() + 60
            while tab.data()[0]["x"] != [0, 1]:
                assert time.monotonic() < end, tab.data()
                page.wait_for_timeout(500)
                place.evaluate(
                    "() => document.dispatchEvent("
                    "new Event('visibilitychange'))"
                )
                place.wait_for()
            tab.assert_clean(url)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 2560])
def test_dark_theme_and_wide_pages(page, url, width):
    page.set_viewport_size({"width": width, "height": 900})
    tab = _Tab(page, url, view="Trace")
    page.evaluate("() => document.body.classList.add('dark-mode')")
    tab.frame.locator("body.dark").wait_for()
    chart = tab.frame.locator(".js-plotly-plot").bounding_box()
    assert chart["width"] > width - 320, chart
    tab.assert_clean(url)


@pytest.mark.slow
def test_many_runs_are_shown(tmp_path):
    for i in range(200):
        _write(tmp_path, f"run {i}", 1.0 + i, steps=200)
    with (
        pages.serving(tmp_path) as url,
        pages.browsing(width=1280, height=900) as page,
    ):
        begin = time.monotonic()
        tab = _Tab(page, url, threshold=101)
        assert "100 of 200 runs exploded" in tab.text()
        print(f"first view: {time.monotonic() - begin:.1f} s")
        tab.show("Trace")
        assert "180 more are not drawn" in tab.text()
        tab.assert_clean(url)
