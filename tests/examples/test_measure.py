"""Measuring a saved model from the command line."""

from __future__ import annotations

import re

import idx_files
import keras
from matplotlib import colors
from matplotlib import image
import numpy as np
import pandas as pd
import pytest
import scripts

import keras_fisher


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


def _lengths_of_bars(path, color="tab:blue"):
    """Lengths of the bars in pixels, from top to bottom."""
    pixels = image.imread(path)[..., :3]
    bar = abs(pixels - colors.to_rgb(color)).max(axis=-1) < 0.02
    rows = np.flatnonzero(bar.any(axis=1))
    bands = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [np.ptp(np.flatnonzero(bar[band].any(axis=0))) for band in bands]


def _assert_bars(path, values, color):
    lengths = _lengths_of_bars(path, color)
    assert np.divide(lengths, max(lengths)) == pytest.approx(
        values / values.max(), abs=0.02
    )


def test_measure_agrees_with_the_library(data_dir, tmp_path):
    model = _network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.save(tmp_path / "net.keras")
    result = scripts.run(
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

    figure = tmp_path / "net_trace_by_layer.png"
    _assert_bars(figure, layers.to_numpy(), "tab:blue")
    hessian = keras_fisher.hessian_trace(
        model, data, by="layer", num_probes=16, seed=3
    )
    _assert_bars(figure, np.abs([*hessian.values()]), "tab:orange")


@pytest.mark.slow
@pytest.mark.parametrize("normalizes", [True, False])
def test_measure_gives_images_as_train_gives_them(normalizes, tmp_path):
    idx_files.write(tmp_path / "downloads" / "manual")
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.save(tmp_path / "net.keras")
    result = scripts.run(
        "measure.py",
        f"--model={tmp_path}/net.keras",
        "--dataset=fashion_mnist",
        "--estimator=exact",
        "--nohessian",
        *([] if normalizes else ["--nonormalize"]),
        data_dir=tmp_path,
    )
    assert result.returncode == 0, result.stderr

    data = keras_fisher.datasets.load(
        "fashion_mnist", "test", data_dir=tmp_path
    )
    if normalizes:
        data = data.map(lambda x, y: ((x - 0.2860) / 0.3530, y))
    expected = keras_fisher.fisher_trace(
        model, data.batch(8), estimator="exact"
    )
    assert _printed_table(result.stdout)[-1][2] == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.slow
def test_measure_takes_the_likelihood_of_a_model_that_is_not_compiled(
    data_dir, tmp_path
):
    model = keras_fisher.FisherModel(_network())
    model.save(tmp_path / "net.keras")
    result = scripts.run(
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
        pytest.param(
            ["--model=missing.keras"],
            "There is no file missing.keras",
            marks=pytest.mark.slow,
        ),
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
        (["--csv=/proc/none/t.csv"], "/proc/none/t.csv cannot be written"),
        pytest.param(
            ["--likelihood=auto"],
            "not compiled.*Pass --likelihood=categorical",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_measure_says_what_is_wrong(flags, message, data_dir, tmp_path):
    _network().save(tmp_path / "net.keras")
    result = scripts.run(
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
