"""The training script, run as a person runs it."""

from __future__ import annotations

import ast
import math
import os
import signal
import subprocess
import sys

import clusters
import keras
import numpy as np
import pytest
import scripts
from tensorboard.backend.event_processing import event_accumulator

from keras_fisher._tensorboard import event_files


def test_train_writes_the_trace_at_its_true_steps(data_dir, tmp_path):
    result = scripts.run(
        "train.py",
        "--dataset=digits",
        "--penalty=fisher",
        "--every=10",
        "--trace_every=4",
        "--label_noise=0.4",
        "--epochs=2",
        "--steps_per_execution=5",
        f"--log_dir={tmp_path}",
        f"--save={tmp_path / 'new' / 'trained.keras'}",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    saved = keras.saving.load_model(tmp_path / "new" / "trained.keras")
    assert saved.optimizer.iterations == 22
    assert saved.penalty.warmup_steps == 500
    for name in ("fisher_trace", "fisher_penalty", "noisy_accuracy"):
        assert name in result.stdout
    assert 0 < scripts.final_accuracy(result.stdout) < 100
    events = event_accumulator.EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    steps = [e.step for e in events.Tensors("fisher/trace")]
    assert steps == [0, 4, 8, 10, 12, 16, 20]  # of 11 a pass, 22 in all


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "flag, said",
    [
        ("--learning_rate=nan", "--learning_rate=nan is no finite number"),
        ("--exclude=.", "leaves all trainable variables out"),
        pytest.param(
            "--exclude=(", "regular expression", marks=pytest.mark.slow
        ),
        pytest.param(
            "--log_dir=/dev/null/logs",
            "cannot be written",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_values_are_told_in_one_line(flag, said, data_dir):
    result = scripts.run(
        "train.py",
        "--dataset=mnist1d",
        "--penalty=fisher",
        flag,
        data_dir=data_dir,
    )
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--steps_per_execution=2", "--jit=true"])
def test_what_replicas_cannot_do_is_refused(flag, data_dir):
    result = scripts.run(
        "train.py", "--strategy=mirrored", flag, data_dir=data_dir
    )
    assert result.returncode != 0
    assert "leave both out" in result.stderr
    assert "Epoch" not in result.stdout


# Trains with the functions of the script, in a process that ends at a step.
_UNTIL = """
import os, signal, sys
from absl import flags
import keras, numpy as np
import train

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        step = keras.ops.convert_to_numpy(self.model.optimizer.iterations)
        if step >= float(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

flags.FLAGS(["train.py", *sys.argv[3:]])
of_script = train.callbacks
train.callbacks = lambda data: [*of_script(data), Kill()]
np.savez(sys.argv[1], *train.trained().get_weights())
"""


def _weights_of_train(path, kills, *flags, data_dir):
    """The weights at the end, of runs killed at some steps and a last one."""
    for step in (*kills, math.inf):
        assert not path.exists(), "there was no kill"
        result = subprocess.run(
            [sys.executable, "-c", _UNTIL, str(path), str(step), *flags],
            env=os.environ
            | {
                "TFDS_DATA_DIR": str(data_dir),
                "PYTHONPATH": f"{scripts.ROOT}:{scripts.ROOT / 'examples'}",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        expected = 0 if step == math.inf else -signal.SIGKILL
        assert result.returncode == expected, result.stderr
    with np.load(path) as weights:
        return list(weights.values()), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--penalty=fisher", "--every=4"],
        ["--augment", "--label_noise=0.2", "--steps_per_execution=2"],
        ["--strategy=mirrored", "--cpu_devices=2"],
    ],
)
def test_a_killed_run_goes_on_as_one_never_killed(flags, data_dir, tmp_path):
    flags = ["--model=mlp", "--dataset=digits", "--epochs=4", *flags]
    runs = []
    for name, kills in {"whole": (), "killed": (14, 38)}.items():  # of 44
        backup = tmp_path / f"backup of {name}"
        weights, output = _weights_of_train(
            tmp_path / f"{name}.npz",
            kills,
            *flags,
            f"--backup_dir={backup}",
            data_dir=data_dir,
        )
        assert ("Epoch 1/" in output) == (not kills)
        assert os.listdir(backup) == []
        runs.append(weights)
    for weights, expected in zip(*runs, strict=True):
        np.testing.assert_array_equal(weights, expected)


@pytest.mark.slow
def test_train_by_replicas_learns(data_dir):
    result = scripts.run(
        "train.py",
        "--model=mlp",
        "--dataset=digits",
        "--penalty=fisher",
        "--epochs=3",
        "--strategy=mirrored",
        "--cpu_devices=2",
        data_dir=data_dir,
    )
    assert result.returncode == 0, result.stderr
    accuracy = scripts.final_accuracy(result.stdout)
    assert accuracy > 50, f"{accuracy} %, where guessing gives 10 %"


@pytest.mark.slow
def test_train_by_two_workers(data_dir, tmp_path):
    flags = [
        "--model=mlp",
        "--dataset=digits",
        "--epochs=1",
        "--penalty=fisher",
        "--strategy=multi_worker",
        f"--log_dir={tmp_path / 'logs'}",
        f"--backup_dir={tmp_path / 'backup'}",
    ]
    scripts.run("train.py", *flags[:3], data_dir=data_dir)  # prepares the data

    def start(config):
        environment = {
            "TF_CONFIG": config,
            "TFDS_DATA_DIR": str(data_dir),
        }
        return subprocess.Popen(
            [sys.executable, str(scripts.ROOT / "examples/train.py"), *flags],
            env=os.environ | environment | {"PYTHONPATH": str(scripts.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    workers = [start(config) for config in clusters.cluster(2)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output[-3000:]
    first, second = map(scripts.final_accuracy, outputs)
    assert first == second
    points = event_files.scalars(str(tmp_path / "logs" / "train"))
    steps = [p.step for p in points if p.tag == "fisher/trace"]
    assert steps == list(range(11))


def test_every_flag_of_the_penalty_reaches_it():
    code = """
import sys
from absl import flags
import settings, train
for arguments in sys.argv[1:]:
    flags.FLAGS(["train.py", *arguments.split()])
    penalty = train.penalty()
    print([type(penalty).__name__, penalty.get_config(), settings.jit()])
"""
    first = (
        "--penalty=gradient --alpha=0.7 --fraction=0.5 --every=3 --noreuse "
        "--start=4 --stop=9 --micro_batch_size=8 --method=finite_difference "
        "--exclude=bias --bound=0.25 --warmup_steps=6 --jit=true"
    )
    second = "--penalty=fisher --bound=0 --jit=false"
    folders = scripts.ROOT, scripts.ROOT / "examples"
    lines = scripts.printed(code, first, second, folders=folders)
    found, unbounded = map(ast.literal_eval, lines[-2:])
    config = {
        "alpha": 0.7,
        "fraction": 0.5,
        "every": 3,
        "reuse": False,
        "start": 4,
        "stop": 9,
        "micro_batch_size": 8,
        "method": "finite_difference",
        "exclude": ["bias"],
        "bound": 0.25,
        "warmup_steps": 6,
    }
    assert found == ["GradientPenalty", config, True]
    name, config, jit = unbounded
    assert (name, config["bound"], jit) == ("FisherPenalty", None, False)
