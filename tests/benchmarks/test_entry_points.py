"""The benchmarks start, from wherever they are called."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPTS = sorted((_ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", _SCRIPTS, ids=lambda path: path.stem)
def test_help_explains_the_flags(path, tmp_path):
    result = subprocess.run(
        [sys.executable, path, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=False,
    )
    assert "(default:" in result.stdout, result.stderr


@pytest.mark.slow
def test_steps_are_timed_beside_plain_keras(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            _ROOT / "benchmarks" / "steps.py",
            "--network=MLP 784-512-512-512-10",
            "--side=FP every 1",
            "--rounds=3",
            "--nopeers",
            f"--output_dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "TF_ENABLE_ONEDNN_OPTS": "1",
        },
        check=False,
    )
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "steps.md").read_text("utf-8")
    assert "| keras.Model |" in table and "| FP every 1 |" in table, table
    assert "`TF_ENABLE_ONEDNN_OPTS=1 python benchmarks/steps.py" in table
    assert (tmp_path / "steps.png").stat().st_size > 1000
