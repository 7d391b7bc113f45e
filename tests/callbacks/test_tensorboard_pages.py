"""What one sees in TensorBoard, in a real browser."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher._tensorboard import event_files
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
import tensorboard_pages as pages

pytestmark = pytest.mark.skipif(
    pages.find_browser() is None,
    reason="no Chromium or Chrome is installed, which shows TensorBoard",
)

_RATES = (0.01, 0.1)
_RUNS = tuple(f"lr={rate}" for rate in _RATES)
_METRICS = ("metric/early_trace", "metric/peak_trace", "metric/explosion")


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    """Two runs that differ in the learning rate."""
    directory = tmp_path_factory.mktemp("logs")
    random = np.random.default_rng(0)
    true = np.arange(96) % 3
    x = (np.eye(6)[true] + 0.3 * random.normal(size=(96, 6))).astype("float32")
    noisy = np.arange(96) % 4 == 0
    y = {
        "label": np.where(noisy, (true + 1) % 3, true),
        "is_noisy": noisy,
        "true_label": true,
    }
    for rate, run in zip(_RATES, _RUNS):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="tanh", name="first"),
                keras.layers.Dense(3, name="second"),
            ],
            name="network",
        )
        model = FisherModel(network, FisherPenalty(0.01), trace_every=2, seed=0)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        board = FisherTensorBoard(
            directory / run,
            early_phase=EarlyPhase("loss", 1.0, warn_above=None),
            probe=x[:16],
        )
        model.fit(x, y, batch_size=16, epochs=6, verbose=0, callbacks=[board])
    return directory


@pytest.fixture(scope="module")
def url(log_dir):
    with pages.serving(log_dir) as url:
        yield url


@pytest.fixture(scope="module")
def page():
    with pages.browsing() as page:
        yield page


def _last(directory) -> dict[str, event_files.Scalar]:
    return {point.tag: point for point in event_files.scalars(str(directory))}


@pytest.mark.slow
def test_time_series_has_a_card_for_each_of_our_tags(log_dir, url, page):
    tags = (
        "fisher/trace",
        "fisher/explosion",
        "fisher/early_trace",
        "fisher/probe_trace",
        "fisher/trace_by_layer/network/first",
        "fisher/trace_by_layer/network/second",
        "memorization/clean_accuracy",
        "memorization/noisy_accuracy",
    )
    pattern = f"^({'|'.join(tags)})$"
    curves = dict.fromkeys(tags, len(_RUNS))
    cards = pages.open_time_series(page, url, pattern, curves)
    assert cards.keys() == set(tags)
    for tag, rows in cards.items():
        shown = {
            row["Run"]: (int(row["Step"].replace(",", "")), float(row["Value"]))
            for row in rows
        }
        expected = {
            f"{run}/train": _last(log_dir / run / "train")[tag] for run in _RUNS
        }
        assert shown.keys() == expected.keys()
        for run, point in expected.items():
            assert shown[run][0] == point.step, (tag, run)
            np.testing.assert_allclose(shown[run][1], point.value, rtol=1e-3)


@pytest.mark.slow
def test_scalars_draws_a_line_for_each_run(url, page):
    tags = ("fisher/trace", "fisher/explosion", "memorization/gap")
    curves = dict.fromkeys(tags, len(_RUNS))
    charts = pages.open_scalars(page, url, f"^({'|'.join(tags)})$", curves)
    for tag in tags:
        assert charts[tag]["curves"] == len(_RUNS), charts[tag]


def _check_custom_scalars(page, url):
    layers = ("network/first", "network/second")
    tags = {
        "Tr(F)": ["fisher/trace", "fisher/probe_trace"],
        "Explosion ratio": ["fisher/explosion"],
        "Tr(F) by layer": [f"fisher/trace_by_layer/{name}" for name in layers],
        "Gradient of the penalty over that of the loss": ["fisher/ratio"],
        "Clean against noisy accuracy": [
            "memorization/clean_accuracy",
            "memorization/noisy_accuracy",
        ],
    }
    curves = {title: len(of) * len(_RUNS) for title, of in tags.items()}
    charts = pages.open_custom_scalars(page, url, curves)
    assert list(charts) == list(tags)
    for title, chart in charts.items():
        assert "no data" not in chart["text"].lower()
        expected = {
            f"{tag} ({run}/train)" for tag in tags[title] for run in _RUNS
        }
        assert set(chart["series"]) == expected
        assert chart["curves"] == len(expected), title


def _check_hparams(page, url, log_dir):
    columns = ("learning_rate", "alpha", "batch_size", *_METRICS)
    table = pages.open_hparams(page, url, columns, len(_RUNS))
    rows = sorted(table, key=lambda row: float(row["learning_rate"]))
    for row, rate, run in zip(rows, _RATES, _RUNS):
        assert run in row["Trial ID"]
        points = _last(log_dir / run / "hparams")
        expected = {
            "learning_rate": rate,
            "alpha": 0.01,
            "batch_size": 16,
            **{name: points[name].value for name in _METRICS},
        }
        shown = {name: float(row[name]) for name in expected}
        assert shown == pytest.approx(expected, rel=1e-3)
        # The last point of the curve is what the row tells.
        train = _last(log_dir / run / "train")
        for name in ("early_trace", "explosion"):
            assert shown[f"metric/{name}"] == pytest.approx(
                train[f"fisher/{name}"].value, rel=1e-3
            )


def _check_images(page, url):
    images = pages.open_images(page, url, len(_RUNS))
    shown = "\n".join(image["text"] for image in images)
    assert all(f"\n{run}/train\n" in shown for run in _RUNS)
    for image in images:
        assert "fisher/heat_map" in image["text"]
        assert re.search(r"\bstep\s+36\b", image["text"])
        assert image["width"] > 100 and image["height"] > 100


@pytest.mark.slow
def test_custom_scalars_has_lines_of_both_runs(url, page):
    _check_custom_scalars(page, url)


@pytest.mark.slow
def test_hparams_has_both_runs_and_their_metrics(log_dir, url, page):
    _check_hparams(page, url, log_dir)


@pytest.mark.slow
def test_images_shows_the_heat_maps(url, page):
    _check_images(page, url)


@pytest.mark.slow
def test_the_python_reader_shows_the_same(log_dir, page):
    with pages.serving(log_dir, load_fast="false") as url:
        _check_custom_scalars(page, url)
        _check_hparams(page, url, log_dir)
        _check_images(page, url)
