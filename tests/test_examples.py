"""The example scripts, run as a person runs them."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import clusters
import keras
from matplotlib import colors
from matplotlib import image
import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing import event_accumulator

import keras_fisher
from keras_fisher._tensorboard import event_files

_ROOT = pathlib.Path(__file__).parent.parent


def _run(script, *flags, data_dir):
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(data_dir),
        "PYTHONPATH": str(_ROOT),
    }
    return subprocess.run(
        [sys.executable, str(_ROOT / "examples" / script), *flags],
        capture_output=True,
        text=True,
        env=environment,
        cwd=data_dir,
        check=False,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Shared by the tests, so that data are prepared once."""
    return tmp_path_factory.mktemp("data")


def _test_accuracy(output):
    return float(re.findall(r"Test accuracy: ([\d.]+) %", output)[-1])


def test_train_writes_the_trace_at_its_true_steps(data_dir, tmp_path):
    result = _run(
        "train.py",
        "--dataset=digits",
        "--penalty=fisher",
        "--every=10",
        "--trace_every=4",
        "--label_noise=0.4",
        "--epochs=2",
        "--steps_per_execution=5",
        f"--log_dir={tmp_path}",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    for name in ("fisher_trace", "fisher_penalty", "noisy_accuracy"):
        assert name in result.stdout
    assert 0 < _test_accuracy(result.stdout) < 100
    events = event_accumulator.EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    steps = [e.step for e in events.Tensors("fisher/trace")]
    assert steps == [0, 4, 8, 10, 12, 16, 20]  # of 11 a pass, 22 in all


@pytest.mark.parametrize(
    "script, flag",
    [
        ("train.py", "--alpha"),
        *(
            pytest.param(script, flag, marks=pytest.mark.slow)
            for script, flag in [
                ("demo.py", "--alpha"),
                ("plot_logs.py", "--smooth"),
                ("measure.py", "--num_probes"),
            ]
        ),
    ],
)
def test_help_explains_every_flag(script, flag, data_dir):
    result = _run(script, "--help", data_dir=data_dir)
    assert flag in result.stdout
    assert "(default:" in result.stdout


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--fraction=0", "fraction"),
        ("--stop=0", "stop"),
        ("stray", "stray"),
        ("--strategy=multi_worker", "TF_CONFIG"),
        pytest.param("--strategy=all", "strategy", marks=pytest.mark.slow),
        pytest.param("--cpu_devices=2", "mirrored", marks=pytest.mark.slow),
        pytest.param("--alpha=-1", "alpha", marks=pytest.mark.slow),
        pytest.param("--every=0", "every", marks=pytest.mark.slow),
        pytest.param("--label_noise=1.1", "noise", marks=pytest.mark.slow),
        pytest.param("--penalty=fischer", "penalty", marks=pytest.mark.slow),
        pytest.param("--jit=maybe", "jit", marks=pytest.mark.slow),
    ],
)
def test_wrong_values_are_refused_before_anything_trains(
    flag, message, data_dir
):
    result = _run("train.py", flag, data_dir=data_dir)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Epoch" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--steps_per_execution=2", "--jit=true"])
def test_what_replicas_cannot_do_is_refused(flag, data_dir):
    result = _run("train.py", "--strategy=mirrored", flag, data_dir=data_dir)
    assert result.returncode != 0
    assert "leave both out" in result.stderr
    assert "Epoch" not in result.stdout


