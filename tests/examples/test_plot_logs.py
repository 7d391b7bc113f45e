"""Figures of what training has logged."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import scripts


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
    result = scripts.run(
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
    result = scripts.run(
        "plot_logs.py", f"--log_dir={tmp_path}", data_dir=data_dir
    )
    assert result.returncode != 0
    assert "no event files" in result.stdout + result.stderr
