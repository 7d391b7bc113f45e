"""The flags of the example scripts."""

from __future__ import annotations

import pytest
import scripts


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
    result = scripts.run(script, "--help", data_dir=data_dir)
    assert flag in result.stdout
    assert "(default:" in result.stdout


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--fraction=0", "fraction"),
        ("--strategy=multi_worker", "TF_CONFIG"),
        pytest.param("--stop=0", "stop", marks=pytest.mark.slow),
        pytest.param("stray", "stray", marks=pytest.mark.slow),
        pytest.param("--strategy=all", "strategy", marks=pytest.mark.slow),
        pytest.param("--cpu_devices=2", "mirrored", marks=pytest.mark.slow),
        pytest.param("--alpha=-1", "alpha", marks=pytest.mark.slow),
        pytest.param("--every=0", "every", marks=pytest.mark.slow),
        pytest.param("--label_noise=1.1", "noise", marks=pytest.mark.slow),
        pytest.param("--penalty=fischer", "penalty", marks=pytest.mark.slow),
        pytest.param("--jit=maybe", "jit", marks=pytest.mark.slow),
        pytest.param("--start=3", "--penalty=fisher", marks=pytest.mark.slow),
        pytest.param("--probe_size=8", "--log_dir", marks=pytest.mark.slow),
    ],
)
def test_wrong_values_are_refused_before_anything_trains(
    flag, message, data_dir
):
    result = scripts.run("train.py", flag, data_dir=data_dir)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Epoch" not in result.stdout
