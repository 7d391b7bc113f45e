"""What the Fisher tab answers, compared with what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api as hparams
import tensorflow as tf
from werkzeug import test as werkzeug_test
import written_curves

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher import plotting
from keras_fisher._fisher_tab import experiment
from keras_fisher._fisher_tab.plugin import FisherTab
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard

_ODD = 'a "run" <script>alert(1)</script> é'


class _Server:
    """The applications of the plugin, without TensorBoard around them."""

    def __init__(self, log_dir):
        multiplexer = plugin_event_multiplexer.EventMultiplexer(
            size_guidance={}, tensor_size_guidance={"scalars": 100_000}
        )
        multiplexer.AddRunsFromDirectory(str(log_dir))
        multiplexer.Reload()
        self.multiplexer = multiplexer
        self.plugin = FisherTab(
            base_plugin.TBContext(
                data_provider=data_provider.MultiplexerDataProvider(
                    multiplexer, str(log_dir)
                )
            )
        )

    def open(self, path, method="GET", **query):
        app = self.plugin.get_plugin_apps()[path]
        return werkzeug_test.Client(app).open(
            path, method=method, query_string=query
        )

    def ask(self, path, **query):
        answer = self.open(path, **query)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text)


def _writer(directory):
    return tf.summary.create_file_writer(str(directory))


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    """Two runs of this library, and what else may lie about."""
    directory = tmp_path_factory.mktemp("logs")
    for run, penalty in (("with", FisherPenalty(0.1)), (_ODD, None)):
        keras.utils.clear_session(free_memory=False)
        board = FisherTensorBoard(
            directory / run.replace("/", "∕"),
            early_phase=EarlyPhase("loss", 2.0, warn_above=None),
        )
        model = written_curves.model(penalty)
        written_curves.fit(
            model,
            [board],
            epochs=3,
            y=written_curves.noisy_labels(),
            validation_data=(written_curves.X, written_curves.Y),
        )
    with _writer(directory / "half" / "train").as_default():
        for step, value in enumerate([2.0, np.nan, 8.0, np.inf, 1.0]):
            tf.summary.scalar("fisher/trace", value, step)
    with _writer(directory / "other").as_default():
        tf.summary.scalar("loss", 1.0, 0)
    # As `hp.hparams` leaves them: where its writer writes.
    with _writer(directory / "foreign").as_default():
        hparams.hparams({"lr": 0.1, "adam": True})
    (directory / "empty").mkdir()
    return directory


@pytest.fixture(scope="module")
def server(log_dir):
    return _Server(log_dir)


def test_rows_equal_those_of_the_library(server, log_dir):
    rows = {row["run"]: row for row in server.ask("/runs")["runs"]}
    table = keras_fisher.logs.runs(log_dir)
    assert {*rows} == {*table.index}
    for run in ("with", _ODD.replace("/", "∕"), "foreign"):
        expected = table.loc[run].dropna()
        assert expected["lr" if run == "foreign" else "peak_trace"] > 0
        found = {**rows[run]["metrics"], **rows[run]["hyperparameters"]}
        for name, value in expected.items():
            assert found[name] == value, name


@pytest.mark.parametrize(
    "ratios, expected",
    [([], 10), ([None], 10), ([5, 10], 10), ([2, 8, 50], 10), ([16, 144], 48)],
)
def test_the_threshold_lies_between_runs_that_are_far_apart(ratios, expected):
    rows = [{"metrics": {"explosion": ratio}} for ratio in ratios]
    assert experiment.threshold(rows) == pytest.approx(expected)


def test_the_peak_is_where_the_curve_is_largest(server, log_dir):
    frame = keras_fisher.logs.read(log_dir)
    curve = frame[(frame["tag"] == "fisher/trace") & (frame["run"] == "with")]
    [row] = [r for r in server.ask("/runs")["runs"] if r["run"] == "with"]
    at = curve["step"].iloc[curve["value"].to_numpy().argmax()]
    assert row["metrics"]["peak_step"] == at


def test_the_first_table_does_not_wait_for_peaks(log_dir):
    server = _Server(log_dir)
    full = ("peak_trace", "peak_step")

    def of_half(**query):
        rows = server.ask("/runs", **query)["runs"]
        [row] = [row for row in rows if row["run"] == "half"]
        return {name: row["metrics"].get(name) for name in full}

    assert of_half(peaks="known") == {"peak_trace": None, "peak_step": None}
    assert of_half() == {"peak_trace": 8.0, "peak_step": 2}
    assert of_half(peaks="known") == {"peak_trace": 8.0, "peak_step": 2}


def test_a_curve_without_a_finite_point_has_no_peak(tmp_path):
    with _writer(tmp_path / "train").as_default():
        for step, value in enumerate([np.nan, np.inf]):
            tf.summary.scalar("fisher/trace", value, step)
    [row] = _Server(tmp_path).ask("/runs")["runs"]
    assert row["run"] == "." and row["metrics"] == {}


def test_curves_equal_those_of_the_library(server, log_dir):
    frame = keras_fisher.logs.read(log_dir)
    for tag in ("fisher/trace", "fisher/ratio", "memorization/noisy_accuracy"):
        of_tag = frame[(frame["tag"] == tag) & (frame["run"] == "with")]
        [(name, curve)] = server.ask("/curves", run="with", tag=tag).items()
        assert name == tag
        np.testing.assert_array_equal(curve["steps"], of_tag["step"])
        np.testing.assert_array_equal(curve["values"], of_tag["value"])


def test_layers_add_up_to_the_trace(server):
    found = server.ask("/layers", run="with")
    assert {*found["layers"]} == {*written_curves.LAYERS}
    curve = server.ask("/curves", run="with", tag="fisher/trace")
    trace = curve["fisher/trace"]
    assert found["steps"] == trace["steps"]
    np.testing.assert_allclose(
        np.sum(found["values"], axis=0), trace["values"], rtol=1e-5
    )


def test_layers_are_in_the_order_of_their_names(tmp_path):
    with _writer(tmp_path / "train").as_default():
        for k in (10, 9, 1):
            name = f"fisher/trace_by_layer/net/conv_{k}"
            tf.summary.scalar(name, float(k), 0)
    found = _Server(tmp_path).ask("/layers", run=".")
    assert found["layers"] == ["net/conv_1", "net/conv_9", "net/conv_10"]
    assert found["values"] == [[1.0], [9.0], [10.0]]


def test_the_peak_follows_a_run_that_trains(tmp_path):
    writer = _writer(tmp_path / "live" / "train")

    def peak(server):
        server.multiplexer.Reload()
        [row] = server.ask("/runs")["runs"]
        return row["metrics"]["peak_trace"], row["metrics"]["peak_step"]

    server = None
    for step, (value, expected) in enumerate(
        [(3.0, (3.0, 0)), (7.0, (7.0, 1)), (7.0, (7.0, 1)), (2.0, (7.0, 1))]
    ):
        with writer.as_default():
            tf.summary.scalar("fisher/trace", value, step)
        writer.flush()
        server = server or _Server(tmp_path)
        assert peak(server) == expected
    # What has not grown is not read again.
    server.plugin._provider.read_scalars = None
    assert peak(server) == (7.0, 1)


def test_runs_that_are_half_written_and_not_finite(server):
    rows = {row["run"]: row for row in server.ask("/runs")["runs"]}
    metrics = rows["half"]["metrics"]
    assert (metrics["peak_trace"], metrics["peak_step"]) == (8.0, 2)
    assert rows["other"]["metrics"] == {}
    curves = server.ask("/curves", run="half", tag="fisher/trace")
    assert curves["fisher/trace"] == {
        "steps": [0, 1, 2, 3, 4],
        "values": [2.0, None, 8.0, None, 1.0],
    }
    assert server.ask("/layers", run="half")["layers"] == []


def test_the_correlation_is_the_library_s(server):
    x = [1.0, 2.5, 3.0, 4.0, 9.0, 11.0, 12.0, 15.0]
    y = [5.0, 4.0, 4.5, 1.0, 2.0, 0.5, 3.0, 0.0]

    def ask(count):
        sides = (",".join(map(str, side[:count])) for side in (x, y))
        return server.ask("/correlation", **dict(zip("xy", sides)))

    expected = plotting.rank_correlation(x, y)._asdict()
    assert ask(8) == expected
    assert -1 <= expected["low"] < expected["high"] < 0
    without = ask(7)
    assert without["low"] is without["high"] is None
    assert -1 < without["correlation"] < 0
    few = server.ask("/correlation", x="1,2", y="1,2")
    assert "3 or more pairs" in few["missing"]
    constant = server.ask("/correlation", x="1,1,1", y="1,2,3")
    assert constant["correlation"] is None


def test_it_is_active_where_there_is_something_to_see(server, tmp_path):
    assert server.plugin.is_active()
    with _writer(tmp_path / "other").as_default():
        tf.summary.scalar("loss", 1.0, 0)
    assert not _Server(tmp_path).plugin.is_active()


@pytest.mark.parametrize(
    "path, query, code",
    [
        ("/curves", {"run": "none", "tag": "fisher/trace"}, 404),
        ("/curves", {"run": "../with", "tag": "fisher/trace"}, 404),
        ("/layers", {"run": "/etc"}, 404),
        ("/curves", {"run": "with"}, 400),
        ("/curves", {"tag": "fisher/trace"}, 400),
        ("/layers", {}, 400),
        ("/correlation", {"x": "1,2,3"}, 400),
    ],
)
def test_other_requests_are_refused(server, path, query, code):
    answer = server.open(path, **query)
    assert answer.status_code == code, answer.text
    assert answer.text and answer.mimetype == "text/plain"


def test_a_fault_is_not_told_as_an_unknown_run(server, monkeypatch):
    def faulty(self, run, wanted):
        raise KeyError("scalars")

    monkeypatch.setattr(experiment.Experiment, "curves", faulty)
    with pytest.raises(KeyError, match="scalars"):
        server.open("/curves", run="with", tag="fisher/trace")


def test_only_get_is_answered(server):
    for path in server.plugin.get_plugin_apps():
        assert server.open(path, method="POST").status_code == 405, path


@pytest.mark.parametrize("name", ["index.js", "views.js", "page.js"])
def test_the_page_asks_nothing_of_other_machines(server, name):
    answer = server.open(f"/{name}")
    assert answer.mimetype == "text/javascript"
    assert "http://" not in answer.text and "https://" not in answer.text
    assert "innerHTML" not in answer.text


def test_without_plotly_the_page_is_told(server, monkeypatch):
    assert server.ask("/runs")["has_plotly"]
    assert len(server.open("/plotly.js").text) > 100_000
    monkeypatch.setitem(sys.modules, "plotly", None)
    answer = server.open("/plotly.js")
    assert answer.status_code == 404
    assert 'pip install "keras_fisher[plot]"' in answer.text
    assert not server.ask("/runs")["has_plotly"]


_START = """
import importlib.metadata
from tensorboard.plugins import base_plugin
found = importlib.metadata.entry_points(group="tensorboard_plugins")
[loader] = [each.load() for each in found if each.name == "fisher"]
print("started")
print(loader().load(base_plugin.TBContext()).plugin_name)
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_tensorboard_finds_it_and_starts_in_any_case(backend):
    found = subprocess.run(
        [sys.executable, "-c", _START],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    started, *loaded = found.stdout.split()
    assert started == "started", found.stderr
    assert loaded == (["fisher"] if backend == "tensorflow" else [])
    assert ("needs Keras with the backend" in found.stderr) == (not loaded)


def test_what_overflowed_hides_no_peak_that_the_curve_has():
    point = types.SimpleNamespace(value=np.inf, wall_time=1.0)
    of = {"hparams": {"metric/peak_trace": point}}
    found = experiment._metrics(of, experiment.Peak(8.0, 2))
    assert found == {"peak_trace": 8.0, "peak_step": 2}
