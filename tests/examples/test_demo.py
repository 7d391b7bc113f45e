"""The demo, run as `make demo` does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scripts

import keras_fisher


@pytest.mark.slow  # `make demo` runs all of it
def test_demo_ends_with_a_table_and_a_figure(data_dir, tmp_path):
    result = scripts.run(
        "demo.py",
        "--epochs=2",
        f"--output_dir={tmp_path}",
        data_dir=data_dir,
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


@pytest.mark.slow
def test_demo_takes_images(data_dir, tmp_path):
    result = scripts.run(
        "demo.py",
        "--dataset=digits",
        "--train_examples=512",
        "--epochs=2",
        f"--output_dir={tmp_path}",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(tmp_path / "table.csv")) == 6
    [log_dir] = (tmp_path / "logs").iterdir()
    traces = keras_fisher.logs.read(log_dir)
    steps = traces.loc[traces["tag"] == "fisher/trace", "step"]
    assert {*steps} == {0, 4}, "two epochs of four steps, every fourth"


@pytest.mark.slow
def test_the_penalty_recovers_the_loss_of_a_small_learning_rate(data_dir):
    flags = ["--dataset=mnist1d", "--learning_rate=0.01", "--jit=true"]
    flags += ["--steps_per_execution=31"]
    without = scripts.run("train.py", *flags, data_dir=data_dir)
    with_penalty = scripts.run(
        "train.py",
        "--penalty=fisher",
        "--alpha=0.3",
        *flags,
        data_dir=data_dir,
    )
    assert scripts.final_accuracy(without.stdout) < 89
    assert scripts.final_accuracy(with_penalty.stdout) >= 90


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_told_in_one_line(data_dir):
    result = scripts.run(
        "demo.py", "--output_dir=/dev/null/demo", data_dir=data_dir
    )
    assert result.returncode == 1
    assert "/dev/null/demo" in result.stderr
    assert "Traceback" not in result.stderr