def test_train_by_replicas_learns(data_dir):
    result = _run(
        "train.py",
        "--model=mlp",
        "--dataset=digits",
        "--penalty=fisher",
        "--epochs=3",
        "--strategy=mirrored",
        "--cpu_devices=2",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    accuracy = _test_accuracy(result.stdout)
    assert accuracy > 50, f"{accuracy} %, where guessing gives 10 %"


@pytest.mark.slow
def test_train_by_two_workers(data_dir, tmp_path):
    flags = [
        "--model=mlp",
        "--dataset=digits",
        "--epochs=1",
        "--penalty=fisher",
        "--strategy=multi_worker",
        f"--log_dir={tmp_path}",
    ]
    _run("train.py", *flags[:3], data_dir=data_dir)  # prepares the data

    def start(config):
        environment = {"TF_CONFIG": config, "TFDS_DATA_DIR": str(data_dir)}
        return subprocess.Popen(
            [sys.executable, str(_ROOT / "examples/train.py"), *flags],
            env=os.environ | environment | {"PYTHONPATH": str(_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    workers = [start(config) for config in clusters.cluster(2)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output[-3000:]
    first, second = map(_test_accuracy, outputs)
    assert first == second
    points = event_files.scalars(str(tmp_path / "train"))
    steps = [p.step for p in points if p.tag == "fisher/trace"]
    assert steps == list(range(11))


@pytest.mark.slow  # `make demo` runs all of it
def test_demo_ends_with_a_table_and_a_figure(data_dir, tmp_path):
    result = _run(
        "demo.py", "--epochs=2", f"--output_dir={tmp_path}", data_dir=data_dir
    )
    assert result.returncode == 0, result.stderr
    assert "peak Tr(F)" in result.stdout
    assert (tmp_path / "fisher_explosion.png").stat().st_size > 10_000
    table = pd.read_csv(tmp_path / "table.csv")
    assert (
        table["learning rate"].tolist() == [0.01] * 2 + [0.03] * 2 + [0.1] * 2
    )
    assert (
        table["memorized"].notna().tolist()
        == [False] * 2 + [True] * 2 + [False] * 2
    )
    [log_dir] = (tmp_path / "logs").iterdir()
    assert str(log_dir) in result.stdout
    traces = keras_fisher.logs.read(log_dir)
    traces = traces[traces["tag"] == "fisher/trace"]
    for run, steps in traces.groupby("run")["step"]:
        assert steps.tolist() == list(range(0, 62, 4)), run
    # Means over an epoch, so that one draw does not make a peak.
    epochs = traces["step"] // 31
    means = traces.groupby(["run", epochs])["value"].mean()
    np.testing.assert_allclose(
        table["peak Tr(F)"], means.groupby("run").max(), rtol=1e-6
    )


def test_figures_are_drawn_from_logs(data_dir, tmp_path):
    for rate in (0.3, 0.1):
        result = _run(
            "train.py",
            "--dataset=digits",
            "--model=mlp",
            "--label_noise=0.4",
            "--epochs=2",
            "--probe_size=64",
            "--early_accuracy=0.1",
            f"--learning_rate={rate}",
            f"--log_dir={tmp_path}/logs/lr={rate}",
            data_dir=data_dir,
        )
        assert result.returncode == 0, result.stderr
        assert re.search(r"TrF_i: [\d.]+ \(step \d+\)", result.stdout)
    result = _run(
        "plot_logs.py",
        f"--log_dir={tmp_path}/logs",
        f"--output_dir={tmp_path}/figures",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {
        "trace.png",
        "probe_trace.png",
        "memorization.png",
        "trace_by_layer-lr=0.1.png",
        "trace_by_layer-lr=0.3.png",
        "runs.csv",
    }
    runs = pd.read_csv(tmp_path / "figures" / "runs.csv", index_col="run")
    assert runs["learning_rate"].to_dict() == {
        "lr=0.1": pytest.approx(0.1),
        "lr=0.3": pytest.approx(0.3),
    }
    assert (runs["dataset"] == "digits").all()
    assert runs["early_trace"].notna().all()


def test_figures_of_nothing_are_an_error(data_dir, tmp_path):
    result = _run("plot_logs.py", f"--log_dir={tmp_path}", data_dir=data_dir)
    assert result.returncode != 0
    assert "no event files" in result.stdout + result.stderr


def _network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ]
    )


def _digits(split, data_dir):
    # The last batch is smaller.
    data = keras_fisher.datasets.load("digits", split, data_dir=data_dir)
    return data.batch(32)


def _printed_table(output):
    """Rows of layer, parameters, Tr(F), standard error and share."""
    row = r"^ *(\S+) +([\d,]+) +([\d.e+-]+) +([\d.e+-]+) +([\d.]+)$"
    return [
        (name, *(float(n.replace(",", "")) for n in numbers))
        for name, *numbers in re.findall(row, output, re.MULTILINE)
    ]


def _printed_hessian(output):
    found = re.search(r"^Tr\(H\): (\S+) ± (\S+) \(", output, re.MULTILINE)
    return [float(number) for number in found.groups()]


def _lengths_of_bars(path):
    """Lengths of the bars in pixels, from top to bottom."""
    pixels = image.imread(path)[..., :3]
    bar = abs(pixels - colors.to_rgb("tab:blue")).max(axis=-1) < 0.02
    rows = np.flatnonzero(bar.any(axis=1))
    bands = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [np.ptp(np.flatnonzero(bar[band].any(axis=0))) for band in bands]


def test_measure_agrees_with_the_library(data_dir, tmp_path):
    model = _network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.save(tmp_path / "net.keras")
    result = _run(
        "measure.py",
        f"--model={tmp_path}/net.keras",
        "--dataset=digits",
        "--split=train[:80]",
        "--batch_size=32",
        "--num_probes=16",
        "--seed=3",
        f"--csv={tmp_path}/new/table.csv",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr

    # In the file, the paths of variables do not start with the model's name.
    model = keras.saving.load_model(tmp_path / "net.keras")
    data = _digits("train[:80]", data_dir)
    by_layer = keras_fisher.fisher_trace(model, data, by="layer", seed=3)
    total = keras_fisher.fisher_trace(model, data, seed=3)
    expected = [
        ("conv", 40, by_layer["conv"]),
        ("norm", 8, by_layer["norm"]),
        ("hidden", 2320, by_layer["hidden"]),
        ("logits", 170, by_layer["logits"]),
        ("total", 2538, total),
    ]
    printed = _printed_table(result.stdout)
    assert [row[0] for row in printed] == [row[0] for row in expected]
    for row, (_, parameters, trace) in zip(printed, expected):
        assert row[1] == parameters
        assert row[2] == pytest.approx(trace, rel=1e-4)
        assert row[3] == pytest.approx(trace.standard_error, rel=0.05)
        assert row[4] == pytest.approx(100 * trace / total, abs=0.06)
    table = pd.read_csv(tmp_path / "new" / "table.csv")
    layers = table[table["layer"] != "total"]["Tr(F)"]
    assert layers.sum() == pytest.approx(total, rel=1e-5)
    assert table["standard error"].tolist() == pytest.approx(
        [trace.standard_error for _, _, trace in expected], rel=1e-4
    )

    hessian = keras_fisher.hessian_trace(model, data, num_probes=16, seed=3)
    assert _printed_hessian(result.stdout) == [
        pytest.approx(hessian, rel=1e-3),
        pytest.approx(hessian.standard_error, rel=0.05),
    ]

    lengths = _lengths_of_bars(tmp_path / "net_trace_by_layer.png")
    assert np.divide(lengths, max(lengths)) == pytest.approx(
        layers.to_numpy() / layers.max(), abs=0.02
    )


@pytest.mark.slow
def test_measure_takes_the_likelihood_of_a_model_that_is_not_compiled(
    data_dir, tmp_path
):
    model = keras_fisher.FisherModel(_network())
    model.save(tmp_path / "net.keras")
    result = _run(
        "measure.py",
        f"--model={tmp_path}/net.keras",
        "--dataset=digits",
        "--split=test[:40]",
        "--batch_size=32",
        "--estimator=empirical",
        "--likelihood=categorical",
        "--num_probes=8",
        "--tolerance=0",
        f"--output={tmp_path}/figure.png",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    data = _digits("test[:40]", data_dir)
    total = keras_fisher.fisher_trace(
        model, data, estimator="empirical", likelihood="categorical"
    )
    name, _, value, error, _ = _printed_table(result.stdout)[-1]
    assert (name, error) == ("total", 0)
    assert value == pytest.approx(total, rel=1e-4)
    hessian = keras_fisher.hessian_trace(
        model,
        data,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        num_probes=8,
        tolerance=None,
        seed=0,
    )
    printed, _ = _printed_hessian(result.stdout)
    assert printed == pytest.approx(hessian, rel=1e-3)
    assert len(_lengths_of_bars(tmp_path / "figure.png")) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model=missing.keras"], "There is no file missing.keras"),
        pytest.param(
            ["--split=half"],
            "Unknown split 'half'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--dataset=mnist1d"],
            r"\(8, 8, 1\).*\(40, 1\)",
            marks=pytest.mark.slow,
        ),
        (["--likelihood=auto"], "not compiled.*Pass --likelihood=categorical"),
    ],
)
def test_measure_says_what_is_wrong(flags, message, data_dir, tmp_path):
    _network().save(tmp_path / "net.keras")
    result = _run(
        "measure.py",
        f"--model={tmp_path}/net.keras",
        "--dataset=digits",
        "--likelihood=categorical",
        *flags,
        data_dir=data_dir,
    )
    assert result.returncode != 0
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert "Tr(F)" not in result.stdout


@pytest.mark.slow
def test_the_penalty_recovers_the_loss_of_a_small_learning_rate(data_dir):
    flags = ["--dataset=mnist1d", "--learning_rate=0.01", "--jit=true"]
    flags += ["--steps_per_execution=31"]
    without = _run("train.py", *flags, data_dir=data_dir)
    with_penalty = _run(
        "train.py",
        "--penalty=fisher",
        "--alpha=0.3",
        *flags,
        data_dir=data_dir,
    )
    assert _test_accuracy(without.stdout) < 89
    assert _test_accuracy(with_penalty.stdout) >= 90
