"""Sweeps of the example scripts: resumed, shared, and chosen from fairly."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

_ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT / "examples"))

import common
import experiment
import report
from sharpness_aware import SharpnessAwareModel
import sweep
import tuning

_QUICK = (
    "--dataset=digits",
    "--model=mlp",
    "--epochs=2",
    "--measure_every=1",
    "--probe_size=8",
    "--batch_size=256",
    "--early_accuracy=0.2",
)


@pytest.fixture(autouse=True)
def _flags(tmp_path):
    flags.FLAGS(["test", *_QUICK, f"--output_dir={tmp_path}"])
    yield
    flags.FLAGS.unparse_flags()


def _runs(count):
    return [
        experiment.from_flags(learning_rate=0.1, seed=seed)
        for seed in range(count)
    ]


def _result(accuracy):
    return {
        "test_accuracy": accuracy,
        "train_accuracy": 1.0,
        "seconds": 1.0,
        "versions": {},
        "history": [{"epoch": 1, "trace": 2.0}, {"epoch": 2, "trace": 3.0}],
    }


def _train_by(monkeypatch, train):
    """Makes sweeps call `train` where they would start a process."""
    monkeypatch.setattr(
        sweep, "trainer", lambda jit: contextlib.nullcontext(train)
    )


def test_what_is_done_is_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def train(run, path):
        trained.append(run.seed)
        return _result(0.1 * run.seed)

    _train_by(monkeypatch, train)
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
    _train_by(monkeypatch, lambda run, path: _result(1.0))
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
            method="FP",
            strength=0.1,
            start=3,
            label_noise=0.3,
            holdout=0.3,
            seed=3,
        ).items()
    ]
    paths = {sweep._path(run, tmp_path, "json") for run in (base, *others)}
    assert len(paths) == 16


def test_a_run_that_fails_is_trained_the_next_time(tmp_path, monkeypatch):
    def fail(run, path):
        raise KeyboardInterrupt

    _train_by(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt):
        sweep.results(_runs(1), tmp_path, "stopped")
    _train_by(monkeypatch, lambda run, path: _result(1.0))
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
            sweep._path(first, directory, "lock"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    trained = []

    def train(run, path):
        trained.append(run.seed)
        return _result(1.0)

    looks = []

    def sleep(seconds):
        looks.append([*trained])
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    _train_by(monkeypatch, train)
    monkeypatch.setattr(time, "sleep", sleep)
    assert holder.stdout.readline() == "locked\n"
    sweep.results([first, second], tmp_path, "shared")
    # The other one at first; and this one, since its process has died.
    assert looks == [[1]]
    assert trained == [1, 0]


def test_a_script_killed_and_shared_by_two_ends_with_all_runs(tmp_path):
    command = [
        sys.executable,
        str(_ROOT / "examples" / "learning_rate_sweep.py"),
        *_QUICK,
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


def test_no_reader_fills_the_cache_and_stops_early():
    read = []

    def examples():
        for i in range(20):
            read.append(i)
            yield i

    spec = tf.TensorSpec((), tf.int64)
    dataset = tf.data.Dataset.from_generator(examples, output_signature=spec)
    cached = common._cached(dataset)
    assert read == [*range(20)]
    assert len([*cached.take(3)]) == 3
    assert [*cached.as_numpy_iterator()] == [*range(20)]
    assert len(read) == 20, "read again"


@pytest.mark.parametrize(
    "method, strength",
    [("none", 0.0), ("FP", 0.1), ("SAM", 0.05), ("mixup", 0.4)],
)
def test_a_result_is_that_of_the_saved_network(tmp_path, method, strength):
    run = experiment.from_flags(
        learning_rate=0.05, method=method, strength=strength, label_noise=0.3
    )
    path = str(tmp_path / "network.keras")
    result = experiment.train(run, path)
    json.dumps(result)
    network = keras.models.load_model(path)
    data = common.load_data("digits", 256, label_noise=0.3)
    predicted, given, true = [], [], []
    for x, y in data.examples.as_numpy_iterator():
        predicted.append(np.argmax(network(x), axis=-1))
        given.append(y["label"])
        true.append(y["true_label"])
    predicted, given, true = map(np.concatenate, (predicted, given, true))
    noisy = given != true
    expected = {
        "train_accuracy": np.mean(predicted == given),
        "clean_accuracy": np.mean((predicted == given)[~noisy]),
        "noisy_accuracy": np.mean((predicted == given)[noisy]),
        "recovered_accuracy": np.mean((predicted == true)[noisy]),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-6), name
    x, y = next(data.test.unbatch().batch(10_000).as_numpy_iterator())
    accuracy = np.mean(np.argmax(network(x), axis=-1) == y)
    assert result["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    traces = [row["trace"] for row in result["history"]]
    assert result["peak_trace"] == max(traces) > 0


@pytest.mark.slow
def test_methods_do_what_they_are_called(tmp_path):
    def weights(method, strength=0.0):
        run = experiment.from_flags(
            learning_rate=0.05, method=method, strength=strength
        )
        path = str(tmp_path / "network.keras")
        experiment.train(run, path)
        return keras.models.load_model(path).get_weights()

    plain = weights("none")
    for method in set(experiment.METHODS) - {"none", "mixup"}:
        # Of almost no strength they are almost nothing, but not nothing.
        weak, strong = weights(method, 1e-4), weights(method, 0.5)
        near = max(np.abs(a - b).max() for a, b in zip(weak, plain))
        far = max(np.abs(a - b).max() for a, b in zip(strong, plain))
        assert 0 < near < 0.2 * far, (method, near, far)


def test_held_out_examples_are_of_the_training_set():
    whole = common.load_data("digits", 64)
    parts = common.load_data("digits", 64, holdout=0.25)

    def examples(batches):
        return {x.tobytes() for x, _ in batches.unbatch().as_numpy_iterator()}

    kept, held_out = examples(parts.examples), examples(parts.test)
    assert kept | held_out == examples(whole.examples)
    share = len(held_out) / len(kept | held_out)
    assert share == pytest.approx(0.25, abs=0.01)
    assert not kept & held_out
    assert not held_out & examples(whole.test)


@pytest.mark.parametrize("shape", [(16, 12, 2), (16, 6, 6, 2)])
def test_mixup_mixes_inputs_and_labels_with_the_same_weights(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    y = np.eye(16, dtype="float32")
    batches = tf.data.Dataset.from_tensors((x, y))
    mixed, labels = next(
        experiment._mixed(batches, 1.0, seed=3).as_numpy_iterator()
    )
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    assert (labels.max(axis=1) < 0.95).sum() >= 4, labels.max(axis=1)
    # A label says which examples an input is made of, and how much of each.
    expected = np.tensordot(labels, x, axes=1)
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)


def _regression_step(jit):
    """One step of SAM on a network with batch normalization."""
    inputs = keras.Input((4,), dtype="float64")
    x = keras.layers.Dense(5, dtype="float64")(inputs)
    x = keras.layers.BatchNormalization(dtype="float64")(x)
    x = keras.layers.Dense(3, dtype="float64")(keras.ops.tanh(x))
    network = keras.Model(inputs, x)
    model = SharpnessAwareModel(network, rho=0.25, dtype="float64")
    model.compile(
        keras.optimizers.SGD(0.125),  # no rounding
        keras.losses.MeanSquaredError(dtype="float64"),
        jit_compile=jit,
    )
    return network, model


@pytest.mark.parametrize("jit", [False, True])
def test_sharpness_aware_step_equals_the_formula(jit):
    network, model = _regression_step(jit)
    random = np.random.default_rng(0)
    # Keras rounds numbers of arrays to single precision.
    x, y = (random.integers(-8, 8, size=(8, n)) / 4 for n in (4, 3))
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((copy(x, training=True) - y) ** 2)
        return tape.gradient(loss, [v.value for v in copy.trainable_variables])

    start = [v.numpy() for v in copy.trainable_variables]
    gradients_at_start = gradients()
    statistics = [v.numpy() for v in copy.non_trainable_variables]
    norm = np.sqrt(sum(np.sum(g.numpy() ** 2) for g in gradients_at_start))
    for variable, value, g in zip(
        copy.trainable_variables, start, gradients_at_start
    ):
        variable.assign(value + 0.25 * g.numpy() / norm)
    expected = [a - 0.125 * g.numpy() for a, g in zip(start, gradients())]

    model.fit(x, y, batch_size=8, verbose=0)
    for variable, value in zip(network.trainable_variables, expected):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=1e-9, atol=1e-12
        )
    for variable, value in zip(network.non_trainable_variables, statistics):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=1e-9, atol=1e-12
        )


def test_the_strength_that_validates_best_is_chosen(monkeypatch):
    validation = {("FP", 0.1): 0.5, ("FP", 1.0): 0.7, ("GP", 0.2): 0.1}
    seen = []

    def train(run, path):
        seen.append(run)
        return _result(validation[run.method, run.strength])

    _train_by(monkeypatch, train)
    plain = [experiment.from_flags(learning_rate=rate) for rate in (0.1, 0.2)]
    runs, tried = tuning.chosen(
        plain, {"FP": (0.1, 1.0), "GP": (0.2,)}, "choosing"
    )
    assert {run.holdout for run in seen} == {0.2}
    assert [
        (run.learning_rate, run.method, run.strength, run.holdout)
        for run in runs
    ] == [
        (rate, method, strength, 0)
        for rate in (0.1, 0.2)
        for method, strength in (("FP", 1.0), ("GP", 0.2))
    ]
    texts = tuning.tried_table(tried)["strength: validation accuracy (%)"]
    assert texts.tolist() == ["0.1: 50.0, 1: 70.0", "0.2: 10.0"] * 2


def test_tables_have_means_with_standard_errors():
    frame = pd.DataFrame(
        {"kind": ["b", "b", "a"], "accuracy": [0.5, 0.7, 0.25]}
    )
    rows = report.table(
        frame,
        ["kind"],
        {
            "percent": ("accuracy", report.percent),
            "number": ("accuracy", report.number),
        },
    )
    assert rows.to_numpy().tolist() == [
        ["b", "60.0 ± 10.0", "0.6 ± 0.1"],
        ["a", "25.0", "0.25"],
    ]


_SCRIPTS = (
    "learning_rate_sweep",
    "penalty_comparison",
    "label_noise",
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


@pytest.mark.parametrize(
    "script",
    [
        *_SCRIPTS[:1],
        *(pytest.param(name, marks=pytest.mark.slow) for name in _SCRIPTS[1:]),
    ],
)
def test_help_explains_the_flags(script):
    """Also those of the modules that scripts share."""
    result = _script(script, "--help")
    for flag in "dataset", "epochs", "seeds", "jit", "output_dir":
        assert f"--{flag}" in result.stdout.replace("[no]", ""), flag


def _script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(_ROOT / "examples" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )


@pytest.mark.slow
def test_every_script_ends_with_a_table_and_a_figure(tmp_path):
    shared = [*_QUICK, "--seeds=2", f"--output_dir={tmp_path}"]
    few = ["--strengths=FP:0.1,1", "--strengths=SAM:0.1"]
    rates = "--learning_rates=0.05,0.1"
    for script, *arguments in (
        ("learning_rate_sweep", rates),
        ("penalty_comparison", rates, *few),
        ("label_noise", *few),
        ("delayed_penalty", "--starts=0,6"),
        ("final_curvature", rates, "--examples=64"),
    ):
        result = _script(script, *shared, *arguments)
        assert result.returncode == 0, result.stderr
        table = (tmp_path / f"{script}.md").read_text()
        assert table in result.stdout
        assert (tmp_path / f"{script}.png").stat().st_size > 10_000
        assert len(pd.read_csv(tmp_path / f"{script}.csv")) >= 4
