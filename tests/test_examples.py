"""The example scripts, run as a person runs them."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

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


@pytest.mark.parametrize("script", ["train.py", "demo.py"])
def test_help_explains_every_flag(script, data_dir):
    result = _run(script, "--help", data_dir=data_dir)
    assert "--alpha" in result.stdout
    assert "(default:" in result.stdout


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--fraction=0", "fraction"),
        ("--alpha=-1", "alpha"),
        ("--every=0", "every"),
        ("--label_noise=1.1", "label_noise"),
        ("--penalty=fischer", "penalty"),
        ("--stop=0", "stop"),
        ("--jit=maybe", "jit"),
        ("stray", "stray"),
    ],
)
def test_wrong_values_are_refused_before_anything_trains(
    flag, message, data_dir
):
    result = _run("train.py", flag, data_dir=data_dir)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Epoch" not in result.stdout


def test_demo_ends_with_a_table_and_a_figure(data_dir, tmp_path):
    result = _run(
        "demo.py", "--epochs=2", f"--output_dir={tmp_path}", data_dir=data_dir
    )
    assert result.returncode == 0, result.stderr
    assert "peak Tr(F)" in result.stdout
    assert (tmp_path / "fisher_explosion.png").stat().st_size > 10_000
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 4


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
