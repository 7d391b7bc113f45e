"""The paper's scripts, run as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys

import experiments
import pandas as pd
import pytest
import scripts

_SCRIPTS = (
    "learning_rate_sweep",
    "penalty_comparison",
    "bounded_penalty",
    "label_noise",
    "noisy_labels",
    "delayed_penalty",
    "final_curvature",
)


@pytest.mark.parametrize(
    "script, flag, said",
    [
        ("learning_rate_sweep", "--learning_rates=0.1,0.1", "different"),
        ("learning_rate_sweep", "--batch_sizes=0", "at least 1"),
        ("penalty_comparison", "--strengths=FP", "METHOD:NUMBER"),
        ("penalty_comparison", "--strengths=XY:0.1", "METHOD:NUMBER"),
        ("label_noise", "--label_noise=1.5", "label_noise"),
        ("noisy_labels", "--moments=0", "at least 1"),
        ("bounded_penalty", "--bounded_alphas=0", "above 0"),
        ("delayed_penalty", "--starts=-1", "at least 0"),
        ("final_curvature", "--learning_rates=nan", "above 0"),
    ],
)
@pytest.mark.slow
def test_wrong_values_are_refused_before_anything_trains(
    tmp_path, script, flag, said
):
    result = _script(script, flag, f"--output_dir={tmp_path}/out")
    assert result.returncode == 1
    assert said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", _SCRIPTS)
def test_help_explains_the_flags(script):
    """Also those of the modules that scripts share."""
    result = _script(script, "--help")
    for flag in "dataset", "epochs", "seeds", "jit", "output_dir":
        assert f"--{flag}" in result.stdout.replace("[no]", ""), flag


def _script(name, *arguments):
    return subprocess.run(
        [
            sys.executable,
            str(experiments.SCRIPTS / f"{name}.py"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(experiments.ROOT)},
    )


def _printed(code):
    folders = experiments.ROOT, experiments.SCRIPTS
    return scripts.printed(code, folders=folders)


def test_gains_are_of_the_gap_between_the_two_rates():
    code = """
import pandas as pd, penalty_comparison as script
accuracies = {
    ("none", 0.1): (0.8, 0.9), ("none", 0.01): (0.6, 0.7),
    ("FP", 0.1): (0.9, 0.9), ("FP", 0.01): (0.8, 0.8),
    ("GP", 0.1): (0.8, 0.8), ("GP", 0.01): (0.6, 0.6),
}
frame = pd.DataFrame(
    {"method": method, "learning_rate": rate, "test_accuracy": accuracy}
    for (method, rate), seeds in accuracies.items() for accuracy in seeds
)
for row in script.gains(frame, 0.01, 0.1).to_dict("records"):
    print(list(row.items()))
"""
    closed, gain = "of the gap closed at 0.01 (%)", "gain at 0.1 (points)"
    assert _printed(code)[-2:] == [
        str([("method", "FP"), (closed, "75"), (gain, "+5.0")]),
        str([("method", "GP"), (closed, "-25"), (gain, "-5.0")]),
    ]


def test_runs_that_diverge_do_not_decide_the_medians_of_seeds():
    code = """
import learning_rate_sweep as script, pandas as pd
nan, inf = float("nan"), float("inf")
found = {
    0.5: [(nan, nan, 0.1)] * 3,
    0.1: [(20, 20, 0.9), (inf, 25, 0.8), (nan, 7000, 0.1)],
    0.03: [(30, 30, 0.7), (32, 32, 0.72), (40, 40, 0.74)],
    0.01: [(50, 50, 0.6), (51, 51, 0.62), (52, 52, 0.5)],
}
frame = pd.DataFrame(
    dict(zip(("early_trace", "peak_trace", "test_accuracy"), run), rate=rate)
    for rate, runs in found.items() for run in runs
)
for row in script.correlations(frame, ["rate"]).to_numpy().tolist():
    print(row)
"""
    early, early_of, peak, peak_of = _printed(code)[-4:]
    kind = "medians of seeds"
    assert early_of == str(["TrF_i", kind, "-1.00", "", "0.33", "3"])
    assert peak_of == str(["peak Tr(F)", kind, "-1.00", "", "0.33", "3"])
    # Those that diverge are among the single runs, if they have a trace.
    assert early.endswith("'7']") and peak.endswith("'9']")


def test_rates_and_batch_sizes_that_both_vary_are_drawn_apart():
    code = """
import dataclasses, itertools
import learning_rate_sweep as script, pandas as pd
fields = [field.name for field in dataclasses.fields(script.sweep.Run)]
rows = []
for rate, size, seed in itertools.product((0.1, 0.01), (32, 128), range(3)):
    row = dict.fromkeys(fields) | dict(learning_rate=rate, batch_size=size)
    row |= dict(early_trace=seed + 1, peak_trace=seed + 2, test_accuracy=0.5)
    history = [{"epoch": epoch, "trace": size / rate} for epoch in (1, 2)]
    rows.append({**row, "seed": seed, "history": history})
frame = pd.DataFrame(rows)
before = frame.copy()
figure = script.draw(frame, ["learning_rate", "batch_size"])
left, _, right = figure.axes
print(sorted(float(line.get_ydata()[0]) for line in left.lines))
print([text.get_text() for text in right.get_legend().texts])
pd.testing.assert_frame_equal(frame, before)
"""
    curves, legend = _printed(code)[-2:]
    assert curves == "[320.0, 1280.0, 3200.0, 12800.0]"
    names = "learning rate", "0.1", "0.01", "batch size", "32", "128"
    assert legend == str([*names])


@pytest.mark.slow
def test_every_script_ends_with_a_table_and_a_figure(tmp_path):
    shared = [*experiments.QUICK, "--seeds=2", f"--output_dir={tmp_path}"]
    few = ["--strengths=FP:0.1,1", "--strengths=SAM:0.1"]
    rates = "--learning_rates=0.05,0.1"
    for script, *arguments in (
        ("learning_rate_sweep", rates),
        ("penalty_comparison", rates, *few),
        ("label_noise", "--strengths=bounded FP:1,10", *few),
        ("noisy_labels", "--moments=1,2"),
        ("bounded_penalty", rates, "--alphas=0.1,1", "--bounded_alphas=1,9"),
        ("delayed_penalty", "--starts=0,6"),
        ("final_curvature", rates, "--examples=64"),
    ):
        result = _script(script, *shared, *arguments)
        assert result.returncode == 0, result.stderr
        table = (tmp_path / f"{script}.md").read_text()
        assert table in result.stdout
        assert (tmp_path / f"{script}.png").stat().st_size > 10_000
        assert len(pd.read_csv(tmp_path / f"{script}.csv")) >= 4


@pytest.mark.slow
def test_curvature_is_measured_without_penalized_runs_as_well(tmp_path):
    result = _script(
        "final_curvature",
        *experiments.QUICK,
        "--seeds=2",
        "--learning_rates=0.05,0.1",
        "--examples=64",
        "--alpha=0",
        f"--output_dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    runs = pd.read_csv(tmp_path / "final_curvature.csv")
    assert runs["method"].tolist() == ["none"] * 4
    told = (tmp_path / "final_curvature.md").read_text()
    assert "| all " not in told and "| none " in told
