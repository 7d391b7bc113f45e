"""Sweeps: resumed, shared by processes, and trained once."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time

import experiment
import experiments
import numpy as np
import pandas as pd
import pytest
import sweep


def _runs(count):
    return [
        experiment.from_flags(learning_rate=0.1, seed=seed)
        for seed in range(count)
    ]


def test_what_is_done_is_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def train(run, path):
        trained.append(run.seed)
        return experiments.result(0.1 * run.seed)

    experiments.train_by(monkeypatch, train)
    sweep.results(_runs(2), tmp_path, "first")
    frame = sweep.results(_runs(3)[::-1], tmp_path, "second")
    assert trained == [0, 1, 2], trained
    assert frame["seed"].tolist() == [2, 1, 0]
    np.testing.assert_allclose(frame["test_accuracy"], [0.2, 0.1, 0.0])
    epochs = sweep.histories(frame)
    assert epochs[["seed", "epoch", "trace"]].to_numpy().tolist() == [
        [seed, epoch, epoch + 1] for seed in (2, 1, 0) for epoch in (1, 2)
    ]


def test_equal_runs_are_one(tmp_path, monkeypatch):
    experiments.train_by(monkeypatch, lambda run, path: experiments.result(1.0))
    frame = sweep.results(_runs(2) + _runs(2), tmp_path, "twice")
    assert frame["seed"].tolist() == [0, 1]


def test_runs_that_differ_in_anything_have_files_of_their_own(tmp_path):
    base = experiment.from_flags(learning_rate=0.1)
    others = [
        experiment.from_flags(learning_rate=0.1, **{name: value})
        for name, value in dict(
            dataset="mnist1d",
            model="simple_cnn",
            batch_size=3,
            epochs=3,
            momentum=0.1,
            early_accuracy=0.3,
            probe_size=3,
            measure_every=3,
            augment=True,
            train_examples=3,
            method="FP",
            strength=0.1,
            start=3,
            label_noise=0.3,
            holdout=0.3,
            seed=3,
        ).items()
    ]
    others += [
        experiment.from_flags(
            learning_rate=0.1, method="FP", strength=0.1, fraction=fraction
        )
        for fraction in (1.0, 0.5)
    ]
    paths = {sweep.path(run, tmp_path, "json") for run in (base, *others)}
    assert len(paths) == 19


def test_a_fraction_makes_no_other_run_where_nothing_is_penalized(
    tmp_path, monkeypatch
):
    runs = [
        experiment.from_flags(learning_rate=0.1, fraction=fraction)
        for fraction in (1.0, 0.5)
    ]
    assert len({sweep.path(run, tmp_path, "json") for run in runs}) == 1
    experiments.train_by(monkeypatch, lambda run, path: experiments.result(1.0))
    frame = sweep.results(runs, tmp_path, "once")
    assert frame["fraction"].tolist() == [1.0]


def test_backups_are_deleted_when_the_result_is_there(tmp_path, monkeypatch):
    (run,) = _runs(1)
    network = sweep.path(run, tmp_path / "runs", "keras")
    backups = pathlib.Path(experiment.backup_directory(network))

    def train(run, path):
        assert path == str(network)
        backups.mkdir()
        return experiments.result(0.5)

    experiments.train_by(monkeypatch, train)
    sweep.results([run], tmp_path, "backups")
    assert not backups.exists()


def test_results_of_before_a_field_was_added_have_it(tmp_path, monkeypatch):
    run = experiment.from_flags(learning_rate=0.1)
    path = pathlib.Path(sweep.path(run, tmp_path / "runs", "json"))
    path.parent.mkdir()
    path.write_text(json.dumps({"run": {"seed": 0}, **experiments.result(0.5)}))
    experiments.train_by(monkeypatch, None)
    frame = sweep.results([run], tmp_path, "old")
    assert frame["fraction"].tolist() == [1.0]
    assert "run" not in frame
    assert sweep.histories(frame)["fraction"].tolist() == [1.0, 1.0]


def test_a_run_that_fails_is_trained_the_next_time(tmp_path, monkeypatch):
    def fail(run, path):
        raise KeyboardInterrupt

    experiments.train_by(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt):
        sweep.results(_runs(1), tmp_path, "stopped")
    experiments.train_by(monkeypatch, lambda run, path: experiments.result(1.0))
    frame = sweep.results(_runs(1), tmp_path, "again")
    assert frame["test_accuracy"].tolist() == [1.0]


# Takes the lock of the run whose path it is given, says so, and waits.
_HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_run_of_another_process_is_waited_for(tmp_path, monkeypatch):
    first, second = _runs(2)
    directory = tmp_path / "runs"
    directory.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _HOLDER,
            sweep.path(first, directory, "lock"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    trained = []

    def train(run, path):
        trained.append(run.seed)
        return experiments.result(1.0)

    looks = []

    def sleep(seconds):
        looks.append([*trained])
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    experiments.train_by(monkeypatch, train)
    monkeypatch.setattr(time, "sleep", sleep)
    assert holder.stdout.readline() == "locked\n"
    sweep.results([first, second], tmp_path, "shared")
    # The other one at first; and this one, since its process has died.
    assert looks == [[1]]
    assert trained == [1, 0]


def test_processes_that_train_keep_the_memory_of_tensors(monkeypatch):
    """But for what somebody has set."""
    environment = {"MALLOC_ARENA_MAX": "3"}
    monkeypatch.setattr(sweep.os, "environ", environment)
    with sweep.trainer("auto"):
        assert environment["MALLOC_ARENA_MAX"] == "3"
        assert environment["MALLOC_MMAP_MAX_"] == "0"
        assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 2**30


@pytest.mark.slow
def test_a_script_killed_and_shared_by_two_ends_with_all_runs(tmp_path):
    command = [
        sys.executable,
        str(experiments.SCRIPTS / "learning_rate_sweep.py"),
        *experiments.QUICK,
        "--learning_rates=0.05,0.1",
        "--seeds=2",
        f"--output_dir={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    results = tmp_path / "runs"
    end = time.monotonic() + 300
    while not [*results.glob("*.json")] and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert 0 < len(before) < 4, before
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    after = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(after) == 4
    assert before.items() <= after.items(), "trained again"
    assert not [*tmp_path.rglob("writing-*.json")]
    table = (tmp_path / "learning_rate_sweep.md").read_text()
    assert table.count("\n| 0.") == 2, table
    frame = pd.read_csv(tmp_path / "learning_rate_sweep.csv")
    assert len(frame) == 4
    for name in "early_trace", "peak_trace", "test_accuracy":
        assert frame[name].notna().all(), frame
    assert (tmp_path / "learning_rate_sweep.png").stat().st_size > 10_000
