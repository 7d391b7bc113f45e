"""Figures of what training has logged."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import scripts
import tensorflow as tf


def _drawn(tmp_path, data_dir):
    """Names of the files that the script writes for the logs there."""
    result = scripts.run(
        "plot_logs.py",
        f"--log_dir={tmp_path}/logs",
        f"--output_dir={tmp_path}/figures",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    return {path.name for path in (tmp_path / "figures").iterdir()}


@pytest.mark.slow
def test_figures_are_drawn_from_logs(data_dir, tmp_path):
    for rate in (0.3, 0.1):
        result = scripts.run(
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
    assert _drawn(tmp_path, data_dir) == {
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


@pytest.mark.slow
def test_figures_of_nothing_are_an_error(data_dir, tmp_path):
    result = scripts.run(
        "plot_logs.py", f"--log_dir={tmp_path}", data_dir=data_dir
    )
    assert result.returncode != 0
    assert "no event files" in result.stdout + result.stderr


def test_each_run_has_a_figure_of_its_layers(data_dir, tmp_path):
    for run in ("a/b", "a-b"):
        writer = tf.summary.create_file_writer(f"{tmp_path}/logs/{run}/train")
        with writer.as_default():
            for step in range(3):
                tf.summary.scalar("fisher/trace_by_layer/one", 1.0, step)
        writer.close()
    assert _drawn(tmp_path, data_dir) == {
        "trace_by_layer-a-b+.png",
        "trace_by_layer-a-b.png",
        "runs.csv",
    }
